"""``fit``: one training of a network, on Lightning.

    out/best.safetensors   weights of the best epoch
    out/last.ckpt          where the training stands: a training that was killed goes on from there
    out/metrics.csv        a row for each epoch
    out/steps.csv          a row now and then within an epoch, with the logger "csv"
    out/tensorboard, out/wandb                                 with those loggers

Lightning has the device, the processes, mixed precision, accumulation, clipping, and the counting
of batches. The end of an epoch is here: validation, learning rate, best weights, what is written.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..files import atomic_write
from ..ranks import Ranks
from .checkpoints import AtomicCheckpointIO, read_checkpoint, save_weights
from .settings import Engine, Fit, Optimizer

BEST, LAST, METRICS, STEPS = "best.safetensors", "last.ckpt", "metrics.csv", "steps.csv"
_STATE = "genkl_ext.fit"  # what we add to Lightning's checkpoint
_BAR_PER_SECOND = 4

Batch = dict[str, Any]  # tensors, and a Mixup
Step = Callable[[nn.Module, Batch], dict[str, Tensor]]
Row = dict[str, float | None]


class Batches(Protocol):
    """What is trained on; ``batches.py`` has them."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...
    def set_epoch(self, epoch: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a training came to."""

    improved: bool  #: ``best.safetensors`` was written; False where no epoch beat ``start``
    best_epoch: int | None  #: from 1
    best_accuracy: float | None  #: of its weights on the validation images; None without any
    best_loss: float | None  #: mean cross-entropy there
    epochs: int
    steps: int  #: of the optimiser
    seconds: float  #: of training and validation


@dataclasses.dataclass(frozen=True)
class Validation:
    """How a network does on labelled images, of all processes together."""

    loss: float  #: mean cross-entropy
    accuracy: float
    published_loss: float  #: mean of the last batch alone, divided by the number of images (N3)


def fit(
    network: nn.Module,
    batches: Batches,
    step: Step,
    out: Path,
    settings: Fit,
    engine: Engine,
    *,
    seed: int,
    ranks: Ranks,
    validation: Iterable[Batch] | None = None,
    start: tuple[float, float] | None = None,
    say: Callable[[str], None] = print,
    eval_mode_after_first_epoch: bool = False,
    last_batch_validation_loss: bool = False,
    lr_zero: bool = False,
) -> Fitted:
    """Train a network; or go on, where ``out`` has a ``last.ckpt`` of the same training.

    The best epoch is the one with the highest validation accuracy, and among those the one with the
    lowest validation loss; without validation the last. On a CPU a training that was killed, at
    whatever moment, ends with the same bytes as one that was not.

    ``metrics.csv`` has the columns epoch (from 1), step (of the optimiser, all so far), lr (during
    the epoch), the step's losses (means over the epoch's batches), validation_loss,
    validation_accuracy and seconds.

    Args:
        network: on the CPU; it ends there, with the weights of the last epoch, unless the training
            was finished before.
        batches: epochs of this process's batches.
        step: gives named losses of a batch, scalars, the same names every time; "loss" is
            differentiated, all are logged.
        out: folder; made if it is not there.
        settings: epochs, optimiser, schedule.
        engine: precision, accumulation, clipping, average of the weights, saving, logging.
        seed: of what the network draws while it trains. torch's generators are left as they were.
        ranks: the processes that train together.
        validation: batches of "image" and "label", the same every time; this process's part.
        start: validation accuracy and loss that an epoch must beat to be kept.
        say: called with a line for every epoch, by the first process.
        eval_mode_after_first_epoch: train on with frozen batch norm after one epoch (trap T5).
        last_batch_validation_loss: the plateau schedule follows the published validation loss (N3).
        lr_zero: no weight changes, batch norm's statistics do (trap T4).

    Raises:
        ValueError: settings that do not fit together, or a ``last.ckpt`` of another training.
        FloatingPointError: a loss or a weight is not finite; ``last.ckpt`` is from before.
        ImportError: a logger's package is not installed. OSError: something cannot be written.
        SystemExit: SIGTERM; a process that trains alone saves where it stands.
    """
    task = _Task(
        batches,
        out,
        settings,
        engine,
        seed,
        ranks,
        validation,
        start,
        say if ranks.first else _silent,
        eval_mode_after_first_epoch,
        last_batch_validation_loss,
        lr_zero,
    )
    task.check()
    out.mkdir(parents=True, exist_ok=True)
    training = _Training(network, step, task)
    checkpoint = _take_up(task, training)
    course = _Course(task, training, None if checkpoint is None else checkpoint[_STATE])
    if ranks.first:
        _mend(out, course, checkpoint)
    going_on = checkpoint is not None
    del checkpoint  # it holds on to a file that will be replaced
    if len(course.history) < settings.epochs:
        with _own_random_numbers(task), _quiet_lightning():
            _run(_trainer(task, course), training, batches, out / LAST if going_on else None)
    return course.fitted()


@dataclasses.dataclass(frozen=True)
class _Task:
    """What :func:`fit` was asked for; its arguments say what each part is."""

    batches: Batches
    out: Path
    settings: Fit
    engine: Engine
    seed: int
    ranks: Ranks
    validation: Iterable[Batch] | None
    start: tuple[float, float] | None
    say: Callable[[str], None]
    eval_mode_after_first_epoch: bool
    last_batch_validation_loss: bool
    lr_zero: bool

    @property
    def device(self) -> torch.device:
        return self.ranks.device(self.engine.accelerator)

    @property
    def about(self) -> dict[str, Any]:
        """What the result depends on, apart from network, step and data, in plain values."""
        parts = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(Fit)}
        return {
            "settings": {name: _plain(part) for name, part in parts.items()},
            "engine": {
                name: getattr(self.engine, name)
                for name in ("precision", "accumulate", "clip", "ema")
            },
            "seed": self.seed,
            "processes": self.ranks.size,
            "batches": len(self.batches),
            "validation": self.validation is not None,
            "start": None if self.start is None else list(self.start),
            "eval_mode_after_first_epoch": self.eval_mode_after_first_epoch,
            "last_batch_validation_loss": self.last_batch_validation_loss,
            "lr_zero": self.lr_zero,
        }

    def check(self) -> None:
        """Raise ``ValueError`` for what cannot be done."""
        settings = self.settings
        if not len(self.batches):
            raise ValueError("fit: batches must be at least one, got none")
        if self.engine.precision == "16-mixed" and self.device.type == "cpu":
            raise ValueError("fit: precision '16-mixed' must have a GPU; a CPU has 'bf16-mixed'")
        if settings.epochs < 1:
            raise ValueError(f"fit: epochs must be at least 1, got {settings.epochs}")
        if settings.validate_every < 1:
            raise ValueError(
                f"fit: validate_every must be at least 1, got {settings.validate_every}"
            )
        if self.validation is None and settings.schedule.name == "plateau":
            raise ValueError("fit: the plateau schedule must have validation images, got none")
        if self.validation is None and self.start is not None:
            raise ValueError("fit: start must come with validation images, got none")


class _Training(LightningModule):
    """The network and what makes a step of it."""

    def __init__(self, network: nn.Module, step: Step, task: _Task) -> None:
        super().__init__()
        self.network = network
        self.losses: dict[str, Tensor] = {}  #: of the last batch
        self.scheduler: LambdaLR | ReduceLROnPlateau | None = None
        self._step = step
        self._task = task

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning sets it some forty times a step, and nn.Module's way is a slow one.
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def training_step(self, batch: Batch) -> Tensor:
        losses = self._step(self.network, batch)
        self.losses = {name: loss.detach() for name, loss in losses.items()}
        return losses["loss"]

    def transfer_batch_to_device(
        self, batch: Batch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return {name: value.to(device, non_blocking=True) for name, value in batch.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.network.parameters() if p.requires_grad]
        settings = self._task.settings
        optimizer = _optimizer(parameters, settings.optimizer, self._task.lr_zero)
        schedule, epochs = settings.schedule, settings.epochs
        # Not given to Lightning: it would step the plateau schedule after last.ckpt is written.
        if schedule.name == "cosine":
            self.scheduler = LambdaLR(optimizer, lambda e: (1 + math.cos(math.pi * e / epochs)) / 2)
        elif schedule.name == "plateau":
            self.scheduler = ReduceLROnPlateau(
                optimizer, factor=schedule.factor, patience=schedule.patience
            )
        return optimizer


class _Course(Callback):
    """The course of a training: what is known of it so far, and what happens when.

    ``last.ckpt`` is written where Lightning can take it up again: after a step that is not the last
    of its epoch, and at the end of an epoch when all else is done.
    """

    def __init__(self, task: _Task, training: _Training, state: dict[str, Any] | None) -> None:
        self.history: list[Row] = []  #: of metrics.csv
        self.best: Row | None = None  #: its row of the best epoch
        self.step = 0  #: of the optimiser
        self._task = task
        self._training = training
        self._network = training.network
        self._average: AveragedModel | None = None
        self._sums: dict[str, float] = {}  # of this epoch's losses, and of so many batches:
        self._count = 0
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # steps and losses, on the device
        self._seconds = 0.0  # of this epoch, before
        self._since = 0.0  # this moment
        self._at_epoch_end = False  # whether last.ckpt is, or will be in a moment
        self._terminated = False
        self._before_fit = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
        self._state = state
        if state is not None:
            self.history, self.best, self.step = state["history"], state["best"], state["step"]
            task.batches.load_state_dict(state["ranks"][task.ranks.rank]["batches"])
        else:
            task.batches.set_epoch(0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._task.engine.ema is not None:
            # Buffers too: the statistics of batch norm belong to the averaged weights.
            self._average = AveragedModel(
                self._network,
                multi_avg_fn=get_ema_multi_avg_fn(self._task.engine.ema),
                use_buffers=True,
            )
        if self._state is not None:
            self._restore(self._state)
            self._state = None
        self._set_mode()
        self._terminated = trainer.received_sigterm
        if threading.current_thread() is threading.main_thread():
            # Lightning's handler talks to the other processes, at a moment of which they know
            # nothing; its teardown puts back what was there before.
            alone = self._task.ranks.size == 1
            signal.signal(signal.SIGTERM, self._terminate if alone else self._before_fit)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = trainer.global_step > self.step
        self.step = trainer.global_step
        self._unread.append((self.step, self._training.losses))
        if not stepped:
            return
        if self._average is not None:
            self._average.update_parameters(self._network)
        if self.step % self._task.engine.log_every == 0:
            self._log(trainer)
        if trainer.is_last_batch:
            return  # the end of the epoch saves
        every = self._task.engine.save_every
        if self._terminated or (every is not None and self.step % every == 0):
            self._save(trainer)
        self._end_if_terminated()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = len(self.history) + 1
        self._read_losses()
        losses = self._mean_losses()
        row: Row = {"epoch": epoch, "step": self.step, "lr": _lr(trainer), **losses}
        validated = self._validate(trainer, epoch)
        if validated is not None:
            row["validation_loss"] = validated.loss
            row["validation_accuracy"] = validated.accuracy
        self._step_schedule(validated)
        row["seconds"] = round(self._elapsed(), 3)
        self.history.append(row)
        is_best = self._is_best(row)
        if is_best:
            self.best = row
        self._sums, self._count, self._seconds = {}, 0, 0.0
        self._since = time.perf_counter()
        self._set_mode()
        # In this order: ``_mend`` can write the other two from the first.
        self._save(trainer, at_epoch_end=True)
        if self._task.ranks.first:
            if is_best:
                save_weights(self._task.out / BEST, self._kept().state_dict())
            _write_metrics(self._task.out / METRICS, self.history)
        logged = {f"epoch_{name}": loss for name, loss in losses.items()}
        if validated is not None:
            logged["validation_loss"] = validated.loss
            logged["validation_accuracy"] = validated.accuracy
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=self.step)
        self._task.say(_line(row, self._task.settings.epochs, is_best))
        self._end_if_terminated()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        scheduler = self._training.scheduler
        average = self._average
        checkpoint[_STATE] = {
            "about": self._task.about,
            "history": self.history,
            "best": self.best,
            "step": self.step,
            "at_epoch_end": self._at_epoch_end,
            "seconds": self._elapsed(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "average": None if average is None else average.module.state_dict(),
            "averaged": 0 if average is None else int(average.n_averaged),
            "ranks": self._of_each_rank(
                {
                    "batches": self._task.batches.state_dict(),
                    "random": _random_state(pl_module.device),
                    "sums": self._sums,
                    "count": self._count,
                }
            ),
        }

    def fitted(self) -> Fitted:
        best: Row = self.best or {}
        best_epoch = best.get("epoch")
        return Fitted(
            improved=self.best is not None,
            best_epoch=None if best_epoch is None else int(best_epoch),
            best_accuracy=best.get("validation_accuracy"),
            best_loss=best.get("validation_loss"),
            epochs=len(self.history),
            steps=self.step,
            seconds=sum(row["seconds"] or 0.0 for row in self.history),
        )

    def _restore(self, state: dict[str, Any]) -> None:
        """What Lightning has not restored from its part of the checkpoint."""
        if self._training.scheduler is not None:
            self._training.scheduler.load_state_dict(state["scheduler"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])
            self._average.n_averaged.fill_(state["averaged"])
        self._seconds = state["seconds"]
        mine = state["ranks"][self._task.ranks.rank]
        self._sums, self._count = dict(mine["sums"]), mine["count"]
        _set_random_state(mine["random"], self._training.device)
        self._task.say(
            f"goes on after step {self.step}, in epoch {len(self.history) + 1} of "
            f"{self._task.settings.epochs}"
        )

    def _set_mode(self) -> None:
        frozen = self._task.eval_mode_after_first_epoch and len(self.history) > 0
        self._network.train(not frozen)

    def _kept(self) -> nn.Module:
        """The network that is validated and kept."""
        return self._network if self._average is None else self._average.module

    def _read_losses(self) -> None:
        """Add up the losses since the last time; the host waits for the device here only.

        Raises:
            FloatingPointError: one is not finite, on whatever process.
        """
        bad = ""
        if self._unread:
            flat = [loss for _, losses in self._unread for loss in losses.values()]
            values = iter(torch.stack(flat).double().tolist())
            for step, losses in self._unread:
                for name in losses:
                    value = next(values)
                    self._sums[name] = self._sums.get(name, 0.0) + value
                    if not (bad or math.isfinite(value)):
                        bad = f"{name} = {value} in epoch {len(self.history) + 1}, step {step}"
            self._count += len(self._unread)
            self._unread.clear()
        self._require_finite("losses", bad)

    def _require_finite(self, what: str, bad: str) -> None:
        (others,) = self._task.ranks.sum([bool(bad)])
        if others:
            bad = bad or f"others on another process, up to step {self.step}"
            raise FloatingPointError(
                f"fit: {what} must be finite, got {bad}; a lower learning rate or clipping may "
                f"help, and {self._task.out / LAST} is from before"
            )

    def _mean_losses(self) -> dict[str, float]:
        names = list(self._sums)
        *sums, count = self._task.ranks.sum([*self._sums.values(), self._count])
        return {name: total / count for name, total in zip(names, sums, strict=True)}

    def _log(self, trainer: Trainer) -> None:
        """Give the losses of this step to the loggers."""
        self._read_losses()
        losses = {name: float(loss) for name, loss in self._training.losses.items()}
        values = {"epoch": len(self.history) + 1, "lr": _lr(trainer), **losses}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=self.step)
        if "csv" in self._task.engine.loggers and self._task.ranks.first:
            _append(self._task.out / STEPS, {"step": self.step, **values})

    def _validate(self, trainer: Trainer, epoch: int) -> Validation | None:
        due = epoch % self._task.settings.validate_every == 0 or epoch == self._task.settings.epochs
        if self._task.validation is None or not due:
            return None
        network = self._kept()
        if self._task.ranks.size > 1:
            # Each process has seen other images; the first one's statistics are those it will save.
            for buffer in network.buffers():
                torch.distributed.broadcast(buffer, 0)
        network.eval()
        with trainer.precision_plugin.val_step_context():
            return validate(network, self._task.validation, self._training.device, self._task.ranks)

    def _step_schedule(self, validated: Validation | None) -> None:
        scheduler = self._training.scheduler
        if isinstance(scheduler, ReduceLROnPlateau):
            if validated is not None:
                published = self._task.last_batch_validation_loss
                scheduler.step(validated.published_loss if published else validated.loss)
        elif scheduler is not None:
            scheduler.step()

    def _is_best(self, row: Row) -> bool:
        if self._task.validation is None:
            return row["epoch"] == self._task.settings.epochs
        score, start = _score(row), self._task.start
        if score is None:
            return False
        to_beat = None if start is None else (start[0], -start[1])
        if self.best is not None:
            to_beat = _score(self.best)
        return to_beat is None or score > to_beat

    def _save(self, trainer: Trainer, *, at_epoch_end: bool = False) -> None:
        self._read_losses()
        parameters = self._network.named_parameters()
        bad = next((name for name, p in parameters if not bool(p.isfinite().all())), "")
        self._require_finite("weights", bad and f"others in {bad} after step {self.step}")
        self._at_epoch_end = at_epoch_end
        trainer.save_checkpoint(self._task.out / LAST)

    def _of_each_rank(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        everyones: list[Any] = [mine]
        if self._task.ranks.size > 1:
            everyones *= self._task.ranks.size
            torch.distributed.all_gather_object(everyones, mine)
        return everyones

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._since

    def _terminate(self, *_: object) -> None:
        self._terminated = True

    def _end_if_terminated(self) -> None:
        if self._terminated:
            raise SystemExit(128 + signal.SIGTERM)


@torch.no_grad()
def validate(
    network: nn.Module, batches: Iterable[Batch], device: torch.device, ranks: Ranks
) -> Validation:
    """Mean cross-entropy and accuracy over all images of all processes.

    Args:
        network: on ``device``, in eval mode.
        batches: this process's part of the images, "image" and "label"; a batch may be empty.
        device: where to compute.
        ranks: the processes.

    Raises:
        ValueError: there are no images.
    """
    losses: list[Tensor] = []  # sums over batches
    right: list[Tensor] = []
    sizes: list[int] = []
    for batch in batches:
        if not len(batch["label"]):
            continue
        labels = batch["label"].to(device, non_blocking=True)
        logits = network(batch["image"].to(device, non_blocking=True)).float()
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        right.append((logits.argmax(dim=1) == labels).sum())
        sizes.append(len(labels))
    sums = torch.stack(losses).double().tolist() if losses else [0.0]
    loss, correct, images, last_loss, last_images = ranks.sum(
        [
            math.fsum(sums),
            int(torch.stack(right).sum()) if right else 0,
            sum(sizes),
            sums[-1],
            sizes[-1] if sizes else 0,
        ]
    )
    if not images:
        raise ValueError("fit: validation must have images that can be read, got none")
    return Validation(loss / images, correct / images, last_loss / last_images / images)


class _Epochs:
    """What Lightning asks for epochs: batches, without their position, which the course keeps."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches


class _Joined(ClusterEnvironment):
    """Processes that know each other; to Lightning each is a machine of its own with one device."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        return os.environ["MASTER_ADDR"]

    @property
    def main_port(self) -> int:
        return int(os.environ["MASTER_PORT"])

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return self._ranks.size

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self._ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return self._ranks.rank


def _trainer(task: _Task, course: _Course) -> Trainer:
    engine, ranks, device = task.engine, task.ranks, task.device
    bar = sys.stderr.isatty() and ranks.first
    callbacks: list[Callback] = [course]
    if bar:
        callbacks.append(RichProgressBar(_BAR_PER_SECOND, console_kwargs={"stderr": True}))
    trainer = Trainer(
        accelerator="cpu" if device.type == "cpu" else "gpu",
        devices=1 if device.type == "cpu" else [device.index],
        num_nodes=ranks.size,
        plugins=[_Joined(ranks), AtomicCheckpointIO()],
        precision=engine.precision,
        max_epochs=task.settings.epochs,
        accumulate_grad_batches=engine.accumulate,
        gradient_clip_val=engine.clip,
        callbacks=callbacks,
        logger=_loggers(engine, task.out, course.step) if ranks.first else False,
        log_every_n_steps=engine.log_every,
        default_root_dir=task.out,
        enable_progress_bar=bar,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    # It tells all processes of a SIGTERM, and makes the host wait for the device in every step.
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _run(trainer: Trainer, training: _Training, batches: Batches, checkpoint: Path | None) -> None:
    try:
        with _own_threads():
            trainer.fit(training, _Epochs(batches), ckpt_path=checkpoint, weights_only=True)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning ends the process for it
            raise KeyboardInterrupt from None
        raise


def _loggers(engine: Engine, out: Path, step: int) -> list[Logger]:
    """The loggers asked for, apart from "csv", which ``_Course`` writes."""
    made: list[Logger] = []
    for name in engine.loggers:
        try:
            if name == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                # What a killed training has logged after this step is hidden.
                made.append(TensorBoardLogger(out, "tensorboard", "", purge_step=step + 1))
            elif name == "wandb":
                from lightning.pytorch.loggers import WandbLogger

                made.append(WandbLogger("/".join(out.parts[-3:]), out, project="genkl_ext"))
        except ModuleNotFoundError as error:
            raise ImportError(
                f"fit: the logger {name!r} needs the package {name}: pip install {name}"
            ) from error
    return made


def _optimizer(
    parameters: list[nn.Parameter], settings: Optimizer, lr_zero: bool
) -> torch.optim.Optimizer:
    lr = 0.0 if lr_zero else settings.lr
    decay = settings.weight_decay
    if settings.name == "sgd":
        momentum, nesterov = settings.momentum, settings.nesterov
        return torch.optim.SGD(
            parameters, lr, momentum=momentum, nesterov=nesterov, weight_decay=decay
        )
    if settings.name == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=decay)
    return torch.optim.AdamW(parameters, lr, weight_decay=decay)


def _score(row: Row) -> tuple[float, float] | None:
    """The larger, the better; None for an epoch that was not validated."""
    accuracy, loss = row.get("validation_accuracy"), row.get("validation_loss")
    return None if accuracy is None or loss is None else (accuracy, -loss)


def _lr(trainer: Trainer) -> float:
    return float(trainer.optimizers[0].param_groups[0]["lr"])


def _take_up(task: _Task, training: _Training) -> dict[str, Any] | None:
    """The checkpoint to go on from; None if there is none.

    Raises:
        ValueError: it is of another training.
    """
    path = task.out / LAST
    if not task.ranks.broadcast(path.exists()):
        return None
    checkpoint = read_checkpoint(path, mmap=True)
    anew = f"remove {task.out} to begin anew"
    if _STATE not in checkpoint:
        raise ValueError(f"fit: {path} must be the checkpoint of a training by fit; {anew}")
    before = checkpoint[_STATE]["about"]
    for name, wanted in task.about.items():
        if before.get(name) != wanted:
            raise ValueError(
                f"fit: {path} must be of a training with {name} {wanted}, "
                f"got {before.get(name)}; {anew}"
            )
    saved = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    if saved != {name: value.shape for name, value in training.state_dict().items()}:
        raise ValueError(f"fit: {path} must be of this network, and is of another; {anew}")
    return checkpoint


def _mend(out: Path, course: _Course, checkpoint: dict[str, Any] | None) -> None:
    """Make the folder as it was when ``last.ckpt`` was written, or would have been soon after."""
    for name in (BEST, LAST, METRICS, STEPS):
        stem, _, suffix = name.partition(".")
        for left in out.glob(f".{stem}.*.partial.{suffix}"):
            left.unlink()
    _cut(out / STEPS, course.step)
    if checkpoint is None:
        for name in (BEST, METRICS):
            (out / name).unlink(missing_ok=True)
        return
    state = checkpoint[_STATE]
    if state["at_epoch_end"] and course.best == course.history[-1]:
        weights = checkpoint["state_dict"]
        weights = {name.removeprefix("network."): value for name, value in weights.items()}
        save_weights(out / BEST, state["average"] or weights)
    if course.history:
        _write_metrics(out / METRICS, course.history)


def _write_metrics(path: Path, history: list[Row]) -> None:
    # The columns of the validation stand last in the rows that have them.
    columns = list(dict.fromkeys(name for row in history for name in row if name != "seconds"))
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, "seconds"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def _append(path: Path, row: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def _cut(path: Path, step: int) -> None:
    """Take away the rows after a step; the last one may be cut off in the middle."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines[1:] if line.endswith("\n")]
    kept = [line for line in whole if int(line.partition(",")[0]) <= step]
    if kept:
        with atomic_write(path) as temporary:
            temporary.write_text("".join([lines[0], *kept]), encoding="utf-8")
    else:
        path.unlink()


def _line(row: Row, epochs: int, is_best: bool) -> str:
    text = f"epoch {row['epoch']} of {epochs}: loss {row.get('loss', math.nan):.4f}"
    if "validation_accuracy" in row:
        text += (
            f", validation loss {row['validation_loss']:.4f}"
            f", accuracy {100 * (row['validation_accuracy'] or 0.0):.2f} %"
        )
        text += ", the best so far" if is_best else ""
    return f"{text}, {row['seconds']:.1f} s"


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def _own_random_numbers(task: _Task) -> Iterator[None]:
    """torch's generators are the training's; after it they are as they were."""
    mine = task.seed * task.ranks.size + task.ranks.rank
    gpus = [task.device] if task.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.default_generator.manual_seed(mine)
        for gpu in gpus:
            with torch.cuda.device(gpu):
                torch.cuda.manual_seed(mine)
        yield


@contextmanager
def _own_threads() -> Iterator[None]:
    """As many threads as there are: without this variable Lightning takes all processors."""
    variable = "OMP_NUM_THREADS"
    before = os.environ.get(variable)
    os.environ.setdefault(variable, str(torch.get_num_threads()))
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Without Lightning's news and advice, which are about what is decided here."""
    names = ("lightning.pytorch", "lightning.fabric")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.")
        for name in names:
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]


def _silent(line: str) -> None:
    pass
