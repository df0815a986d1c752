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
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

CLEAN, NNC, NC = GROUPS = 0, 1, 2

GroupWeight = Literal["equal", "size"]


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
    return _double_hot(_log_softmax(logits), targets)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum_c t_c ln p_c of each row; the loss of NC images with t uniform.

    Args:
        logits: (B, k). targets: (B, k).

    Returns:
        (B,), in the dtype of the log-softmax (float32 for half precision).
    """
    return _soft(_log_softmax(logits), targets)


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

    L = scale (w1 L_clean + w2 L_nnc + w3 L_nc), each L a mean over its group. As published, the
    scale is 1 / B: it only scales the learning rate, and is kept because the published weights
    and learning rates belong together with it. Weight decay, which it does not scale, is that
    much stronger beside the losses.

    A group mean does not depend on the size of its group: one NC image in a batch weighs as much
    as thirty. With group_weight="size" each L_g is multiplied by 3 n_g / n, where n_g of the n
    images of the batch are in group g: every image of a group then weighs the same in each batch,
    and groups of equal size give the same loss either way.
    """

    clean: float = 1.0  #: w1
    nnc: float = 32.0  #: w2
    nc: float = 1.0  #: w3
    batch_size: int = 32  #: B, as configured, not of the batch at hand
    mixup_alpha: float = 0.5  #: lambda ~ Beta(mixup_alpha, mixup_alpha); 0 or less: no mixing
    loss_scale: float | None = None  #: None: 1 / batch_size
    group_weight: GroupWeight = "equal"

    def __post_init__(self) -> None:
        for name in ("clean", "nnc", "nc"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"Objective: {name} must be a finite number >= 0, got {value}")
        if not self.batch_size >= 1:
            raise ValueError(f"Objective: batch_size must be at least 1, got {self.batch_size}")
        if not math.isfinite(self.mixup_alpha):
            raise ValueError(f"Objective: mixup_alpha must be finite, got {self.mixup_alpha}")
        scale = self.loss_scale
        if scale is not None and not 0 < scale < math.inf:
            raise ValueError(f"Objective: loss_scale must be a finite number > 0, got {scale}")
        if self.group_weight not in get_args(GroupWeight):
            raise ValueError(
                f"Objective: group_weight must be 'equal' or 'size', got {self.group_weight!r}"
            )

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
        self,
        logits: Tensor,
        targets: Tensor,
        groups: Tensor,
        mixup: Mixup | None = None,
        partner_targets: Tensor | None = None,
        *,
        all_ranks: bool = False,
    ) -> Losses:
        """The losses of one batch.

        Args:
            logits: (B', k) of the mixed images, any floating dtype.
            targets: (B', k) of the unmixed images: one-hot, double-hot or uniform by group.
            groups: (B',) of CLEAN, NNC and NC.
            mixup: as the images were mixed; None if they were not.
            partner_targets: (B', k) of the image that each is mixed with, where that is not
                ``targets[mixup.partner]``.
            all_ranks: the processes of torch.distributed train together, and the means are over
                the batches of all of them. Each process gets losses whose average over the
                processes is the loss of the whole batch, so that averaging gradients, as
                DistributedDataParallel does, gives its gradient. Every process must call.

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
        log_p = _log_softmax(logits)
        # A one-hot t makes -ln <p, t> the usual cross-entropy: one formula serves two groups.
        if mixup is None:
            hot = _double_hot(log_p, targets)
        else:
            if partner_targets is None:
                partner_targets = targets[mixup.partner]
            own, partner = _double_hot(log_p, torch.stack([targets, partner_targets]))
            hot = partner.lerp(own, mixup.weight.to(own.dtype))
        losses = torch.where(groups == NC, _soft(log_p, targets), hot)

        members = groups == torch.arange(len(GROUPS), device=groups.device)[:, None]
        counts, ranks = members.sum(dim=1), 1
        if all_ranks:
            counts, ranks = sum_over_ranks(counts)
        # An empty group has the sum 0, with a gradient of 0.
        means = torch.where(members, losses, 0.0).sum(dim=1) * ranks / counts.clamp(min=1)
        parts = means
        if self.group_weight == "size":
            parts = means * len(GROUPS) * counts / counts.sum().clamp(min=1)
        clean, nnc, nc = parts.unbind()
        scale = 1 / self.batch_size if self.loss_scale is None else self.loss_scale
        total = (self.clean * clean + self.nnc * nnc + self.nc * nc) * scale
        return Losses(total, *means.unbind())


def sum_over_ranks(count: Tensor) -> tuple[Tensor, int]:
    """The sum of ``count`` over the processes of torch.distributed, and how many these are."""
    if not (dist.is_available() and dist.is_initialized()):
        return count, 1
    dist.all_reduce(count)
    return count, dist.get_world_size()


def _log_softmax(logits: Tensor) -> Tensor:
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return torch.log_softmax(logits, dim=1, dtype=torch.float32 if half else None)


def _double_hot(log_p: Tensor, targets: Tensor) -> Tensor:
    return -torch.logsumexp(log_p + targets.to(log_p.dtype).log(), dim=-1)


def _soft(log_p: Tensor, targets: Tensor) -> Tensor:
    return -(targets.to(log_p.dtype) * log_p).sum(dim=1)
