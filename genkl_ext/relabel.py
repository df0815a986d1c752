"""Targets for the next training: uniform for non-conforming rows, double-hot for the others.

    ratio = class_ratio(clean_labels, k)        # prior belief in a given label, by class
    t = targets(scores, noisy_labels, ratio)    # (N, k)
    t = Targets.of(scores, noisy_labels, ratio) # the same, five numbers per row; t[rows].dense()

NumPy in gives NumPy out and needs no torch; tensors in give tensors out on their device.

Source: GenKL (arXiv 2307.09810), relabelling and normalized class ratio.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .rule import Array, Scores


def class_ratio(labels: Array, num_classes: int) -> Array:
    """Normalized class ratio r_c = (1 / n_c) / sum_c' (1 / n_c'), n_c images carrying label c.

    A rare class weighs more; n_c r_c is the same for all classes and r sums to 1.

    Args:
        labels: (n,) integers from 0 to num_classes - 1, of the images whose class sizes count:
            the clean training images for Clothing1M, all training images for Food-101N and
            mini WebVision.
        num_classes: k.

    Returns:
        (k,) float64, of the kind and on the device of ``labels``.

    Raises:
        TypeError: labels are not integers. ValueError: wrong shape, a label outside the classes,
            or a class without an image.
    """
    where = "class_ratio"
    if isinstance(num_classes, bool) or not isinstance(num_classes, (int, np.integer)):
        raise TypeError(f"{where}: num_classes must be an integer, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"{where}: num_classes must be at least 1, got {num_classes}")
    xp = _namespace(labels)
    labels = _check_labels(where, labels, num_classes)
    counts = xp.bincount(labels, minlength=num_classes)
    empty = [c for c, count in enumerate(counts.tolist()) if count == 0]
    if empty:
        some = ", ".join(map(str, empty[:10])) + (", ..." if len(empty) > 10 else "")
        raise ValueError(
            f"{where}: labels must hold every class from 0 to {num_classes - 1} at least once, "
            f"got no image of class {some}"
        )
    reciprocal = 1.0 / xp.asarray(counts, dtype=xp.float64)
    return reciprocal / reciprocal.sum()


@dataclasses.dataclass(frozen=True)
class Targets:
    """Soft targets of N rows, stored as what they are made of.

    A row has at most two non-zero entries, or is uniform, so five numbers stand for k: at
    Clothing1M's size 17 MB instead of 56 MB. A loader asks for ``targets[rows].dense()``.
    """

    top_class: Array  #: (N,) int32, the model's most probable class a
    top_prob: Array  #: (N,) float32, its probability max(q): the belief of the model
    label: Array  #: (N,) int32, the given label y
    prior: Array  #: (N,) float32, r_y: the prior belief in the given label
    nc: Array  #: (N,) bool, non-conforming: the target is uniform
    num_classes: int
    prior_everywhere: bool = False
    #: r_y is added to every class, not to y alone, as the published program does for mini
    #: WebVision by mistake

    @classmethod
    def of(cls, scores: Scores, labels: Array, ratio: Array, nc: Array | None = None) -> Targets:
        """Targets of N scored rows; arguments and errors as for :func:`targets`."""
        where = "targets"
        scores.check()
        like = scores.top_class
        xp = _namespace(like)
        rows, k = len(scores), scores.rule.num_classes
        labels = _check_labels(where, _as_kind(where, "labels", labels, like), k)
        ratio = _as_kind(where, "ratio", ratio, like)
        nc = scores.nc if nc is None else _as_kind(where, "nc", nc, like)
        if len(labels) != rows:
            raise ValueError(
                f"{where}: labels must be one per scored row, {rows}, got {len(labels)}"
            )
        if tuple(ratio.shape) != (k,):
            raise ValueError(f"{where}: ratio must have shape ({k},), got {tuple(ratio.shape)}")
        bad = ~(xp.isfinite(ratio) & (ratio >= 0))
        if bool(bad.any()):
            c = bad.tolist().index(True)
            raise ValueError(
                f"{where}: ratio must be finite and not negative, "
                f"got {ratio[c].item()} for class {c}"
            )
        if nc.dtype != xp.bool or tuple(nc.shape) != (rows,):
            raise ValueError(
                f"{where}: nc must be ({rows},) booleans, got {tuple(nc.shape)} {nc.dtype}"
            )
        return cls(
            top_class=scores.top_class,
            top_prob=scores.top_prob,
            label=xp.asarray(labels, dtype=xp.int32),
            prior=xp.asarray(ratio, dtype=xp.float32)[labels],
            nc=nc,
            num_classes=k,
        )

    @classmethod
    def of_labels(cls, labels: Array, num_classes: int) -> Targets:
        """Targets of verified images: one-hot at the label, which is all that is believed.

        They stay one-hot where a prior is added everywhere, or taken from another row.

        Args:
            labels: (N,) integers from 0 to num_classes - 1.
            num_classes: k.

        Raises:
            TypeError, ValueError: as for :func:`targets`.
        """
        xp = _namespace(labels)
        label = xp.asarray(_check_labels("Targets.of_labels", labels, num_classes), dtype=xp.int32)
        return cls(
            top_class=label,
            top_prob=xp.ones_like(label, dtype=xp.float32),
            label=label,
            prior=xp.zeros_like(label, dtype=xp.float32),
            nc=xp.zeros_like(label, dtype=xp.bool),
            num_classes=num_classes,
        )

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, rows: Any) -> Targets:
        """The targets of some rows: a slice, an index array or a mask."""
        return dataclasses.replace(self, **{name: getattr(self, name)[rows] for name in _COLUMNS})

    def joined(self, other: Targets) -> Targets:
        """These rows and then those of another; of the kind, device and settings of these."""
        xp = _namespace(self.label)
        columns = {n: xp.concatenate([getattr(self, n), getattr(other, n)]) for n in _COLUMNS}
        return dataclasses.replace(self, **columns)

    def dense(self, nc_targets: Array | None = None) -> Array:
        """(N, k) float32 rows: 1/k everywhere, or max(q) at a plus r_y at y; not normalised.

        Args:
            nc_targets: (n, k) rows for the n non-conforming ones, in their order, instead of the
                uniform one: the published program gives them their averaged prediction on
                Clothing1M, by mistake.
        """
        xp = _namespace(self.label)
        device = {} if xp is np else {"device": self.label.device}
        row = xp.arange(len(self), **device)
        t = xp.zeros((len(self), self.num_classes), dtype=xp.float32, **device)
        t[row, self.top_class] = self.top_prob
        if self.prior_everywhere:
            t += self.prior[:, None]
        else:
            t[row, self.label] += self.prior
        if nc_targets is None:
            return xp.where(self.nc[:, None], 1.0 / self.num_classes, t)
        t[self.nc] = nc_targets
        return t


_COLUMNS = ("top_class", "top_prob", "label", "prior", "nc")  # of Targets: one entry per row


def targets(scores: Scores, labels: Array, ratio: Array, nc: Array | None = None) -> Array:
    """Soft targets of N scored rows.

    A non-conforming row gets the uniform vector. Any other row gets the double-hot vector
    t = max(q) e_a + r_y e_y: the model's belief in its most probable class a and the prior
    belief in the given label y, added up where a = y. t is not normalised: its scale changes the
    loss by a constant and the gradient not at all.

    Args:
        scores: of the averaged predictions q, from ``GenKL.score``.
        labels: (N,) integers, the given label of each row.
        ratio: (k,) normalized class ratio, from :func:`class_ratio`.
        nc: (N,) booleans to use instead of ``scores.nc``: a list made elsewhere, or
            ``scores.at(alpha)``.

    Returns:
        (N, k) float32, of the kind and on the device of ``scores``. NumPy arguments beside
        tensor scores are copied to their device.

    Raises:
        TypeError: labels are not integers, or tensors beside NumPy scores. ValueError: a wrong
            shape, a label outside the classes, a ratio that is negative or not finite.
    """
    return Targets.of(scores, labels, ratio, nc).dense()


def _namespace(array: Any) -> Any:
    """The module, numpy or torch, that an array belongs to."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and isinstance(array, torch.Tensor) else np


def _as_kind(where: str, name: str, array: Any, like: Any) -> Any:
    """``array`` as the kind and on the device of ``like``; no tensor becomes a NumPy array."""
    xp = _namespace(like)
    if xp is not np:
        return xp.as_tensor(array, device=like.device)
    if _namespace(array) is not np:
        raise TypeError(f"{where}: {name} must be a NumPy array like scores, got a torch tensor")
    return np.asarray(array)


def _check_labels(where: str, labels: Any, num_classes: int) -> Any:
    """``labels`` as (n,) int64, once each of them is known to be a class."""
    xp = _namespace(labels)
    if xp is np:
        labels = np.asarray(labels)
        integers = labels.dtype.kind in "iu" or labels.size == 0
    else:
        integers = not (labels.is_floating_point() or labels.is_complex())
        integers = integers and labels.dtype != xp.bool
    if not integers:
        raise TypeError(f"{where}: labels must be integers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"{where}: labels must have shape (n,), got {tuple(labels.shape)}")
    labels = xp.asarray(labels, dtype=xp.int64)
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        row = int(xp.argmax(xp.asarray(outside, dtype=xp.int32)))
        raise ValueError(
            f"{where}: labels must be from 0 to {num_classes - 1}, "
            f"got {int(labels[row])} at row {row}"
        )
    return labels
