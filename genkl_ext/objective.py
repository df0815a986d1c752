"""The training objective of GenKL: L = (w1 L_clean + w2 L_nnc + w3 L_nc) / B.

Every image of a batch belongs to one group and carries one target row t:

    group   who                                   target t                   loss of an image
    CLEAN   label verified                        one-hot                    -ln p_y
    NNC     conforming, label may be wrong        double-hot (relabel.py)    -ln <p, t>
    NC      fits no class, or several             uniform                    -sum_c t_c ln p_c

with p the softmax of the network's logits. One step is::

    mixup = objective.draw_mixup(groups, rng)              # on the host: partners within a group
    logits = model(mixup.mix(images))                      # one forward pass for all groups
    losses = objective(logits, targets, groups, mixup)
    losses.total.backward()

Nothing here makes the host wait for the device.

Source: GenKL (arXiv 2307.09810), equations 6 and 7 and the published program. Three of its slips
are not repeated: each mixup partner keeps its own prior, an unmixed image has no partner term
(0 times infinity was possible), and all groups share one forward pass, so that batch
normalisation never sees the statistics of a tiny group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CLEAN, NNC, NC = 0, 1, 2


def double_hot_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln <p, t> of each row, p the softmax: how little p believes in what t allows.

    Not the cross-entropy of t: the gradient with respect to the logits is p - rho with
    rho = t p / <t, p>, so the target is weighted anew by the current prediction, and the scale of
    t does not matter to it. Evaluated as a log-sum-exp, finite wherever the logits are.

    Args:
        logits: (B, k). targets: (B, k), not negative, at least one positive entry per row.

    Returns:
        (B,), in the dtype of the log-softmax (float32 for half precision).
    """
    log_p = _log_softmax(logits)
    return -torch.logsumexp(log_p + targets.to(log_p.dtype).log(), dim=1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c ln p_c of each row; the loss of NC images with t uniform.

    Args:
        logits: (B, k). targets: (B, k).

    Returns:
        (B,), in the dtype of the log-softmax (float32 for half precision).
    """
    log_p = _log_softmax(logits)
    return -(targets.to(log_p.dtype) * log_p).sum(dim=1)


class Mixup(NamedTuple):
    """Who is mixed with whom: image i becomes w_i x_i + (1 - w_i) x_partner(i)."""

    partner: Tensor  #: (B,) int64, of the same group; an unmixed image is its own partner
    weight: Tensor  #: (B,) float32, from 0.5 to 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Mixup:
        """The same on another device."""
        return Mixup(*(t.to(device, non_blocking=non_blocking) for t in self))

    def mix(self, images: Tensor) -> Tensor:
        """The mixed (B, ...) images, in their own floating dtype."""
        weight = self.weight.to(images.dtype).view(-1, *[1] * (images.ndim - 1))
        return images[self.partner].lerp(images, weight)


class Losses(NamedTuple):
    """One step's losses, scalars. The group losses are means over their groups, 0 if empty."""

    total: Tensor
    clean: Tensor
    nnc: Tensor
    nc: Tensor


@dataclass(frozen=True)
class Objective:
    """The weights of the three groups and the amount of mixing; defaults of Clothing1M.

    A group mean does not depend on the size of its group: one NC image in a batch weighs as much
    as thirty. Dividing by the configured batch size only scales the learning rate; it is kept
    because the published weights and learning rates belong together with it.
    """

    clean: float = 1.0  #: w1
    nnc: float = 32.0  #: w2
    nc: float = 1.0  #: w3
    batch_size: int = 32  #: B, as configured, not of the batch at hand
    mixup_alpha: float = 0.5  #: lambda ~ Beta(mixup_alpha, mixup_alpha); 0 or less: no mixing

    def __post_init__(self) -> None:
        for name in ("clean", "nnc", "nc"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Objective: {name} must be a finite number >= 0, got {value}")
        if not self.batch_size >= 1:
            raise ValueError(f"Objective: batch_size must be at least 1, got {self.batch_size}")
        if not math.isfinite(self.mixup_alpha):
            raise ValueError(f"Objective: mixup_alpha must be finite, got {self.mixup_alpha}")

    def draw_mixup(self, groups: Tensor, rng: np.random.Generator) -> Mixup | None:
        """Draw one coefficient and one permutation for the clean and for the NNC group.

        lambda ~ Beta(mixup_alpha, mixup_alpha), then max(lambda, 1 - lambda), so that an image
        keeps at least half of its own weight. NC images are never mixed.

        Args:
            groups: (B,) of CLEAN, NNC and NC, on the host.
            rng: private to the training run, so that nothing else shifts its stream.

        Returns:
            Mixup on the host, or None when mixing is off.
        """
        if self.mixup_alpha <= 0:
            return None
        host = groups.numpy()
        partner = np.arange(len(host))
        weight = np.ones(len(host), dtype=np.float32)
        for group in (CLEAN, NNC):
            drawn = rng.beta(self.mixup_alpha, self.mixup_alpha)
            coefficient = np.float32(max(drawn, 1.0 - drawn))
            members = np.flatnonzero(host == group)
            shuffled = rng.permutation(members)
            if coefficient < 1.0:
                partner[members] = shuffled
                weight[members] = coefficient
        return Mixup(torch.from_numpy(partner), torch.from_numpy(weight))

    def __call__(
        self, logits: Tensor, targets: Tensor, groups: Tensor, mixup: Mixup | None = None
    ) -> Losses:
        """The losses of one batch.

        Args:
            logits: (B', k) of the mixed images, any floating dtype.
            targets: (B', k) of the unmixed images: one-hot, double-hot or uniform by group.
            groups: (B',) of CLEAN, NNC and NC.
            mixup: as the images were mixed; None if they were not.

        Returns:
            Losses; ``total`` is what to differentiate.

        Raises:
            ValueError: shapes that do not fit together.
        """
        if logits.ndim != 2 or targets.shape != logits.shape or groups.shape != logits.shape[:1]:
            raise ValueError(
                "Objective: logits and targets must have shape (B, k) and groups (B,), got "
                f"{tuple(logits.shape)}, {tuple(targets.shape)} and {tuple(groups.shape)}"
            )
        # A one-hot t makes -ln <p, t> the usual cross-entropy: one formula serves two groups.
        hot = double_hot_loss(logits, targets)
        if mixup is not None:
            partner = double_hot_loss(logits, targets[mixup.partner])
            hot = partner.lerp(hot, mixup.weight.to(hot.dtype))
        clean = _group_mean(hot, groups == CLEAN)
        nnc = _group_mean(hot, groups == NNC)
        nc = _group_mean(soft_cross_entropy(logits, targets), groups == NC)
        total = (self.clean * clean + self.nnc * nnc + self.nc * nc) / self.batch_size
        return Losses(total, clean, nnc, nc)


def _log_softmax(logits: Tensor) -> Tensor:
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return torch.log_softmax(logits, dim=1, dtype=torch.float32 if half else None)


def _group_mean(losses: Tensor, members: Tensor) -> Tensor:
    """Mean over the members; 0, with a gradient of 0, if there are none."""
    return torch.where(members, losses, 0.0).sum() / members.sum().clamp(min=1)
