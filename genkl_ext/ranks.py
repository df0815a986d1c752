"""The processes of one job: ``torchrun`` or SLURM starts them, ``join`` makes them known to each
other.

    ranks = join("cpu")               # Ranks(rank=1, size=2, local_rank=1, local_size=2)
    if ranks.first:
        path.write_text(...)
    ranks.barrier()                   # now every process can read it

Without a launcher there is one process, and nothing here costs anything, nor imports torch. A
process that fails must end: its connections close, and the others, where they wait for it, fail
with a ``ConnectionError``.
``torchrun`` ends the others besides, wherever they are, and so does ``srun --kill-on-bad-exit``.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from .rule import processors

if TYPE_CHECKING:
    import torch

# The first process scans, scores and relabels alone, for hours where the data are many; the others
# wait. Gradients keep torch's own, shorter limits.
_LONGEST_WAIT = timedelta(hours=24)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process among those of its job. All of them call the same methods in the same order."""

    rank: int = 0  #: from 0 to size - 1
    size: int = 1  #: processes of the job
    local_rank: int = 0  #: among those on this machine
    local_size: int = 1  #: processes on this machine

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints what one process does for all."""
        return self.rank == 0

    @property
    def processors(self) -> int:
        """This process's share of the machine's processors: how many threads it may start."""
        mine = processors()
        bound = mine < (os.cpu_count() or 1)  # the launcher has given each process its own
        return mine if bound else max(1, mine // self.local_size)

    def barrier(self) -> None:
        """Wait until every process is here.

        Raises:
            ConnectionError: another process has ended.
        """
        self.sum([])

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on every process; the others' values are ignored.

        Args:
            value: as JSON knows it; what comes out has been through JSON, also without company.

        Raises:
            ConnectionError: another process has ended.
        """
        text = json.dumps(value).encode() if self.first else b""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            with _company(self):
                length = torch.tensor(len(text))
                dist.broadcast(length, 0, group=_group)
                content = torch.empty(int(length), dtype=torch.uint8)
                if self.first:
                    content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
                dist.broadcast(content, 0, group=_group)
                text = content.numpy().tobytes()
        return json.loads(text)

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over the processes, number by number, in float64; the same bits on all of them.

        Raises:
            ConnectionError: another process has ended.
        """
        if self.size == 1:
            return [float(number) for number in numbers]
        import torch
        import torch.distributed as dist

        mine = torch.tensor([*numbers, 0.0], dtype=torch.float64)  # torch gathers nothing empty
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        with _company(self):
            dist.all_gather(everyones, mine, group=_group)
        sums: list[float] = torch.stack(everyones).sum(dim=0).tolist()
        return sums[:-1]

    def device(self, accelerator: str = "auto") -> torch.device:
        """Where this process computes: the CPU, or the GPU of its own number.

        Args:
            accelerator: "cpu"; "gpu"; "auto": GPUs where there are any.

        Raises:
            ValueError: a GPU is wanted, and this process has none.
        """
        import torch

        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if accelerator == "cpu" or (accelerator == "auto" and not gpus):
            return torch.device("cpu")
        if self.local_rank >= gpus:
            raise ValueError(
                f"engine: accelerator {accelerator!r} needs a GPU for each process of a "
                f"machine, got {gpus} for {self.local_size}"
            )
        return torch.device("cuda", self.local_rank)


_joined: Ranks | None = None
_group: Any = None  # for what is said here; gradients have the default group


def join(accelerator: str = "auto") -> Ranks:
    """This process among those that ``torchrun`` or ``srun`` started; alone without them.

    Makes torch's default process group, which Lightning then uses: NCCL for tensors on GPUs, Gloo
    for those on CPUs. A later call gives the same ranks.

    Args:
        accelerator: as for :meth:`Ranks.device`.

    Raises:
        ConnectionError: the processes do not find each other. ValueError: the launcher's variables
            do not fit together.
    """
    global _joined
    if _joined is None:
        launched = _launched()
        _joined = launched if launched.size == 1 else _meet(launched, accelerator)
    return _joined


def _launched() -> Ranks:
    """What the launcher says, in the order in which Lightning asks; alone without one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        return Ranks(*(int(os.environ[name]) for name in names))
    if "SLURM_NTASKS" not in os.environ:
        return Ranks()  # Lightning takes seconds to import
    from lightning.fabric.plugins.environments import SLURMEnvironment

    if not SLURMEnvironment.detect():
        return Ranks()
    try:
        slurm = SLURMEnvironment()
    except RuntimeError as error:  # variables that do not fit together
        raise ValueError(f"join: {error}") from error
    os.environ["MASTER_ADDR"] = slurm.main_address
    os.environ["MASTER_PORT"] = str(slurm.main_port)
    local_size = int(os.environ.get("SLURM_NTASKS_PER_NODE", 1))
    return Ranks(slurm.global_rank(), slurm.world_size(), slurm.local_rank(), local_size)


def _meet(ranks: Ranks, accelerator: str) -> Ranks:
    import torch.distributed as dist

    global _group
    gpu = ranks.device(accelerator).type == "cuda"
    with _company(ranks):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo", rank=ranks.rank, world_size=ranks.size
        )
        atexit.register(_leave)
        _group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    return ranks


def _leave() -> None:
    """Ends Gloo's threads while there is an interpreter.

    One that lets go of a tensor later aborts the process, however well its work went. They end with
    their group, and a group ends when nobody holds it: so nobody but this module holds ours.
    """
    import torch.distributed as dist

    global _group
    _group = None
    dist.destroy_process_group()


@contextmanager
def _company(ranks: Ranks) -> Iterator[None]:
    """Says what torch's errors mean where processes talk to each other."""
    try:
        yield
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ConnectionError(
            f"process {ranks.rank} of {ranks.size} has lost the others (they meet at {address}); "
            f"look for the error of the one that ended first: {str(error).splitlines()[0]}"
        ) from error
