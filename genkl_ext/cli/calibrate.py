"""``genkl calibrate``: verified clean predictions in, a rule out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from . import UsageError
from .progress import Progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..calibration import Calibration
    from ..rule import GenKL


def calibrate(
    inputs: list[Path],
    *,
    false_positives: float = 0.05,
    preset: Literal["clothing1m", "food101n", "webvision"] | None = None,
    num_classes: int | None = None,
    beta: float | None = None,
    sigma: float | None = None,
    num_vectors: int | None = None,
    seed: int | None = None,
    betas: list[float] = [],  # noqa: B006 (never changed)
    by: Literal["flagged", "accuracy"] = "flagged",
    noisy: list[Path] = [],  # noqa: B006
    features: Path | None = None,
    labels: Path | None = None,
    clean_features: Path | None = None,
    clean_labels: Path | None = None,
    folds: int = 5,
    confidence: float = 0.95,
    logits: bool = False,
    out: Path | None = None,
    json: Path | None = None,
) -> None:
    """Choose alpha so that a rule flags no more than a share of verified clean rows.

    The rows must conform, and must not have been trained on. With --betas, the beta is chosen, too:
    the one that flags most of the --noisy rows, or with --by accuracy the one after which a linear
    head, trained on the noisy rows that are left, is best on the clean ones.

    Args:
        inputs: .npy files of shape (V, k) with the predictions of the clean rows; several are
            averaged
        false_positives: largest share of the clean rows to flag, from 0 to 1
        preset: published settings, of which alpha is replaced
        num_classes: k; by default that of the preset or of the files
        beta: by default the preset's, or Clothing1M's for k classes, 0.42 / k
        sigma: by default the preset's, or Clothing1M's for k classes, 0.7 / k
        num_vectors: number of uniform-like vectors; by default 20
        seed: seed of the uniform-like vectors; by default the preset's or 0
        betas: to choose from; needs --noisy
        by: how to choose a beta
        noisy: predictions of the noisy rows
        features: .npy file of (N, d) features of the noisy rows, for --by accuracy
        labels: .npy file of their (N,) given labels, -1 for none
        clean_features: .npy file of (V, d) features of the clean rows
        clean_labels: .npy file of their (V,) labels
        folds: parts of the clean rows, for --by accuracy
        confidence: of the intervals, all of them together, from 0 to 1
        logits: the files hold logits, not probabilities
        out: YAML file to write the rule to, for genkl score --config
        json: file to write all candidates to

    Example:
        genkl calibrate val0.npy val1.npy --false-positives 0.05 -o rule.yaml
        genkl score p0.npy p1.npy --config rule.yaml -o scores.parquet
        genkl calibrate val.npy --preset clothing1m --betas 0.01 0.03 0.05 --noisy p.npy
    """
    from .. import calibration
    from ..files import atomic_write, require_writable

    for written in (out, json):
        if written is not None:
            require_writable(written)
    if false_positives != 0:
        require_share("false-positives", false_positives)
    require_share("confidence", confidence)
    if betas and not noisy:
        raise UsageError("--betas needs --noisy")
    given = {
        "num_classes": num_classes,
        "beta": betas[0] if betas else beta,
        "sigma": sigma,
        "num_vectors": num_vectors,
        "seed": seed,
    }
    for path in [*inputs, *noisy]:
        _require_no_scores(path)
    rule = start_rule(preset, {k: v for k, v in given.items() if v is not None}, inputs[0])
    arrays = {
        "features": features,
        "labels": labels,
        "clean_features": clean_features,
        "clean_labels": clean_labels,
    }
    with Progress("scoring", "rows") as progress:
        found = calibration.calibrate(
            rule,
            inputs,
            false_positives=false_positives,
            betas=betas or None,
            by=by,
            noisy=noisy or None,
            **{name: None if path is None else load(path) for name, path in arrays.items()},
            folds=folds,
            confidence=confidence,
            logits=logits,
            progress=progress,
        )
    print(found.table())
    low, high = (100 * end for end in found.interval)
    print(
        f"alpha {found.rule.alpha:.6g} flags {found.candidates[found.chosen].flagged} of "
        f"{found.rows:,} clean rows; of all clean images {low:.2g} to {high:.2g} % "
        f"with {100 * confidence:g} % confidence"
    )
    if out is not None:
        with atomic_write(out) as temporary:
            temporary.write_text(as_yaml(found), encoding="utf-8")
        print(f"rule    {out}")
    if json is not None:
        with atomic_write(json) as temporary:
            temporary.write_text(found.to_json(), encoding="utf-8")
        print(f"table   {json}")


def as_yaml(found: Calibration) -> str:
    """The rule as options of ``genkl score``, under a line that says where it is from."""
    import yaml

    settings = {
        k: v.item() if isinstance(v, np.generic) else v
        for k, v in dataclasses.asdict(found.rule).items()
    }
    flagged = found.candidates[found.chosen].flagged
    source = (
        f"# genkl calibrate: flags {flagged} of {found.rows} clean rows "
        f"(at most {100 * found.false_positives:g} % was asked for)\n"
    )
    return source + yaml.safe_dump(settings, sort_keys=False)


def start_rule(preset: str | None, settings: dict[str, Any], first_input: Path) -> GenKL:
    """The rule that is tried or calibrated: a preset, or what is given and for the rest alpha 1
    and Clothing1M's beta and sigma for k classes."""
    from ..rule import GenKL
    from ..scoring.sources import open_source
    from ..training.settings import Rule

    if preset is not None:
        return GenKL.preset(preset, **settings)
    with open_source(first_input) as predictions:
        classes = settings.get("num_classes", predictions.shape[1])
    scaled = Rule(alpha=None, beta=None, sigma=None).of(classes, 0)
    return dataclasses.replace(scaled, **settings)


def load(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """The array of a ``.npy`` file; ``ValueError`` with its name for anything else."""
    try:
        array = np.load(path, mmap_mode=mmap_mode)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (ValueError, EOFError) as error:  # no array, pickled objects, or empty
        raise ValueError(f"{path} is not a .npy file of numbers") from error
    if not isinstance(array, np.ndarray):  # an archive
        raise ValueError(f"{path} is not a .npy file of numbers")
    return array


def require_share(option: str, value: float) -> None:
    """Raise ``UsageError`` unless 0 < value < 1, as for one who thought of per cent."""
    if not 0 < value < 1:
        raise UsageError(f"--{option} must be a share from 0 to 1, such as 0.05, got {value:g}")


def _require_no_scores(path: Path) -> None:
    """Raise ``ValueError`` for a table of scores, whose columns of numbers would pass for k."""
    names: tuple[str, ...] = ()
    if path.suffix == ".parquet" and path.exists():
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            names = tuple(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no parquet table: {error}") from error
    elif path.suffix == ".npy" and path.exists():
        names = load(path, "r").dtype.names or ()
    if "critical_alpha" in names:
        raise ValueError(f"{path} must hold predictions, one column per class, got scores")
