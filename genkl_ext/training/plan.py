"""What a run would do, and what it would take: the text of ``genkl run --dry-run``."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
import torch.nn.functional as F

from ..ranks import Ranks
from . import networks
from .loop import Summary
from .settings import Recipe

_SECONDS = 3.0  # of measuring each kind of pass
_MOST = 20  # passes of each kind


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the network takes here, measured on random pixels."""

    seconds_forward: float  #: per image
    seconds_training: float  #: per image, forward, backward and step
    bytes: int  #: of its weights


def describe(summary: Summary, cost: Cost, ranks: Ranks) -> list[str]:
    """The stages in order, what is done, and an estimate of time and disk for the rest.

    Loading images is not in the estimate: where it is slower than the network, it sets the time.
    """
    sizes = ", ".join(f"{count:,} {split}" for split, count in summary.images.items())
    lines = [f"data: {sizes}; {summary.classes} classes; {summary.recipe.data.root}"]
    if summary.unusable:
        lines.append(f"data: {summary.unusable:,} images cannot be used")
    seconds, size = 0.0, 0
    for planned in summary.plan:
        stage = planned.stage
        takes = _seconds(stage, cost) / ranks.size
        leaves = stage.bytes + stage.weights * cost.bytes
        text = f"  {stage.name:40}"
        if planned.done:
            lines.append(f"{text} done")
            continue
        seconds, size = seconds + takes, size + leaves
        passes = [
            f"{count:,} images {what}"
            for count, what in ((stage.trained, "trained on"), (stage.images, "predicted"))
            if count
        ]
        estimate = f" ({', '.join(passes)}; about {duration(takes)})" if passes else ""
        lines.append(f"{text} to do{estimate}" + (f", again: {planned.why}" if planned.why else ""))
    lines.append(f"to do: about {duration(seconds)} and {size / 1e9:.2f} GB of disk")
    lines.append(
        f"measured here: {1000 * cost.seconds_training:.3g} ms to train on an image, "
        f"{1000 * cost.seconds_forward:.3g} ms to predict one, on {ranks.size} process(es); "
        "reading the images comes on top where it is slower"
    )
    return lines


def measure(recipe: Recipe, num_classes: int, ranks: Ranks) -> Cost:
    """Time the recipe's network on random pixels, for some seconds."""
    device = ranks.device(recipe.engine.accelerator)
    network = networks.build(
        dataclasses.replace(recipe.network, pretrained=None), num_classes, 0
    ).to(device)
    size = recipe.data.train.size
    batch = max(2, recipe.training.batch_size // ranks.size)
    images = torch.rand(batch, 3, size, size, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    optimiser = torch.optim.SGD(network.parameters(), 1e-6)
    kind = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(recipe.engine.precision)
    cast = torch.autocast(device.type, kind, enabled=kind is not None)

    def predict() -> None:
        with torch.inference_mode(), cast:
            network(images)

    def train() -> None:
        with cast:
            loss = F.cross_entropy(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    network.eval()
    forward = _time(predict, device) / batch
    network.train()
    training = _time(train, device) / batch
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    return Cost(forward, training, weights)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _time(work: Any, device: torch.device) -> float:
    """Seconds of one call: the least of several, the first apart."""
    work()
    best = float("inf")
    begin = time.perf_counter()
    for _ in range(_MOST):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begin > _SECONDS:
            break
    return best


def _seconds(stage: Any, cost: Cost) -> float:
    return float(stage.images * cost.seconds_forward + stage.trained * cost.seconds_training)
