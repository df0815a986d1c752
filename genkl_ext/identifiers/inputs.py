"""What identifiers are given: arrays checked at the door, walked in pieces that stay in cache.

A formula is written once, for NumPy and torch: it takes the statistics of a piece of the rows, and
their labels, and uses only functions that both libraries have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from ..relabel import _namespace
from ..rule import num_threads, sum_tolerance
from .row_statistics import NumpyStatistics, RowStatistics, TorchStatistics

if TYPE_CHECKING:
    from ..rule import Array

Formula = Callable[..., Any]

PIECE_BYTES = 1 << 20  # of float64 rows; they and their average stay in cache
DEVICE_PIECE_BYTES = 64 << 20  # on a GPU the launches count, not the cache
FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Rows:
    """M (N, k) arrays of one kind, shape, dtype and device, once they are known to be that.

    ``name`` is the argument they came as: "predictions", "members" or "logits". Logits may be any
    finite numbers; the others must be probabilities.
    """

    where: str
    name: str
    models: tuple[Any, ...]
    xp: Any  #: numpy or torch

    @classmethod
    def of(cls, where: str, name: str, arrays: Array | Sequence[Array], least: int = 1) -> Rows:
        """Check one array or a sequence of them, of which there must be at least ``least``.

        Raises:
            TypeError: wrong kind or dtype. ValueError: wrong shape, or too few arrays.
        """
        stacked = not isinstance(arrays, (list, tuple)) and getattr(arrays, "ndim", 0) == 3
        many = stacked or isinstance(arrays, (list, tuple))
        models: list[Any] = list(arrays) if many else [arrays]
        if len(models) < least:
            raise ValueError(
                f"{where}: {name} must be at least {least} (N, k) arrays, got {len(models)}"
            )
        first: Any = models[0]
        xp = _namespace(first)
        for i, model in enumerate(models):
            label = f"{name}[{i}]" if many else name
            if not isinstance(model, np.ndarray if xp is np else xp.Tensor):
                wanted = "a NumPy array or torch tensor" if i == 0 else f"like {name}[0]"
                raise TypeError(f"{where}: {label} must be {wanted}, got {type(model).__name__}")
            if dtype_name(model) not in FLOATS:
                raise TypeError(f"{where}: {label} must be floating-point, got {model.dtype}")
            if model.ndim != 2 or model.shape[1] < 2:
                raise ValueError(
                    f"{where}: {label} must have shape (N, k) with k >= 2, got {_shape(model)}"
                )
            if model.shape != first.shape or model.dtype != first.dtype:
                raise ValueError(
                    f"{where}: {label} must be like {name}[0], {_shape(first)} {first.dtype}, "
                    f"got {_shape(model)} {model.dtype}"
                )
            if xp is not np and model.device != first.device:
                raise ValueError(
                    f"{where}: {label} must be on {first.device} like {name}[0], got {model.device}"
                )
        if xp is not np:
            models = [model.detach() for model in models]
        return cls(where, name, tuple(models), xp)

    def __len__(self) -> int:
        return len(self.models[0])

    @property
    def classes(self) -> int:
        """k."""
        return int(self.models[0].shape[1])

    def labels(self, labels: Any) -> Any:
        """(N,) int64 labels of the rows, of their kind and on their device; see `check_labels`."""
        like = self.models[0]
        return check_labels(self.where, "labels", labels, len(self), like, self.classes)

    def averaged(self, models: list[Any]) -> Any:
        """The average of a piece of each model, in float64."""
        return self.exact(_average(self.xp, models))

    def exact(self, piece: Any) -> Any:
        """A piece of an array in float64."""
        return _cast(self.xp, piece, "float64")

    def score(
        self,
        formula: Formula,
        labels: Any = None,
        *,
        entropy: bool = False,
        floor: float | None = None,
        validate: bool = True,
    ) -> Any:
        """(N,) float32: ``formula(s)`` or ``formula(s, y)`` of the averaged rows, piece by piece.

        Args:
            formula: takes the `RowStatistics` of a piece, and the labels of its rows where these
                are given, and returns (n,) float64.
            labels: from :meth:`labels`. A row without a label (-1) scores NaN.
            entropy, floor: what the formula will ask the statistics for.
            validate: raise ``ValueError`` for the first invalid row; otherwise invalid rows score
                NaN, except for sums that are not 1.
        """

        def averaged(models: list[Any], y: Any, s: RowStatistics) -> Any:
            return formula(s) if labels is None else formula(s, y)

        return self.score_members(averaged, labels, entropy=entropy, floor=floor, validate=validate)

    def score_members(
        self,
        formula: Formula,
        labels: Any = None,
        *,
        entropy: bool = False,
        floor: float | None = None,
        validate: bool = True,
    ) -> Any:
        """Like :meth:`score`, with ``formula(models, y, s)``: the list of the M models' rows, their
        labels (None without), and the statistics of their average."""
        out = _empty(self.xp, self.models[0], len(self))

        def work(part: slice) -> None:
            models = [model[part] for model in self.models]
            y = None if labels is None else labels[part]
            with np.errstate(all="ignore"):
                s = self.statistics(_average(self.xp, models), entropy, floor)
                sound = self._sound(models, s, part.start, validate)
                if y is not None:
                    sound = sound & (y >= 0)
                    y = y.clip(0)  # any class: the row's score is not kept
                out[part] = self.xp.where(sound, formula(models, y, s), np.nan)

        self._run(work)
        return out

    def walk(self, work: Callable[[Any, RowStatistics, Any, slice], None], validate: bool) -> None:
        """Call ``work(q, statistics, sound, part)`` for every piece, in order, with its averaged
        rows and (n,) bool, which of them are valid. For what needs sums over all rows."""
        for part in self.parts():
            models = [model[part] for model in self.models]
            with np.errstate(all="ignore"):
                q = _average(self.xp, models)
                s = self.statistics(q)
                work(q, s, self._sound(models, s, part.start, validate), part)

    def statistics(
        self, q: Any, entropy: bool = False, floor: float | None = None
    ) -> RowStatistics:
        """Of a piece of rows of this kind."""
        if self.xp is np:
            return NumpyStatistics(q, entropy, floor)
        return TorchStatistics(q, entropy, floor)

    def parts(self) -> Iterator[slice]:
        """The rows, piece by piece."""
        on_device = self.xp is not np and self.models[0].device.type != "cpu"
        step = max(1, (DEVICE_PIECE_BYTES if on_device else PIECE_BYTES) // (8 * self.classes))
        for begin in range(0, len(self), step):
            yield slice(begin, min(begin + step, len(self)))

    def _run(self, work: Callable[[slice], None]) -> None:
        """``work`` for every piece; on several threads for NumPy, which lets go of the lock."""
        parts = list(self.parts())
        threads = min(num_threads(), len(parts)) if self.xp is np else 1
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(work, parts):
                    pass  # in order: the first bad row is the one that is reported
            return
        for part in parts:
            work(part)

    def _sound(self, models: list[Any], s: RowStatistics, begin: int, validate: bool) -> Any:
        """(n,) bool: the valid rows of a piece, statistics ``s`` of their average.

        Raises:
            ValueError: with ``validate``, naming the first row that is none.
        """
        sound = self.xp.isfinite(s.total)
        if self.name != "logits":
            sound = sound & (s.lowest >= 0)
            if len(models) > 1:  # an average may hide it
                for model in models:
                    if bool((model < 0).any()):
                        sound = sound & ~(model < 0).any(1)
            if validate:
                sound = sound & (abs(s.total - 1.0) <= sum_tolerance(models[0].dtype))
        if validate and not bool(sound.all()):
            row = int(np.flatnonzero(~host(sound))[0])
            raise ValueError(self._complaint(models, row, begin))
        return sound

    def _complaint(self, models: list[Any], row: int, begin: int) -> str:
        """One line on the bad ``row`` of a piece that begins at row ``begin``."""
        logits = self.name == "logits"
        wanted = "finite" if logits else "finite and not negative"
        rows = [host(self.exact(model[row])) for model in models]
        for i, values in enumerate(rows):
            bad = ~np.isfinite(values) if logits else ~(np.isfinite(values) & (values >= 0))
            if bad.any():
                label = f"{self.name}[{i}]" if len(rows) > 1 else self.name
                c = int(bad.argmax())
                return (
                    f"{self.where}: {label} must be {wanted}, "
                    f"got {values[c]} at row {begin + row}, class {c}"
                )
        total = float(np.mean(rows, axis=0).sum())
        label = f"the average of {len(rows)} {self.name}" if len(rows) > 1 else self.name
        return (
            f"{self.where}: rows of {label} must sum to 1 within "
            f"{sum_tolerance(models[0].dtype):g}, got {total:.7g} at row {begin + row}"
        )


def check_labels(
    where: str, name: str, labels: Any, rows: int, like: Any, classes: int | None = None
) -> Any:
    """``labels`` as (rows,) int64 of the kind and on the device of ``like``.

    Args:
        where, name: the function and argument to name in errors.
        labels: integers from -1 (no label) to ``classes`` - 1.
        rows: how many there must be.
        like: array or tensor.
        classes: k; None if any class number is fine.

    Raises:
        TypeError: no integers, or tensors beside NumPy arrays. ValueError: wrong shape or label.
    """
    xp = _namespace(like)
    if xp is np:
        if _namespace(labels) is not np:
            raise TypeError(f"{where}: {name} must be a NumPy array, got a torch tensor")
        labels = np.asarray(labels)
        integers = labels.dtype.kind in "iu" or labels.size == 0
    else:
        if labels is None:
            raise TypeError(f"{where}: {name} must be integers, got None")
        labels = xp.as_tensor(labels, device=like.device)
        integers = not (labels.is_floating_point() or labels.is_complex())
        integers = integers and labels.dtype != xp.bool
    if not integers or labels.ndim == 0:
        came = "None" if labels.dtype == object and labels.ndim == 0 else labels.dtype
        raise TypeError(f"{where}: {name} must be (N,) integers, got {came}")
    if _shape(labels) != (rows,):
        raise ValueError(f"{where}: {name} must have shape ({rows},), got {_shape(labels)}")
    labels = _cast(xp, labels, "int64")
    outside = labels < -1
    if classes is not None:
        outside = outside | (labels >= classes)
    if bool(outside.any()):
        row = int(np.flatnonzero(host(outside))[0])
        upper = "any class" if classes is None else str(classes - 1)
        raise ValueError(
            f"{where}: {name} must be from -1 (no label) to {upper}, "
            f"got {int(labels[row])} at row {row}"
        )
    return labels


def require_integer(where: str, name: str, value: Any, low: int) -> int:
    """``value``, once it is known to be an integer of at least ``low``."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
    if value < low:
        raise ValueError(f"{where}: {name} must be at least {low}, got {value}")
    return int(value)


def require_number(where: str, name: str, value: Any, low: float, high: float) -> float:
    """``value``, once it is known to be a number from ``low`` to ``high``."""
    number = isinstance(value, (int, float, np.integer, np.floating))
    if not number or isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{where}: {name} must be from {low:g} to {high:g}, got {value}")
    return float(value)


def as_kind(array: Any, scores: np.ndarray) -> Any:
    """NumPy ``scores`` as the kind and on the device of ``array``."""
    xp = _namespace(array)
    return scores if xp is np else xp.as_tensor(scores, device=array.device)


def _average(xp: Any, models: list[Any]) -> Any:
    """The averaged rows, as ``reference.average`` defines them: one model as it is, several
    summed in float32 in their order and divided by their number."""
    if len(models) == 1:
        return models[0]
    total = _cast(xp, models[0], "float32")
    for model in models[1:]:
        total = total + _cast(xp, model, "float32")
    return total / np.float32(len(models)) if xp is np else total / float(len(models))


def _cast(xp: Any, array: Any, dtype: str) -> Any:
    return array.astype(dtype, copy=False) if xp is np else array.to(getattr(xp, dtype))


def _empty(xp: Any, like: Any, rows: int) -> Any:
    return np.empty(rows, np.float32) if xp is np else like.new_empty(rows, dtype=xp.float32)


def host(array: Any) -> np.ndarray:
    """An array or tensor as a NumPy array."""
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()


def dtype_name(array: Any) -> str:
    """ "float32", of an array or a tensor."""
    return str(array.dtype).removeprefix("torch.")


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)
