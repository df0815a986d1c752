import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkl_ext import ranks as ranks_module
from genkl_ext.ranks import Ranks, join

# What every process of the job does; it leaves what it saw in a file of its own.
PROGRAM = """
import atexit, json, os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist

out = Path(sys.argv[1])
seen = {}

def gloo():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

def left():
    seen["threads left"] = gloo()
    (out / f"{seen['ranks'][0]}.json").write_text(json.dumps(seen))

atexit.register(left)  # runs after all that is registered from here on

from lightning.pytorch import LightningModule, Trainer
from genkl_ext.ranks import join

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)
    def training_step(self, batch, _):
        return self.layer(batch).sum()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)

def main():
    ranks = join("cpu")
    world = dist.group.WORLD
    seen["ranks"] = [ranks.rank, ranks.size, ranks.local_rank, ranks.local_size]
    seen["first"] = ranks.first
    seen["same"] = join() is ranks
    seen["backend"] = dist.get_backend()
    seen["processors"] = ranks.processors
    values = [{"text": "\\u00e4\\udc80 " * 1000, "n": [1, 2.5, None]}, [], None, 0]
    seen["broadcast"] = [ranks.broadcast(v if ranks.first else "mine") for v in values] == values
    seen["sum"] = ranks.sum([ranks.rank, 2.0**53 - 1 if ranks.first else 1, 0.1])
    seen["nothing"] = ranks.sum([])
    if not ranks.first:
        time.sleep(0.3)
        (out / "late").touch()
    ranks.barrier()
    seen["barrier"] = (out / "late").exists()
    module = Module()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader([torch.full((1,), float(ranks.rank))]))
    seen["lightning"] = [trainer.global_rank, trainer.world_size, dist.group.WORLD is world]
    seen["weight"] = module.layer.weight.item()  # 1 - the mean of 0 and 1
    ranks.barrier()
    seen["threads"] = gloo()

main()
"""

SLURM = {
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NAME": "test",
    "SLURM_NODELIST": "127.0.0.1",
}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had joined."""
    monkeypatch.setattr(ranks_module, "_joined", None)


def test_alone(fresh: None) -> None:
    ranks = join()
    assert ranks == Ranks(0, 1, 0, 1) == Ranks() and ranks.first
    assert join() is ranks
    ranks.barrier()
    assert ranks.broadcast({"a": (1, 2.5), "b": None}) == {"a": [1, 2.5], "b": None}
    assert ranks.sum([1, 0.1]) == [1.0, 0.1] and ranks.sum([]) == []
    assert not torch.distributed.is_initialized()


def torchrun(program: str, folder: Path) -> None:
    """Two processes of a program; its argument is the folder."""
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(folder / "program.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the two processes of a job under torchrun saw."""
    folder = tmp_path_factory.mktemp("ranks")
    torchrun(PROGRAM, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_torchrun(seen: list[dict]) -> None:
    assert [one["ranks"] for one in seen] == [[0, 2, 0, 2], [1, 2, 1, 2]]
    assert [one["first"] for one in seen] == [True, False]
    assert all(one["same"] and one["backend"] == "gloo" for one in seen)
    everything = len(os.sched_getaffinity(0))
    share = everything if everything < (os.cpu_count() or 1) else max(1, everything // 2)
    assert [one["processors"] for one in seen] == [share, share]


def test_values_reach_all(seen: list[dict]) -> None:
    assert all(one["broadcast"] and one["barrier"] for one in seen)
    assert [one["sum"] for one in seen] == [[1.0, 2.0**53, 0.2]] * 2
    assert [one["nothing"] for one in seen] == [[], []]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are looked up in /proc")
def test_no_thread_outlives_the_groups(seen: list[dict]) -> None:
    """Gloo's threads, left alone, abort a process that ends well, now and then."""
    assert all(one["threads"] > 0 and one["threads left"] == 0 for one in seen)


def test_lightning_uses_the_same_group(seen: list[dict]) -> None:
    assert [one["lightning"] for one in seen] == [[0, 2, True], [1, 2, True]]
    assert [one["weight"] for one in seen] == [0.5, 0.5]


FAILING = """
import os, signal, sys
from genkl_ext.ranks import join

ranks = join()
print(ranks.rank, ranks.size, ranks.local_rank, ranks.local_size, flush=True)
ranks.barrier()
if not ranks.first:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    ranks.barrier()
except ConnectionError as error:
    print(error)
    sys.exit(5)
"""


def test_slurm_and_a_process_that_dies(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(FAILING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        settings = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "MASTER_PORT": port}
        command = [sys.executable, str(tmp_path / "program.py")]
        environment = {**os.environ, **SLURM, **settings}
        environment.pop("MASTER_ADDR", None)
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        )
    first, second = (process.communicate(timeout=100)[0] for process in processes)
    assert [process.returncode for process in processes] == [5, -signal.SIGKILL]
    assert second == "1 2 1 2\n"
    assert first.startswith("0 2 0 2\nprocess 0 of 2 has lost the others (they meet at 127.0.0.1:")
    assert first.count("\n") == 2


@pytest.mark.usefixtures("fresh")
def test_slurm_that_is_not_for_us(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert join() == Ranks()


@pytest.mark.usefixtures("fresh")
def test_slurm_variables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_NAME", "x")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    with pytest.raises(ValueError, match=r"^join: .*ntasks-per-node"):
        join()


@pytest.mark.parametrize(
    ("gpus", "accelerator", "local_rank", "device"),
    [
        (0, "auto", 1, "cpu"),
        (0, "cpu", 0, "cpu"),
        (2, "cpu", 1, "cpu"),
        (2, "auto", 0, "cuda:0"),
        (2, "auto", 1, "cuda:1"),
        (2, "gpu", 1, "cuda:1"),
    ],
)
def test_device(
    monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str, local_rank: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    ranks = Ranks(local_rank, 2, local_rank, 2)
    assert str(ranks.device(accelerator)) == device


@pytest.mark.parametrize(("gpus", "accelerator"), [(0, "gpu"), (1, "gpu"), (1, "auto")])
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, accelerator: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    message = rf"accelerator '{accelerator}' needs a GPU for each process .*, got {gpus} for 2$"
    with pytest.raises(ValueError, match=message):
        Ranks(1, 2, 1, 2).device(accelerator)


def test_share_of_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(ranks_module, "processors", lambda: 8)
    assert [Ranks(0, 16, 0, n).processors for n in (1, 2, 3, 16)] == [8, 4, 2, 1]
    monkeypatch.setattr(ranks_module, "processors", lambda: 2)  # bound by the launcher
    assert Ranks(0, 4, 0, 4).processors == 2
