"""``genkl sweep``: what other alphas, betas, sigmas, vectors and seeds would flag."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import UsageError
from .calibrate import load, start_rule
from .progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..rule import GenKL
    from ..sweep import Sweep


def sweep(
    inputs: list[Path],
    *,
    preset: Literal["clothing1m", "food101n", "webvision"] | None = None,
    num_classes: int | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    sigma: float | None = None,
    num_vectors: int | None = None,
    seed: int | None = None,
    betas: list[float] = [],  # noqa: B006 (never changed)
    sigmas: list[float] = [],  # noqa: B006
    vectors: list[int] = [],  # noqa: B006
    seeds: list[int] = [],  # noqa: B006
    alphas: list[float] = [],  # noqa: B006
    truth: Path | None = None,
    verified: Path | None = None,
    keys: Path | None = None,
    clean: list[Path] = [],  # noqa: B006
    logits: bool = False,
    plot: Path | None = None,
    json: Path | None = None,
    quality: Literal["f1", "precision", "recall", "balanced_accuracy"] | None = None,
    no_validate: bool = False,
) -> None:
    """Count what many rules flag at every alpha, in one read of the predictions.

    All combinations of --betas, --sigmas, --vectors and --seeds are tried; what is not among them
    is that of the preset or of --beta, --sigma, --num-vectors and --seed. Tables of scores that
    genkl score wrote can be given instead of predictions: each is then a rule of its own.

    Args:
        inputs: .npy files of shape (N, k), which are averaged; or .parquet tables of scores of
            the same rows
        preset: published settings
        num_classes: k; by default that of the preset or of the files
        alpha: where the printed table looks; by default the preset's or 1
        beta: of all rules, without --betas; by default the preset's or 0.42 / k
        sigma: of all rules, without --sigmas; by default the preset's or 0.7 / k
        num_vectors: of all rules, without --vectors; by default 20
        seed: of all rules, without --seeds; by default the preset's or 0
        betas: to try
        sigmas: to try
        vectors: numbers of uniform-like vectors to try
        seeds: to try; says how much the NC set depends on them
        alphas: where to count; by default 0 to 2 in steps of 0.01
        truth: which rows are NC and which are not, a .npy file of N booleans
        verified: text file with keys of rows seen to be NC, as NC_instances.txt; nothing is known
            of the others, so there is nothing but recall. Needs --keys
        keys: text file with one key per row, for --verified
        clean: predictions (or tables of scores) of verified rows, for the share of them flagged
        logits: the files hold logits, not probabilities
        plot: figure to write; .png, .svg or .pdf
        json: file to write all counts to
        quality: what the figure's map of agreement with the truth shows; by default f1, and with
            --verified recall
        no_validate: do not check that rows are finite, not negative and sum to 1

    Example:
        genkl sweep p0.npy p1.npy --preset clothing1m --betas 0.01 0.03 0.05 --plot sweep.png
        genkl sweep p.npy --preset clothing1m --seeds 0 1 2 --clean val.npy --json sweep.json
        genkl sweep scores.parquet --keys keys.txt --verified NC_instances.txt
    """
    from .. import sweep as sweeps
    from ..files import atomic_write, require_writable

    if plot is not None:
        from ..report.style import FORMATS

        if plot.suffix.lower() not in FORMATS:
            raise UsageError(f"--plot must end in {', '.join(FORMATS)}, got {str(plot)!r}")
    if truth is not None and verified is not None:
        raise UsageError("--truth and --verified cannot both be given")
    if truth is not None and truth.suffix != ".npy":
        raise UsageError(
            f"--truth must be a .npy file that tells of every row, got {truth}; for a list of "
            "keys, which tells of these rows only, there is --verified"
        )
    if verified is not None and keys is None:
        raise UsageError("--verified needs --keys")
    if verified is not None and quality not in (None, "recall"):
        raise UsageError(
            f"--quality {quality} needs --truth: --verified says nothing of other rows"
        )
    for out in (plot, json):
        if out is not None:
            require_writable(out)
    tables = [path.suffix == ".parquet" for path in [*inputs, *clean]]
    if any(tables) and not all(tables):
        raise UsageError("inputs and --clean must be all predictions or all tables of scores")
    options: dict[str, Any] = {"alphas": alphas or None}
    if all(tables):
        fixed = {
            "preset": preset,
            "num-classes": num_classes,
            "beta": beta,
            "sigma": sigma,
            "num-vectors": num_vectors,
            "seed": seed,
            "betas": betas or None,
            "sigmas": sigmas or None,
            "vectors": vectors or None,
            "seeds": seeds or None,
            "logits": logits or None,
        }
        for name, value in fixed.items():
            if value is not None:
                raise UsageError(f"tables of scores have their rules; --{name} needs predictions")
        rules, critical = _read_tables(inputs)
        if clean:
            clean_rules, options["clean"] = _read_tables(clean)
            if clean_rules != rules:
                raise ValueError("--clean must be scored with the rules of the inputs")
        if alpha is not None:
            rules = [dataclasses.replace(rule, alpha=alpha) for rule in rules]
        options |= _known(truth, verified, keys, critical.shape[1])
        found = sweeps.from_critical_alphas(critical, rules, **options)
    else:
        given = {
            "num_classes": num_classes,
            "alpha": alpha,
            "beta": betas[0] if betas else beta,
            "sigma": sigmas[0] if sigmas else sigma,
            "num_vectors": num_vectors,
            "seed": seed,
        }
        rule = start_rule(preset, {k: v for k, v in given.items() if v is not None}, inputs[0])
        grid = sweeps.grid(rule, betas=betas, sigmas=sigmas, num_vectors=vectors, seeds=seeds)
        options |= _known(truth, verified, keys, _rows(inputs[0]))
        with Progress("scoring", "rows") as progress:
            found = sweeps.sweep(
                inputs,
                grid,
                clean=clean or None,
                logits=logits,
                validate=not no_validate,
                progress=progress,
                **options,
            )
    left_out = f", {found.left_out:,} without prediction left out" if found.left_out else ""
    print(f"{found.rows:,} rows, rules: {len(found.rules)}{left_out}")
    print(found.table())
    if found.auroc is not None:
        print("best F1 is that of the best alpha for these very rows: on others it will be less")
    if json is not None:
        with atomic_write(json) as temporary:
            temporary.write_text(found.to_json(), encoding="utf-8")
        print(f"counts  {json}")
    if plot is not None:
        from ..report import style
        from ..report import sweeps as figures

        style.save(figures.overview(found, quality or _usual_quality(found)), plot)
        print(f"figure  {plot}")


def _rows(path: Path) -> int:
    from ..scoring.sources import open_source

    with open_source(path) as predictions:
        return predictions.shape[0]


def _read_tables(paths: list[Path]) -> tuple[list[GenKL], NDArray[np.float32]]:
    """The rules of tables of scores, and (R, N) critical alphas."""
    import pyarrow.parquet as pq

    from ..rule import GenKL
    from ..scoring import read_settings

    rules, columns = [], []
    for path in paths:
        rules.append(GenKL(**read_settings(path)["rule"]))
        columns.append(np.asarray(pq.read_table(path, columns=["critical_alpha"]).column(0)))
        if len(columns[-1]) != len(columns[0]):
            raise ValueError(
                f"{path} must have {len(columns[0])} rows like {paths[0]}, got {len(columns[-1])}"
            )
    return rules, np.stack(columns)


def _usual_quality(found: Sweep) -> str:
    return "recall" if found.positives_only else "f1"


def _known(
    truth: Path | None, verified: Path | None, keys: Path | None, rows: int
) -> dict[str, NDArray[np.bool_]]:
    """What is known of the rows, as an option of the function: (N,) bool."""
    if truth is not None:
        values = load(truth)
        if values.shape != (rows,) or values.dtype.kind not in "biuf":
            raise ValueError(
                f"{truth} must have a boolean for each of {rows} rows, "
                f"got {values.shape} {values.dtype}"
            )
        wrong = ~np.isin(values, [0, 1])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{truth} must be 0 or 1 everywhere, got {values[row]} in row {row}")
        return {"truth": values.astype(bool)}
    if verified is None or keys is None:
        return {}
    import pyarrow as pa

    from ..evaluation import read_verified
    from ..scoring.keys import Keys
    from .evaluate_nc import manifest_of_keys

    manifest = manifest_of_keys(pa.array(Keys(keys, rows).slice(0, rows), pa.string()))
    listed = read_verified(verified, manifest)
    if not listed.any():
        raise ValueError(f"{verified} must list a key of {keys} at least, got none")
    return {"verified": listed}
