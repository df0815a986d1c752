"""Training for the demo: a small network, two kinds of step, fine-tuning, prediction.

The images of a split are held in memory; what reads them is ``_pixels``.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..objective import CLEAN, NC, NNC, Objective
from ..relabel import Targets
from .layout import Split

Loss = Callable[[nn.Module], Tensor]  # the loss of a network on the next batch
Tick = Callable[[], None]  # called after every step


@dataclass(frozen=True)
class Settings:
    """How every network of the demo is trained; the objective has the defaults of Clothing1M."""

    steps: int = 600  #: of every training
    validate_every: int = 30  #: steps from one check on the validation images to the next
    learning_rate: float = 0.05  #: SGD, Nesterov momentum 0.9; falls to 0 on a cosine
    weight_decay: float = 1e-3
    fine_tune_steps: int = 120
    fine_tune_learning_rate: float = 1e-4  #: Adam; falls to 0 on a cosine
    objective: Objective = field(default_factory=Objective)


@dataclass(frozen=True)
class Check:
    """One look at the validation images."""

    step: int
    training_loss: float  #: mean since the check before
    loss: float  #: mean cross-entropy of the validation images
    accuracy: float  #: on the validation images, from 0 to 1

    def beats(self, other: Check) -> bool:
        """More accurate, or as accurate with a lower loss."""
        return (self.accuracy, -self.loss) > (other.accuracy, -other.loss)


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind."""

    best: nn.Module  #: with the weights of the best check
    last: nn.Module  #: with the weights of the last step
    best_check: Check
    history: list[Check]


def make_network(classes: int, seed: int) -> nn.Module:
    """Three convolutions and a linear layer: 16 x 16 grey images to ``classes`` logits."""
    layers: list[nn.Module] = []
    channels = 1
    # Layers draw their first weights from torch's global generator, which all threads share.
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for width in (16, 32, 64):
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = width
        layers += [nn.Flatten(), nn.Linear(4 * channels, classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


_global_generator = threading.Lock()


@torch.no_grad()
def predict(network: nn.Module, split: Split) -> NDArray[np.float32]:
    """(N, k) softmax outputs in evaluation mode, rows as in the split."""
    network.eval()
    rows = np.arange(len(split))
    parts = [network(_pixels(split, part)) for part in np.split(rows, rows[256::256])]
    q: NDArray[np.float32] = torch.cat(parts).softmax(dim=1).numpy()
    return q


def accuracy(q: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of the rows of ``q`` whose largest entry is at the label."""
    return float((q.argmax(axis=1) == labels).mean())


def train_plain(
    split: Split, classes: int, validation: Split, settings: Settings, seed: int, tick: Tick
) -> Trained:
    """Cross-entropy with the labels of ``split``, taken as right."""
    loss = _cross_entropy(split, settings, np.random.default_rng(seed))
    return _train(make_network(classes, seed), loss, validation, settings, tick)


def train_genkl(
    noisy: Split,
    targets: Targets,
    clean: Split,
    validation: Split,
    settings: Settings,
    seed: int,
    tick: Tick,
) -> Trained:
    """The three-term objective, each step on a relabelled batch beside a clean batch."""
    rng = np.random.default_rng(seed)
    objective = settings.objective
    noisy_batches = _batches(len(noisy), objective.batch_size, rng)
    clean_batches = _batches(len(clean), objective.batch_size, rng)
    one_hot = np.eye(targets.num_classes, dtype=np.float32)

    def loss(network: nn.Module) -> Tensor:
        rows, clean_rows = next(noisy_batches), next(clean_batches)
        images = torch.cat([_pixels(noisy, rows), _pixels(clean, clean_rows)])
        t = np.concatenate([targets[rows].dense(), one_hot[clean.labels[clean_rows]]])
        group = [np.where(targets.nc[rows], NC, NNC), np.full(len(clean_rows), CLEAN)]
        groups = torch.from_numpy(np.concatenate(group))

        images = _augment(images, rng)
        mixup = objective.draw_mixup(groups, rng)
        if mixup is not None:
            images = mixup.mix(images)
        return objective(network(images), torch.from_numpy(t), groups, mixup).total

    return _train(make_network(targets.num_classes, seed), loss, validation, settings, tick)


def fine_tune(
    start: Trained, clean: Split, validation: Split, settings: Settings, seed: int, tick: Tick
) -> Trained:
    """Cross-entropy on the clean images, from the best check of a training.

    The best network is still the one it started from where no check of the fine-tuning beats it.
    """
    network = copy.deepcopy(start.best)
    optimiser = torch.optim.Adam(network.parameters(), settings.fine_tune_learning_rate)
    loss = _cross_entropy(clean, settings, np.random.default_rng(seed))
    steps = settings.fine_tune_steps
    return _fit(network, loss, optimiser, steps, validation, settings, tick, start.best_check)


def _train(
    network: nn.Module, loss: Loss, validation: Split, settings: Settings, tick: Tick
) -> Trained:
    optimiser = torch.optim.SGD(
        network.parameters(),
        settings.learning_rate,
        momentum=0.9,
        nesterov=True,
        weight_decay=settings.weight_decay,
    )
    return _fit(network, loss, optimiser, settings.steps, validation, settings, tick, None)


def _fit(
    network: nn.Module,
    loss: Loss,
    optimiser: torch.optim.Optimizer,
    steps: int,
    validation: Split,
    settings: Settings,
    tick: Tick,
    best_check: Check | None,
) -> Trained:
    """Take the steps; keep the weights of the best check, the given one included."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    best = copy.deepcopy(network)
    history: list[Check] = []
    losses: list[float] = []
    for step in range(1, steps + 1):
        network.train()
        value = loss(network)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
        losses.append(value.item())
        tick()
        if step % settings.validate_every == 0 or step == steps:
            check = Check(step, float(np.mean(losses)), *_validate(network, validation))
            history.append(check)
            losses.clear()
            if best_check is None or check.beats(best_check):
                best_check, best = check, copy.deepcopy(network)
    assert best_check is not None  # the last step is always checked
    return Trained(best, network, best_check, history)


def _validate(network: nn.Module, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and accuracy on a split."""
    q = predict(network, split)
    given = q[np.arange(len(split)), split.labels]
    loss = -np.log(np.maximum(given, np.finfo(np.float32).tiny)).mean()
    return float(loss), accuracy(q, split.labels)


def _cross_entropy(split: Split, settings: Settings, rng: np.random.Generator) -> Loss:
    """Cross-entropy with the labels of the next batch."""
    batches = _batches(len(split), settings.objective.batch_size, rng)

    def loss(network: nn.Module) -> Tensor:
        rows = next(batches)
        images = _augment(_pixels(split, rows), rng)
        return F.cross_entropy(network(images), torch.from_numpy(split.labels[rows]))

    return loss


def _batches(size: int, batch_size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Row numbers without end, shuffled anew in every pass; what fills no batch is left out."""
    if size < batch_size:
        raise ValueError(f"demo: a split must fill a batch of {batch_size}, got {size} images")
    while True:
        order = rng.permutation(size)
        for begin in range(0, size - batch_size + 1, batch_size):
            yield order[begin : begin + batch_size]


def _pixels(split: Split, rows: NDArray[np.int64]) -> Tensor:
    """(n, 1, H, W) float32 from 0 (paper) to 1 (ink)."""
    images = torch.from_numpy(split.images[rows]).float() / 255
    return images.to(memory_format=torch.channels_last)


def _augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Turn each image by up to 8 degrees, scale it and shift it by up to 5 %."""
    n = len(images)
    angle = rng.uniform(-math.radians(8), math.radians(8), n)
    scale = rng.uniform(0.95, 1.05, n)
    affine = np.empty((n, 2, 3), dtype=np.float32)
    affine[:, 0, 0] = affine[:, 1, 1] = np.cos(angle) / scale
    affine[:, 0, 1] = -np.sin(angle) / scale
    affine[:, 1, 0] = np.sin(angle) / scale
    affine[:, :, 2] = rng.uniform(-0.1, 0.1, (n, 2))  # an image spans from -1 to 1
    grid = F.affine_grid(torch.from_numpy(affine), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
