"""``genkl score``: prediction files in, a table of NC scores out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import rule as rules
from ..rule import GenKL
from ..scoring.files import FileScores, score_files
from ..scoring.sources import open_source
from . import UsageError
from .progress import Progress

_NEEDED = ("alpha", "beta", "sigma")  # have neither a preset nor a default
_QUANTILES = (
    (0.0, "least"),
    (0.05, "5 %"),
    (0.25, "25 %"),
    (0.5, "median"),
    (0.75, "75 %"),
    (0.95, "95 %"),
    (1.0, "largest"),
)


def score(
    inputs: list[Path],
    *,
    out: Path,
    preset: Literal["clothing1m", "food101n", "webvision"] | None = None,
    num_classes: int | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    sigma: float | None = None,
    num_vectors: int | None = None,
    seed: int | None = None,
    logits: bool = False,
    keys: Path | None = None,
    nc_list: Path | None = None,
    no_validate: bool = False,
) -> None:
    """Score how little each row of prediction files conforms to any one class.

    The rule is a preset, or --alpha, --beta and --sigma; single settings given with a preset
    replace its own. A row is non-conforming (NC) when its critical alpha is at least alpha.

    Args:
        inputs: .npy files of shape (N, k), float16, float32 or float64; several are the models
            of one ensemble, and are averaged
        out: table to write; .parquet, .csv or .npy
        preset: published settings
        num_classes: k; by default that of the preset or of the files
        alpha: scale of the entropy part; larger flags fewer rows
        beta: entries below 1/k - beta do not count; larger flags more rows
        sigma: standard deviation of the uniform-like vectors around 1/k
        num_vectors: number of uniform-like vectors; by default 20
        seed: seed of the uniform-like vectors; by default the preset's or 0
        logits: the files hold logits, not probabilities
        keys: text file with one key per row, for a key column
        nc_list: text file to write the keys of the NC rows to; needs --keys
        no_validate: do not check that rows are finite, not negative and sum to 1

    Example:
        genkl score p0.npy p1.npy --preset clothing1m --seed 0 -o scores.parquet
        genkl score logits.npy --logits --alpha 1.05 --beta 0.03 --sigma 0.05 -o scores.csv
        genkl score p.npy --preset food101n --keys keys.txt --nc-list nc_set.txt -o scores.parquet
    """
    if nc_list is not None and keys is None:
        raise UsageError("--nc-list needs --keys")
    settings = {
        "num_classes": num_classes,
        "alpha": alpha,
        "beta": beta,
        "sigma": sigma,
        "num_vectors": num_vectors,
        "seed": seed,
    }
    rule = _rule(preset, {k: v for k, v in settings.items() if v is not None}, inputs[0])
    start = time.perf_counter()
    with Progress("scoring", "rows") as progress:
        result = score_files(
            inputs,
            rule,
            out,
            keys=keys,
            nc_list=nc_list,
            logits=logits,
            validate=not no_validate,
            progress=progress,
        )
    print(summary(result, time.perf_counter() - start))


def _rule(preset: str | None, settings: dict[str, Any], first_input: Path) -> GenKL:
    if preset is not None:
        return GenKL.preset(preset, **settings)
    missing = [f"--{name}" for name in _NEEDED if name not in settings]
    if missing:
        raise UsageError(f"without --preset, {', '.join(missing)} must be given")
    if "num_classes" not in settings:
        with open_source(first_input) as predictions:
            settings["num_classes"] = predictions.shape[1]
    return GenKL(**settings)


def summary(result: FileScores, seconds: float) -> str:
    """What was found and how fast, for one screen."""
    from .. import _native

    rows, classes, models = result.rows, result.rule.num_classes, result.models
    scores = result.scores
    of_models = f", {models} models averaged" if models > 1 else ""
    share = f" ({100 * result.nc_count / rows:.3g} %)" if rows else ""
    rate = 1 / max(result.scoring_seconds, 1e-9)
    names, values = _quantiles(scores.critical_alpha)
    lines = [
        ("scored", f"{rows:,} rows of {classes} classes{of_models}"),
        ("non-conforming", f"{result.nc_count:,} rows{share} at alpha = {scores.rule.alpha:g}"),
        ("critical alpha", names),
        ("", values),
        (
            "speed",
            f"{rows * rate:,.0f} rows/s, {result.input_bytes * rate / 1e9:.3g} GB/s, "
            f"{rules.num_threads()} threads, {_native.build_info()['simd']}",
        ),
        (
            "time",
            f"{seconds:.2f} s: the pass {result.scoring_seconds:.2f} s, "
            f"completing the output {result.finishing_seconds:.2f} s",
        ),
        ("table", str(result.out)),
    ]
    if result.nc_list is not None:
        lines.append(("NC keys", str(result.nc_list)))
    return "\n".join(f"{name:<16}{text}" for name, text in lines)


def _quantiles(values: Any) -> tuple[str, str]:
    """A line of names over a line of values."""
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "no row has one", ""
    points = np.quantile(finite, [quantile for quantile, _ in _QUANTILES])
    names = "".join(f"{name:>9}" for _, name in _QUANTILES)
    return names, "".join(f"{point:9.4f}" for point in points)
