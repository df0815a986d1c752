"""``genkl sweep``: what other alphas, betas, sigmas, vectors and seeds would flag."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import UsageError
from .calibrate import start_rule
from .progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..rule import GenKL


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
    keys: Path | None = None,
    clean: list[Path] = [],  # noqa: B006
    logits: bool = False,
    plot: Path | None = None,
    json: Path | None = None,
    quality: Literal["f1", "precision", "recall", "balanced_accuracy"] = "f1",
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
        truth: which rows are NC, a .npy file of N booleans; or a text file with the keys of
            these rows, with --keys
        keys: text file with one key per row
        clean: predictions (or tables of scores) of verified rows, for the share of them flagged
        logits: the files hold logits, not probabilities
        plot: figure to write; .png, .svg or .pdf
        json: file to write all counts to
        quality: what the figure's map of agreement with the truth shows
        no_validate: do not check that rows are finite, not negative and sum to 1

    Example:
        genkl sweep p0.npy p1.npy --preset clothing1m --betas 0.01 0.03 0.05 --plot sweep.png
        genkl sweep p.npy --preset clothing1m --seeds 0 1 2 --clean val.npy --json sweep.json
        genkl sweep scores.parquet --keys keys.txt --truth nc_keys.txt
    """
    from .. import sweep as sweeps
    from ..files import atomic_write, require_writable

    if plot is not None:
        from ..report.style import FORMATS

        if plot.suffix.lower() not in FORMATS:
            raise UsageError(f"--plot must end in {', '.join(FORMATS)}, got {str(plot)!r}")
    for out in (plot, json):
        if out is not None:
            require_writable(out)
    tables = [path.suffix == ".parquet" for path in [*inputs, *clean]]
    if any(tables) and not all(tables):
        raise UsageError("inputs and --clean must be all predictions or all tables of scores")
    options: dict[str, Any] = {"alphas": alphas or None}
    if all(tables):
        if betas or sigmas or vectors or seeds or preset or beta is not None or sigma is not None:
            raise UsageError("tables of scores have their rules; other ones need predictions")
        rules, critical = _read_tables(inputs)
        if clean:
            clean_rules, options["clean"] = _read_tables(clean)
            if clean_rules != rules:
                raise ValueError("sweep: --clean must be scored with the rules of the inputs")
        options["truth"] = _truth(truth, keys, critical.shape[1])
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
        options["truth"] = _truth(truth, keys, _rows(inputs[0]))
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
    if found.truly_nc is not None:
        print("best F1 is that of the best alpha for these very rows: on others it will be less")
    if json is not None:
        with atomic_write(json) as temporary:
            temporary.write_text(found.to_json(), encoding="utf-8")
        print(f"counts  {json}")
    if plot is not None:
        from ..report import style
        from ..report import sweeps as figures

        style.save(figures.overview(found, quality), plot)
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
                f"sweep: {path} must have {len(columns[0])} rows like {paths[0]}, "
                f"got {len(columns[-1])}"
            )
    return rules, np.stack(columns)


def _truth(path: Path | None, keys: Path | None, rows: int) -> NDArray[np.bool_] | None:
    """(N,) bool of a .npy file, or of a list of keys."""
    if path is None:
        return None
    from ..scoring.sources import require_file

    require_file(path)
    if path.suffix == ".npy":
        truth = np.load(path)
        if truth.shape != (rows,) or not np.isin(truth, [0, 1]).all():
            raise ValueError(
                f"sweep: {path} must have a boolean for each of {rows} rows, "
                f"got {truth.shape} {truth.dtype}"
            )
        return truth.astype(bool)
    if keys is None:
        raise UsageError("--truth with a list of keys needs --keys")
    from ..scoring import read_nc_list
    from ..scoring.keys import Keys

    listed = set(read_nc_list(path))
    every = Keys(keys, rows).slice(0, rows)
    unknown = listed - set(every)
    if unknown:
        raise ValueError(
            f"sweep: {path} must list keys of {keys}, got {len(unknown)} that it has not, "
            f"first {min(unknown)!r}"
        )
    return np.fromiter((key in listed for key in every), bool, rows)
