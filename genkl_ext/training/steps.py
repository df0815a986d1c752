"""One step: from a network and a batch to losses. "loss" is differentiated, the rest is logged.

    PlainStep     cross-entropy of the given labels
    GenKLStep     the three-term objective, with what the published programs do otherwise

Losses are means over the batches of all ranks: a rank's loss is such that the average of the
ranks' gradients, which DistributedDataParallel takes, is the gradient of the whole batch. The host
does not wait for the device (except for ``separate_passes``: it must know the sizes of groups).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..objective import CLEAN, NC, NNC, Mixup, Objective, sum_over_ranks
from .settings import Compatibility, Training

Batch = dict[str, Any]


class PlainStep:
    """Mean cross-entropy of the given labels, times ``loss_scale`` (None: 1 / images).

    Gives "loss" and "cross_entropy", the mean before it is scaled.
    """

    def __init__(self, loss_scale: float | None = 1.0) -> None:
        self._loss_scale = loss_scale

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        logits = _single_precision(_forward(network, batch["image"]))
        total = F.cross_entropy(logits, batch["label"], reduction="sum")
        images, ranks = sum_over_ranks(torch.full_like(total, len(logits)))
        images = images.clamp(min=1)
        mean = total * ranks / images
        scale = 1 / images if self._loss_scale is None else self._loss_scale
        return {"loss": mean * scale, "cross_entropy": mean.detach()}


class GenKLStep:
    """The objective of GenKL, on the batches of :func:`~genkl_ext.training.batches.grouped`.

    With ``clean="dynamic"`` an NNC image counts as clean where the softmax at its given label is
    at least ``clean_threshold``. Then its target is that label, and the label of its mixup
    partner, be the partner clean or not. The softmax is that of the mixed image in training mode
    (``clean_test="mixed"``, as published) or of the image itself in evaluation mode ("unmixed"),
    which takes a second forward pass.

    With ``compatibility.separate_passes`` the NC, NNC and clean images pass the network one group
    after the other, and batch normalisation sees each group alone.

    Gives "loss"; "clean_loss", "nnc_loss" and "nc_loss", the means over the groups, 0 where there
    is none; for "dynamic" also "clean_share" of the images and "belief", the mean softmax at the
    given label. A softmax that is not finite makes no image clean, and "belief" not finite.
    """

    def __init__(self, training: Training, compatibility: Compatibility) -> None:
        self._objective = Objective(
            training.omega_clean,
            training.omega_nnc,
            training.omega_nc,
            batch_size=training.batch_size,
            loss_scale=training.loss_scale,
            group_weight=training.group_weight,
        )
        self._dynamic = training.clean == "dynamic"
        self._unmixed = self._dynamic and training.clean_test == "unmixed"
        self._threshold = training.clean_threshold
        self._separate_passes = compatibility.separate_passes

    def __call__(self, network: nn.Module, batch: Batch) -> dict[str, Tensor]:
        images, labels = batch["image"], batch["label"]
        groups, targets = batch["group"], batch["target"]
        mixup: Mixup | None = batch.get("mixup")
        partner_targets: Tensor | None = batch.get("partner_target")

        unmixed_logits = None
        if self._unmixed:
            with torch.no_grad(), _evaluating(network):
                unmixed_logits = _forward(network, images)
            # Under autocast older torch would go on with weights that were cast without gradient.
            torch.clear_autocast_cache()
        if mixup is not None:
            images = mixup.mix(images)
        logits = self._logits(network, images, groups)

        scores = {}
        if self._dynamic:
            tested = logits.detach() if unmixed_logits is None else unmixed_logits
            belief = _single_precision(tested).softmax(dim=1).gather(1, labels[:, None])[:, 0]
            believed = (groups == NNC) & (belief >= self._threshold)
            groups = groups.masked_fill(believed, CLEAN)
            targets = _with_labels(targets, believed, labels)
            if mixup is not None and partner_targets is not None:
                partner_targets = _with_labels(partner_targets, believed, labels[mixup.partner])
            n = max(len(belief), 1)
            scores = {"clean_share": believed.sum() / n, "belief": belief.sum() / n}

        losses = self._objective(logits, targets, groups, mixup, partner_targets, all_ranks=True)
        return {
            "loss": losses.total,
            "clean_loss": losses.clean.detach(),
            "nnc_loss": losses.nnc.detach(),
            "nc_loss": losses.nc.detach(),
            **scores,
        }

    def _logits(self, network: nn.Module, images: Tensor, groups: Tensor) -> Tensor:
        if not self._separate_passes or not len(images):
            return _forward(network, images)
        members = [torch.nonzero(groups == group)[:, 0] for group in (NC, NNC, CLEAN)]
        logits = [network(images[rows]) for rows in members if len(rows)]
        return torch.cat(logits)[torch.cat(members).argsort()]


def _forward(network: nn.Module, images: Tensor) -> Tensor:
    """(n, k) logits of n images, also of none.

    A rank whose images were all broken still takes part in the exchange of gradients, with zeros,
    but leaves the statistics of batch normalisation alone.
    """
    if len(images):
        return network(images)
    with _evaluating(network):
        return network(images.new_zeros(1, *images.shape[1:]))[:0]


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards the mode that each part was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _single_precision(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _with_labels(targets: Tensor, chosen: Tensor, labels: Tensor) -> Tensor:
    """The targets, one-hot at the labels in the rows that are chosen."""
    one_hot = labels[:, None] == torch.arange(targets.shape[1], device=labels.device)
    return torch.where(chosen[:, None], one_hot.to(targets.dtype), targets)
