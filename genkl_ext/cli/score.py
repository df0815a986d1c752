"""``genkl score``: prediction files in, a table of NC scores out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import rule as rules
from ..ranks import join
from ..rule import GenKL
from ..scoring.files import FileScores, Plan, plan, score_files
from ..scoring.sources import open_shards
from ..unfinished import Unfinished
from . import UsageError
from .progress import Progress

_NEEDED = ("alpha", "beta", "sigma")  # have neither a preset nor a default
_SAMPLE = 1 << 20  # rows that the quantiles are of, at most
_PIECE = 1 << 16
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
    inputs: list[str],
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
    key_column: str | None = None,
    nc_list: Path | None = None,
    on_bad_row: Literal["raise", "nan", "skip"] = "raise",
    bad_rows: Path | None = None,
    no_validate: bool = False,
    one_model: bool = False,
    column: list[str] = [],  # noqa: B006 (never changed)
    raw: Literal["float16", "bfloat16", "float32", "float64"] | None = None,
    begin_anew: bool = False,
    device: str = "cpu",
    explain: bool = False,
) -> None:
    """Score how little each row of prediction files conforms to any one class.

    The rule is a preset, or --alpha, --beta and --sigma; single settings given with a preset
    replace its own. A row is non-conforming (NC) when its critical alpha is at least alpha.

    Inputs are .npy, .npz, .safetensors, .parquet, .arrow, .zarr, .bin or .raw files of (N, k)
    numbers, local or as URLs; a folder or a quoted pattern ('p0-*.npy') is the shards of one model.
    A long job that was stopped goes on when the same command is started again. Under torchrun the
    processes share the rows.

    Args:
        inputs: the predictions; several are the models of one ensemble, and are averaged
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
        key_column: column of the input tables that holds the keys, in place of --keys
        nc_list: text file to write the keys of the NC rows to; needs --keys or --key-column
        on_bad_row: what a row does that is no valid prediction: end the job, be in the table
            without a score, or not be in it
        bad_rows: text file to write the rows to that are none: number, and key where there are keys
        no_validate: do not check that rows are finite, not negative and sum to 1
        one_model: several inputs are the shards of one model, in this order
        column: array, tensor or column of the files that holds the predictions; or the k columns
        raw: type of the numbers in .bin and .raw files
        begin_anew: throw away what an unfinished job on the same table has left, which is otherwise
            continued, or refused if it had other inputs or settings
        device: what scores: cpu; cuda, under torchrun a GPU for each process; or cuda:1
        explain: print what would be done, and an estimate of time and memory; write nothing

    Example:
        genkl score p0.npy p1.npy --preset clothing1m --seed 0 -o scores.parquet
        genkl score logits.npy --logits --alpha 1.05 --beta 0.03 --sigma 0.05 -o scores.csv
        genkl score probs/ --column probs --preset webvision --on-bad-row nan -o scores.parquet
        genkl score p.npy --preset food101n --keys keys.txt --nc-list nc_set.txt -o scores.parquet
    """
    if keys is not None and key_column is not None:
        raise UsageError("--keys and --key-column must not be given together")
    if nc_list is not None and keys is None and key_column is None:
        raise UsageError("--nc-list needs --keys or --key-column")
    settings = {
        "num_classes": num_classes,
        "alpha": alpha,
        "beta": beta,
        "sigma": sigma,
        "num_vectors": num_vectors,
        "seed": seed,
    }
    array = column[0] if len(column) == 1 else column or None
    given = {k: v for k, v in settings.items() if v is not None}
    if raw is not None and preset is None and num_classes is None:
        raise UsageError("--raw needs --num-classes, or --preset")
    rule = _rule(preset, given, inputs, one_model, array)
    reading: Any = {"logits": logits, "one_model": one_model, "column": array, "raw": raw}
    ranks = join("cpu")
    if explain:
        if ranks.first:
            print(describe(plan(inputs, rule, device=device, ranks=ranks, **reading), out))
        return
    start = time.perf_counter()
    with Progress("scoring", "rows") as progress:
        result = score_files(
            inputs,
            rule,
            out,
            keys=keys,
            key_column=key_column,
            nc_list=nc_list,
            validate=not no_validate,
            on_bad_row=on_bad_row,
            bad_rows=bad_rows,
            begin_anew=begin_anew,
            device=device,
            ranks=ranks,
            progress=progress if ranks.first else None,
            **reading,
        )
    if ranks.first:
        print(summary(result, time.perf_counter() - start))


def describe(what: Plan, out: Path) -> str:
    """A plan, for one screen."""
    of_models = f", {what.models} models averaged" if what.models > 1 else ""
    lines = [
        ("to score", f"{what.rows:,} rows of {what.num_classes} classes{of_models}"),
        ("inputs", f"{what.files:,} files, {what.dtype}, {what.input_bytes / 1e9:.3g} GB"),
        ("chunks", f"{what.chunks:,} of {what.chunk_rows:,} rows"),
        (
            "on",
            f"{what.processes} process(es), "
            + (
                f"{rules.num_threads()} threads each, {_native_simd()}"
                if what.device == "cpu"
                else what.device
            ),
        ),
        ("memory", f"about {max(1, what.memory_bytes / 1e6):,.0f} MB, and the program's own"),
        *(
            [("unfinished", "an earlier job has left work, which is continued if it was this one")]
            if Unfinished.left(out)
            else []
        ),
        ("if stopped", "goes on from the last chunk" if what.resumable else "begins anew: short"),
        ("time", f"about {what.seconds:.3g} s to read and score, as the first chunk went"),
        ("table", f"{out}, {what.output_bytes / 1e9:.3g} GB before encoding"),
    ]
    return "\n".join(f"{name:<16}{text}" for name, text in lines)


def _native_simd() -> str:
    from .. import _native

    return str(_native.build_info()["simd"])


def _rule(
    preset: str | None, settings: dict[str, Any], inputs: list[str], one_model: bool, column: Any
) -> GenKL:
    if preset is not None:
        return GenKL.preset(preset, **settings)
    missing = [f"--{name}" for name in _NEEDED if name not in settings]
    if missing:
        raise UsageError(f"without --preset, {', '.join(missing)} must be given")
    if "num_classes" not in settings:
        first = inputs if one_model else inputs[:1]
        with open_shards(first, column=column) as predictions:
            settings["num_classes"] = predictions.shape[1]
    return GenKL(**settings)


def summary(result: FileScores, seconds: float) -> str:
    """What was found and how fast, for one screen."""
    rows, classes, models = result.rows, result.rule.num_classes, result.models
    of_models = f", {models} models averaged" if models > 1 else ""
    share = f" ({100 * result.nc_count / rows:.3g} %)" if rows else ""
    anew = (rows - result.resumed) / max(1, rows)
    rate = anew / max(result.scoring_seconds, 1e-9)
    every = -(-rows // _SAMPLE) or 1
    column = result.column("critical_alpha")
    pieces = [column[i : i + every * _PIECE : every] for i in range(0, rows, every * _PIECE)]
    names, values = _quantiles(np.concatenate(pieces) if pieces else np.empty(0))
    lines = [
        ("scored", f"{rows:,} rows of {classes} classes{of_models}"),
        ("non-conforming", f"{result.nc_count:,} rows{share} at alpha = {result.rule.alpha:g}"),
        ("critical alpha", names + (f"  (of 1 row in {every})" if every > 1 else "")),
        ("", values),
        (
            "speed",
            f"{rows * rate:,.0f} rows/s, {result.input_bytes * rate / 1e9:.3g} GB/s, "
            f"{rules.num_threads()} threads, {_native_simd()}",
        ),
        (
            "time",
            f"{seconds:.2f} s: the pass {result.scoring_seconds:.2f} s, "
            f"completing the output {result.finishing_seconds:.2f} s",
        ),
        ("table", str(result.out)),
    ]
    if result.bad_count:
        lines.insert(1, ("no prediction", f"{result.bad_count:,} rows"))
    if result.resumed:
        lines.insert(1, ("scored before", f"{result.resumed:,} rows"))
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
