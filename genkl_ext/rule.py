"""The GenKL rule: its hyper-parameters, its uniform-like vectors, and ``score``.

    rule = GenKL.preset("clothing1m", seed=0)
    scores = rule.score(predictions)        # (N, k) array or tensor, or a sequence of M of them
    scores.nc                               # (N,) bool: fits no class, or several

NumPy in gives NumPy out and needs no torch; a tensor in gives tensors out on its device and
current stream. The arithmetic is in ``csrc/kernels``, its definition in ``reference.py``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

    from .calibration import Calibration
    from .sweep import Inputs

    Array = NDArray[Any] | torch.Tensor

MAX_MODELS = 64  # csrc/kernels/nc_score.h: kMaxModels

# Command-line defaults of the published programs (reference: GenKL, Tables of hyper-parameters).
_PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "clothing1m": {"num_classes": 14, "alpha": 1.05, "beta": 0.03, "sigma": 0.05},
        "food101n": {"num_classes": 101, "alpha": 1.1, "beta": 0.008, "sigma": 0.0},
        "webvision": {"num_classes": 50, "alpha": 0.9, "beta": 0.015, "sigma": 0.05, "seed": 42},
    }
)


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of N rows; NumPy arrays, or tensors on the device of the predictions.

    A larger ``critical_alpha`` or ``divergence`` means more non-conforming.
    """

    critical_alpha: Array  #: (N,) float32, max_j a_j: the row is NC exactly for alpha up to this
    divergence: Array  #: (N,) float32, max_j D_j in bits
    votes: Array  #: (N,) int32, how many vectors vote NC at ``rule.alpha``
    nc: Array  #: (N,) bool, votes > 0
    top_class: Array  #: (N,) int32, the most probable class; ties take the lowest index
    top_prob: Array  #: (N,) float32, its probability
    rule: GenKL
    _first_bad_row: Any = dataclasses.field(default=-1, repr=False)
    _predictions: tuple[Any, ...] = dataclasses.field(default=(), repr=False)  # weak references
    _logits: bool = dataclasses.field(default=False, repr=False)

    def __len__(self) -> int:
        return len(self.critical_alpha)

    def at(self, alpha: float) -> Array:
        """(N,) bool: which rows are NC at another ``alpha``, without the data.

        Exact at ``rule.alpha``. Elsewhere a row is decided by its float32 critical alpha, which
        lies within ``rule.resolution`` (relative) of the exact one.
        """
        _require_number("at", "alpha", alpha, low=0)
        if alpha == self.rule.alpha:
            return self.nc
        # In float64: beside an array of float32 NumPy would round a Python number to float32.
        critical: Any = self.critical_alpha
        exact: Array = critical.double() if _is_tensor(critical) else critical.astype(np.float64)
        return exact >= alpha

    def check(self) -> Scores:
        """Raise ``ValueError`` if a row of the predictions was invalid; return self.

        For NumPy arrays and CPU tensors ``score`` has already done it. For CUDA tensors this is
        where the host waits for the device; ``cpu()`` and ``numpy()`` call it. The message tells
        what is wrong with the row if the predictions still exist; they are not kept alive for it.
        """
        row = int(self._first_bad_row)
        if row >= 0:
            models = [reference() for reference in self._predictions]
            if any(model is None for model in models):  # the caller has let go of them
                raise ValueError(f"score: row {row} of predictions is no valid prediction")
            raise ValueError(_describe_bad_row(models, row, self._logits))
        return self

    def cpu(self) -> Scores:
        """The same scores as CPU tensors (NumPy arrays are left as they are), after ``check``."""
        self.check()
        return self._map(lambda a: a.cpu() if hasattr(a, "cpu") else a)

    def numpy(self) -> Scores:
        """The same scores as NumPy arrays, after ``check``."""
        self.check()
        return self._map(lambda a: a.cpu().numpy() if hasattr(a, "cpu") else a)

    def hist(
        self, alpha: float | None = None, path: str | os.PathLike[str] | None = None
    ) -> Figure:
        """A matplotlib histogram of the critical alphas, with ``alpha`` (default: the rule's).

        Args:
            alpha: the threshold to draw.
            path: write it, too, as PNG, SVG or PDF.

        Raises:
            ValueError: an alpha that is no number from 0 on, or another suffix.
            OSError: it cannot be written.
        """
        from .report import plots, style

        alpha = self.rule.alpha if alpha is None else alpha
        _require_number("hist", "alpha", alpha, low=0)
        figure = plots.critical_alpha(np.asarray(self.numpy().critical_alpha), alpha)
        if path is not None:
            style.save(figure, path)
        return figure

    def _map(self, convert: Any) -> Scores:
        columns = ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob")
        return Scores(**{name: convert(getattr(self, name)) for name in columns}, rule=self.rule)


@dataclasses.dataclass(frozen=True)
class GenKL:
    """The (alpha, beta)-generalized KL divergence rule with its hyper-parameters.

    Args:
        num_classes: k, the number of classes, at least 2.
        alpha: scale of the entropy part; larger flags fewer rows. At least 0.
        beta: sets the threshold tau = 1/k - beta under which an entry of a prediction does not
            count; larger flags more rows. Must leave tau > 0.
        sigma: standard deviation of the uniform-like vectors around 1/k. At least 0.
        num_vectors: m, the number of uniform-like vectors.
        seed: seed of the uniform-like vectors (NumPy's legacy generator).

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: GenKL (arXiv 2307.09810); published program, non-conforming identification.
    """

    num_classes: int
    alpha: float
    beta: float
    sigma: float
    num_vectors: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        name = "GenKL"
        _require_integer(name, "num_classes", self.num_classes, 2, 1 << 24)
        _require_integer(name, "num_vectors", self.num_vectors, 1, 1 << 16)
        _require_integer(name, "seed", self.seed, 0, 2**32 - 1)
        _require_number(name, "alpha", self.alpha, low=0)
        _require_number(name, "sigma", self.sigma, low=0)
        _require_number(name, "beta", self.beta)
        if not self.tau > 0:
            raise ValueError(
                f"{name}: beta must be below 1/num_classes = {1 / self.num_classes:.6g} "
                f"(so that tau = 1/num_classes - beta > 0), got {self.beta}"
            )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GenKL:
        """The published settings of ``clothing1m``, ``food101n`` or ``webvision``.

        Keyword arguments replace single settings: ``GenKL.preset("clothing1m", seed=2)``.
        """
        try:
            settings = _PRESETS[name]
        except KeyError:
            raise ValueError(
                f"GenKL.preset: name must be one of {', '.join(sorted(_PRESETS))}, got {name!r}"
            ) from None
        return cls(**{**settings, **changes})

    @property
    def tau(self) -> float:
        """1/k - beta: entries of a prediction below it do not count."""
        return 1.0 / self.num_classes - self.beta

    @cached_property
    def vectors(self) -> NDArray[np.float64]:
        """(m, k) float64 uniform-like vectors u_j, read-only, rows summing to 1.

        Drawn from N(1/k, sigma) with NumPy's legacy generator, bit for bit as the published
        program draws them; negative entries become 0.005 and entries above 1 become 1 before the
        rows are normalised.
        """
        k = self.num_classes
        stream = np.random.RandomState(self.seed)
        u = stream.normal(1.0 / k, self.sigma, size=(self.num_vectors, k))
        u[u < 0] = 0.005
        u[u > 1] = 1.0
        u /= u.sum(axis=1, keepdims=True)
        u.setflags(write=False)
        return u

    @cached_property
    def entropies(self) -> NDArray[np.float64]:
        """(m,) float64, sum_i u_ji log2 u_ji = -H(u_j) of every vector, in bits, read-only."""
        from . import _native

        entropies = _native.entropies(self.vectors)
        entropies.setflags(write=False)
        return entropies

    @cached_property
    def _distinct(self) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
        """The distinct vectors, their entropies, and the votes each stands for: when sigma = 0
        all m are equal, and one of them casts m votes."""
        if (self.vectors == self.vectors[0]).all():
            return self.vectors[:1], self.entropies[:1], self.num_vectors
        return self.vectors, self.entropies, 1

    @property
    def resolution(self) -> float:
        """Largest relative error of a stored critical alpha (csrc/kernels/nc_score.h)."""
        return (self.num_classes + 16) * 2.0**-24

    def score(
        self,
        predictions: Array | Sequence[Array],
        *,
        logits: bool = False,
        validate: bool = True,
    ) -> Scores:
        """Score how little each row conforms to any one class; one pass over the input.

        Args:
            predictions: (N, k) probabilities, NumPy array or torch tensor, float32, float16,
                bfloat16 (tensors) or float64, any strides; or a sequence of M of them, one per
                model, which are averaged in float32 in the given order.
            logits: the predictions are logits; their softmax is taken in the same pass.
            validate: check, in the same pass, that every row is finite, not negative and sums to
                1 within 1e-3 (float16 and bfloat16: 2e-2). For CUDA tensors the check is read
                later, by ``Scores.check()``, ``cpu()`` or ``numpy()``, so that ``score`` never
                waits for the device. With False, a row with NaN scores NaN and is not NC.

        Returns:
            Scores, arrays of the kind and on the device of the input.

        Raises:
            TypeError: wrong kind or dtype. ValueError: wrong shape, or the first bad row.
        """
        models = list(predictions) if isinstance(predictions, (list, tuple)) else [predictions]
        scores = self._score(models, logits=logits, validate=validate)
        first: Any = models[0]
        if _is_tensor(first) and first.device.type != "cpu":
            return scores
        scores.check()
        return dataclasses.replace(scores, _first_bad_row=-1, _predictions=())

    def calibrate(
        self, clean: Inputs, *, false_positives: float = 0.05, **options: Any
    ) -> Calibration:
        """Choose alpha, and beta if ``betas`` are given, on verified clean rows.

        Args:
            clean: predictions of rows that are known to conform and were not trained on.
            false_positives: largest share of them that the new rule may flag.
            options: ``betas`` to choose from, ``by`` what, ``noisy`` predictions ...;
                :func:`genkl_ext.calibration.calibrate` says all.

        Returns:
            Calibration: ``.rule``, with the share it flags, its confidence interval, and the table
            that it was chosen from.

        Raises:
            TypeError, ValueError: see there.
        """
        from .calibration import calibrate

        return calibrate(self, clean, false_positives=false_positives, **options)

    def _score(self, models: list[Any], *, logits: bool, validate: bool) -> Scores:
        """``score`` of a list, with a bad row noted in the result but not yet raised."""
        kind = _check_models(models, self.num_classes)
        outputs: tuple[Any, ...]
        if kind == "torch":
            from . import ops

            vectors, entropies, ballot = self._distinct_on(models[0].device)
            outputs = ops.nc_score(
                models, vectors, entropies, self.alpha, self.tau, ballot=ballot, logits=logits
            )
        else:
            from . import _native

            outputs = _native.nc_score(
                models,
                *self._distinct[:2],
                self.alpha,
                self.tau,
                self._distinct[2],
                logits,
                num_threads(),
            )
        critical_alpha, divergence, votes, top_class, top_prob, first_bad_row = outputs
        return Scores(
            critical_alpha=critical_alpha,
            divergence=divergence,
            votes=votes,
            nc=votes > 0,
            top_class=top_class,
            top_prob=top_prob,
            rule=self,
            _first_bad_row=first_bad_row if validate else -1,
            _predictions=tuple(map(weakref.ref, models)),
            _logits=logits,
        )

    def _distinct_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int]:
        """``_distinct`` as tensors on the device; copied there once."""
        cache = self.__dict__.setdefault("_on_device", {})
        if device not in cache:
            import torch

            vectors, entropies, ballot = self._distinct
            cache[device] = (
                torch.tensor(vectors, device=device),
                torch.tensor(entropies, device=device),
                ballot,
            )
        return cache[device]

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


def num_threads() -> int:
    """Threads that scoring of NumPy arrays uses: torch's setting if torch is loaded, else
    ``OMP_NUM_THREADS``, else the processors this process may run on."""
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "get_num_threads"):
        return int(torch.get_num_threads())
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    return processors()


def processors() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sum_tolerance(dtype: Any) -> float:
    """How far from 1 a row of probabilities of this dtype may sum."""
    return 2e-2 if str(dtype).removeprefix("torch.") in ("float16", "bfloat16") else 1e-3


_NUMPY_DTYPES = ("float32", "float16", "float64")
_TORCH_DTYPES = ("torch.float32", "torch.float16", "torch.bfloat16", "torch.float64")


def _is_tensor(array: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _check_models(models: list[Any], num_classes: int) -> str:
    """``"torch"`` or ``"numpy"``, once every model is an (N, k) floating array like the first."""
    if not 1 <= len(models) <= MAX_MODELS:
        raise ValueError(
            f"score: predictions must be 1 to {MAX_MODELS} arrays, got a sequence of {len(models)}"
        )
    kind = "torch" if _is_tensor(models[0]) else "numpy"
    allowed = _TORCH_DTYPES if kind == "torch" else _NUMPY_DTYPES
    for i, model in enumerate(models):
        name = "predictions" if len(models) == 1 else f"predictions[{i}]"
        if not (_is_tensor(model) if kind == "torch" else isinstance(model, np.ndarray)):
            wanted = "a torch tensor like predictions[0]" if kind == "torch" else "a NumPy array"
            hint = " (or torch tensor)" if i == 0 else ""
            raise TypeError(f"score: {name} must be {wanted}{hint}, got {type(model).__name__}")
        if str(model.dtype) not in allowed:
            raise TypeError(f"score: {name} must be {', '.join(allowed)}, got {model.dtype}")
        if model.ndim != 2 or model.shape[1] != num_classes:
            raise ValueError(
                f"score: {name} must have shape (N, {num_classes}), got {tuple(model.shape)}"
            )
        first = models[0]
        if model.shape != first.shape or model.dtype != first.dtype:
            raise ValueError(
                f"score: {name} must be like predictions[0], {tuple(first.shape)} {first.dtype}, "
                f"got {tuple(model.shape)} {model.dtype}"
            )
        if kind == "torch" and model.device != first.device:
            raise ValueError(
                f"score: {name} must be on {first.device} like predictions[0], got {model.device}"
            )
    return kind


def _describe_bad_row(
    models: list[Any],
    row: int,
    logits: bool,
    names: Sequence[str] | None = None,
    first_row: int = 0,
) -> str:
    """One line that says what is wrong with ``row``: which model, which class, which value.

    For a piece of something larger, ``names`` are the models' names there and ``first_row`` is
    the number that row 0 has there.
    """
    rows = [
        (m[row].detach().double().cpu().numpy() if _is_tensor(m) else m[row].astype(np.float64))
        for m in models
    ]
    if names is None:
        many = len(rows) > 1
        names = [f"predictions[{i}]" for i in range(len(rows))] if many else ["predictions"]
    at = first_row + row
    wanted = "finite" if logits else "finite and not negative"
    for name, values in zip(names, rows, strict=True):
        bad = ~np.isfinite(values) if logits else ~(np.isfinite(values) & (values >= 0))
        if bad.any():
            c = int(bad.argmax())
            return f"score: {name} must be {wanted}, got {values[c]} at row {at}, class {c}"
    tolerance = sum_tolerance(models[0].dtype)
    average = names[0] if len(rows) == 1 else f"the average of {len(rows)} models"
    total = math.fsum(np.mean(rows, axis=0))
    hint = "; pass logits=True for logits" if abs(total - 1) > 0.5 else ""
    return (
        f"score: rows of {average} must sum to 1 within {tolerance:g}, "
        f"got {total:.7g} at row {at}{hint}"
    )


def _require_integer(where: str, name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{where}: {name} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{where}: {name} must be from {low} to {high}, got {value}")


def _require_number(where: str, name: str, value: Any, low: float = -math.inf) -> None:
    wanted = "a finite number" if low == -math.inf else f"a finite number >= {low:g}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(
        value, (int, float, np.integer, np.floating)
    ):
        raise TypeError(f"{where}: {name} must be {wanted}, got {value!r}")
    if not (math.isfinite(value) and value >= low):
        raise ValueError(f"{where}: {name} must be {wanted}, got {value!r}")
