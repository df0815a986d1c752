"""``genkl evaluate-nc``: scores and verified images in, how good the identification is out."""

from __future__ import annotations

import dataclasses
import inspect
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import UsageError
from .calibrate import load, require_share
from .progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from ..data import Manifest
    from ..identifiers import Identifier

_ALL = "all"  # stands for every identifier that the inputs allow
_TABLES = (".parquet", ".csv", ".tsv")
_SCORE = "critical_alpha"
_FLAG = "nc"
_NOT_SCORES = ("row", "key")
_TRUE, _FALSE = ("1", "true"), ("0", "false")


def evaluate_nc(
    sources: list[str],
    *,
    verified: Path | None = None,
    truth: str | None = None,
    nc_values: list[str] = [],  # noqa: B006 (never changed)
    manifest: str | None = None,
    keys: Path | None = None,
    predictions: list[Path] = [],  # noqa: B006
    logits: list[Path] = [],  # noqa: B006
    features: Path | None = None,
    labels: Path | None = None,
    reference: Path | None = None,
    reference_labels: Path | None = None,
    shares: list[float] = [0.01, 0.02, 0.05, 0.1, 0.2],  # noqa: B006
    false_positives: float = 0.05,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    num_classes: int | None = None,
    json: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Say how well scores find the non-conforming images, and compare them with each other.

    The truth is either a list of verified keys, of which all but recall is unknown, or full truth.
    Each number has a bootstrap interval; the sources are compared with the first on the same draws.

    Args:
        sources: tables of genkl score; other .parquet, .csv, .tsv or .npy files of one score per
            row, as FILE or FILE:COLUMN; or names of identifiers, computed from the files below,
            "all" for all of these. NAME=FILE names a source in the tables
        verified: text file with keys of images seen not to conform, as NC_instances.txt
        truth: which images do not conform; a column of the manifest, FILE:COLUMN of a table with
            the column key, or a .npy file of one value per row; 1, 0, true or false, empty for
            unknown
        nc_values: values of --truth that mean non-conforming, where it has words
        manifest: the data set: a folder, table or manifest; its noisy images are the rows
        keys: text file with one key per row, where no manifest and no table has them
        predictions: .npy files of shape (N, k) for identifiers, one per model
        logits: .npy files of shape (N, k) for identifiers, one per model
        features: .npy file of shape (N, d) for identifiers
        labels: .npy file of the N given labels, -1 for none; by default the manifest's
        reference: .npy file of shape (R, d), features of verified images, which identifiers that
            take features compare with
        reference_labels: .npy file of the R classes of these, -1 for none
        shares: flagged shares of the rows, from 0 to 1, at which recall is reported
        false_positives: share of the negatives, from 0 to 1, at which recall is reported
        draws: of the bootstrap; 0 for no intervals
        seed: of the bootstrap
        level: of the intervals, from 0 to 1
        num_classes: WebVision: keep labels below it
        json: file to write all numbers and curves to
        plot: figure of the curves to write; .png, .svg or .pdf

    Example:
        genkl evaluate-nc scores.parquet --verified NC_instances.txt --manifest /data/clothing1m
        genkl evaluate-nc scores.parquet entropy margin --predictions p0.npy p1.npy --manifest
            manifest.parquet --truth kind --nc-values ambiguous other --plot curves.png
        genkl evaluate-nc GenKL=scores.parquet mine.csv:score --truth seen.csv:nc --json found.json
    """
    if (verified is None) == (truth is None):
        raise UsageError("one of --verified and --truth must be given, and not both")
    if nc_values and truth is None:
        raise UsageError("--nc-values needs --truth")
    for share in shares:
        require_share("shares", share)
    require_share("false-positives", false_positives)
    require_share("level", level)
    if reference_labels is not None and reference is None:
        raise UsageError("--reference-labels needs --reference")
    if draws < 0 or seed < 0:
        raise UsageError("--draws and --seed must not be negative")
    for path in filter(None, (json, plot)):
        _require_output(path, is_figure=path is plot)

    rows = None if manifest is None else _noisy(manifest, num_classes)
    given_labels = _labels(labels, rows)
    inputs = _Inputs(predictions, logits, features, given_labels, reference, reference_labels)
    if (inputs.there() - {"labels"} or reference is not None) and all(map(_is_file, sources)):
        raise UsageError(
            "--predictions, --logits, --features and --reference are for names of identifiers"
        )
    found = [
        source
        for word in sources
        for source in ([_score_file(word)] if _is_file(word) else _computed(word, inputs))
    ]
    _name_apart(found)
    count = len(found[0].scores)
    _require_rows(count, found, rows, given_labels)
    keyed = _keyed(rows, keys, found)

    from .. import evaluation

    known: dict[str, Any]
    if verified is not None:
        listed = evaluation.read_verified(verified, _manifest(keyed, "--verified"))
        if not listed.any():
            raise ValueError(f"{verified} must list a key at least, got none")
        known = {"verified": listed}
    else:
        known = {"truth": _truth(truth or "", nc_values, rows, keyed, count)}
        if not {0, 1} <= set(known["truth"].tolist()):
            ones = int((known["truth"] == 1).sum())
            of = int((known["truth"] >= 0).sum())
            raise ValueError(f"{truth} must have both 0 and 1, got {ones} of {of} rows positive")
    with Progress("bootstrap", "draws") as progress:
        result = evaluation.evaluate(
            {source.name: source.scores for source in found},
            **known,
            decisions={s.name: s.flagged for s in found if s.flagged is not None},
            groups=given_labels,
            group_names=None if rows is None or given_labels is None else rows.class_names,
            shares=shares,
            false_positives=false_positives,
            draws=draws,
            seed=seed,
            level=level,
            progress=progress,
        )
    lines = [result.table(), ""]
    # Files first: whoever reads the table may stop reading.
    if json is not None:
        _write_json(json, result, found)
        lines.append(f"numbers   {json}")
    if plot is not None:
        from ..report import curves, style

        style.save(curves.draw(result), plot)
        lines.append(f"curves    {plot}")
    print("\n".join(lines))


@dataclasses.dataclass
class _Source:
    """One score per row, and where it is from."""

    word: str  # as it was typed
    name: str
    scores: NDArray[Any]
    flagged: NDArray[np.bool_] | None = None
    keys: pa.ChunkedArray | None = None
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Inputs:
    """What identifiers can be computed from."""

    predictions: list[Path]
    logits: list[Path]
    features: Path | None
    labels: NDArray[np.integer[Any]] | None
    reference: Path | None = None
    reference_labels: Path | None = None

    def there(self) -> set[str]:
        """Names of the inputs, as in ``Identifier.needs``."""
        return {
            name
            for name, given in {
                "predictions": self.predictions,
                "members": len(self.predictions) > 1,
                "logits": self.logits,
                "features": self.features,
                "labels": self.labels is not None,
                "reference": self.reference and self.reference_labels,
            }.items()
            if given
        }

    def score(self, identifier: Identifier) -> NDArray[np.float32]:
        """(N,) scores; NaN for rows of which an input has nothing but NaN, as broken images."""
        from ..scoring.chunks import empty_rows
        from ..scoring.sources import open_models

        with ExitStack() as stack:
            arrays: dict[str, list[NDArray[Any]]] = {}
            for name, files in (
                ("predictions", self.predictions),
                ("members", self.predictions),
                ("logits", self.logits),
            ):
                if name in identifier.needs:
                    arrays[name] = [f.rows(0, f.shape[0]) for f in open_models(files, stack)]
            if "features" in identifier.needs:
                arrays["features"] = [_load(self.features or Path(), "--features", columns=True)]
            if "labels" in identifier.needs and self.labels is not None:
                arrays["labels"] = [self.labels]
            lengths = {len(array) for of in arrays.values() for array in of}
            if len(lengths) > 1:
                raise ValueError(
                    f"{identifier.name}: all files and labels must have the same number of rows, "
                    f"got {', '.join(map(str, sorted(lengths)))}"
                )
            empty = np.zeros(lengths.pop(), bool)
            for name in arrays.keys() - {"labels"}:
                empty |= empty_rows(arrays[name])
            if empty.any():
                arrays = {name: [array[~empty] for array in of] for name, of in arrays.items()}
            scores = np.full(len(empty), np.nan, np.float32)
            alone = ("features", "labels")
            given = {name: of[0] if name in alone else of for name, of in arrays.items()}
            scores[~empty] = identifier(**given, **self._verified(identifier))
        return scores

    def _verified(self, identifier: Identifier) -> dict[str, NDArray[Any]]:
        """The verified rows, for an identifier that compares with such."""
        taken = inspect.signature(identifier.function).parameters
        made = {}
        if self.reference is not None and "reference" in taken:
            made["reference"] = _load(self.reference, "--reference", columns=True)
        if self.reference_labels is not None and "reference_labels" in taken:
            made["reference_labels"] = _load(self.reference_labels, "--reference-labels")
        return made


def _noisy(source: str, num_classes: int | None) -> Manifest:
    """The noisy images of a data set."""
    from ..data import Manifest, layouts

    if layouts.detect(source) == "webvision":
        return Manifest.from_webvision(source, num_classes).split("train")
    return layouts.read(source).split("train")


def _labels(path: Path | None, rows: Manifest | None) -> NDArray[np.integer[Any]] | None:
    """The given labels; None if there are none."""
    labels: NDArray[Any] | None = None if rows is None else rows.labels
    if path is not None:
        labels = _load(path, "--labels")
        if labels.dtype.kind not in "iu":
            raise ValueError(f"{path} must hold integers, got {labels.dtype}")
        if rows is not None and len(labels) and labels.max() >= rows.num_classes:
            row = int(np.argmax(labels))
            raise ValueError(
                f"{path} must be below {rows.num_classes}, the manifest's number of classes, got "
                f"{labels[row]} in row {row}"
            )
    return None if labels is None or (labels < 0).all() else labels


def _require_rows(
    count: int, found: list[_Source], rows: Manifest | None, labels: NDArray[Any] | None
) -> None:
    """Raise ``ValueError`` unless everything has so many rows."""
    for source in found:
        if len(source.scores) != count:
            raise ValueError(
                f"{source.word} must have a score for each of {count} rows, as {found[0].word} "
                f"has, got {len(source.scores)}"
            )
    for what, known in (("the manifest's noisy images", rows), ("--labels", labels)):
        if known is not None and len(known) != count:
            raise ValueError(
                f"{what} must be the {count} rows of {found[0].word}, got {len(known)}"
            )


def _keyed(rows: Manifest | None, keys: Path | None, found: list[_Source]) -> Manifest | None:
    """The rows with their keys, once all keys that there are agree; None if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from ..data.layouts.clothing1m import KEY_PREFIX
    from ..data.manifest import without_prefix
    from ..scoring.keys import Keys

    count = len(found[0].scores)
    columns = [] if rows is None else [("the manifest", rows.table["key"])]
    if keys is not None:
        listed = pa.chunked_array([Keys(keys, count).slice(0, count)], pa.string())
        columns.append((str(keys), listed))
    columns += [(s.word, s.keys.cast(pa.string())) for s in found if s.keys is not None]
    if not columns:
        return None
    (whose, known), *others = columns
    for word, column in others:
        other = pc.not_equal(*(without_prefix(each, KEY_PREFIX) for each in (column, known)))
        row = pc.index(other, True).as_py()
        if row >= 0:
            raise ValueError(
                f"{word} must have the rows of {whose} in their order, got key "
                f"{column[row].as_py()!r} for {known[row].as_py()!r} in row {row}"
            )
    if rows is not None:
        return rows
    return manifest_of_keys(known)


def manifest_of_keys(keys: pa.Array | pa.ChunkedArray) -> Manifest:
    """Noisy rows of which nothing but the keys is known."""
    import pyarrow as pa

    from ..data import Manifest

    table = pa.table({"key": keys, "path": keys, "split": pa.repeat("train", len(keys))})
    return Manifest(table, (), "table", ".")


def _manifest(keyed: Manifest | None, option: str) -> Manifest:
    """Raise ``UsageError`` unless the rows have keys."""
    if keyed is None:
        raise UsageError(
            f"{option} needs the keys of the rows: --manifest, --keys or a table with a column key"
        )
    return keyed


def _is_file(word: str) -> bool:
    """Whether a source is a file rather than an identifier's name."""
    return word != _ALL and not word.isidentifier()


def _computed(word: str, inputs: _Inputs) -> list[_Source]:
    """The identifier of that name, or all for which there is what they need."""
    from .. import identifiers

    there = inputs.there()
    if word != _ALL:
        chosen = [identifiers.get(word)]
        missing = chosen[0].needs - there
        if missing:
            raise UsageError(f"{word} needs {' and '.join(map(_option, sorted(missing)))}")
    else:
        chosen = [identifiers.get(name) for name in identifiers.names()]
        chosen = [i for i in chosen if i.needs <= there and i.name != "genkl"]
        if not chosen:
            raise UsageError("all needs --predictions, --logits or --features")
    if any(i.name == "genkl" for i in chosen):
        raise UsageError("for genkl give the table that genkl score wrote")
    return [
        _Source(i.name, i.name, inputs.score(i), facts={"title": i.title, "finds": i.finds})
        for i in chosen
    ]


def _option(need: str) -> str:
    return {
        "members": "two or more --predictions",
        "labels": "--labels, or --manifest with labels",
        "reference": "--reference with --reference-labels",
    }.get(need, f"--{need}")


def _score_file(word: str) -> _Source:
    """The scores in a file, with what it flags if it is a table of ``genkl score``."""
    name, place = "", word
    if "=" in word and not os.path.exists(word):
        name, _, place = word.partition("=")
    path, column = _split(place)
    shown = name or column or path.stem
    facts: dict[str, Any] = {"file": str(path)}
    keys = None
    if path.suffix not in _TABLES:
        records = _load(path, "a source", columns=False)
        if records.dtype.names is None:
            if column is not None:
                raise ValueError(f"{path} has no columns, got {column!r}")
            return _Source(word, shown, records, facts=facts)
        table = {field: records[field] for field in records.dtype.names}
    else:
        arrow = _read_table(path)
        table = {name: arrow[name] for name in arrow.column_names}
        keys = table.get("key")
    chosen = _choose(path, list(table), column, _SCORE, _NOT_SCORES)
    facts["column"] = chosen
    scores = _numbers(path, chosen, table[chosen])
    flagged = None
    if chosen == _SCORE and _FLAG in table:
        # What has no decision, or no score to be decided by, is not flagged.
        flagged = (_kinds(_column(table[_FLAG]), None, f"{path}:{_FLAG}") == 1) & ~np.isnan(scores)
        if path.suffix == ".parquet":
            facts["rule"] = _rule(path)
    return _Source(word, shown, scores, flagged, keys, facts)


def _column(values: Any) -> pa.ChunkedArray:
    """Of a table as it is, or of an array."""
    import pyarrow as pa

    if not isinstance(values, np.ndarray):
        return values
    return pa.chunked_array([pa.array(np.ascontiguousarray(values), from_pandas=True)])


def _rule(path: Path) -> dict[str, Any] | None:
    """The rule in a table of scores; None if the table is from elsewhere."""
    import pyarrow.parquet as pq

    from ..scoring.tables import SETTINGS_KEY, read_settings

    if SETTINGS_KEY not in (pq.read_schema(path).metadata or {}):
        return None
    rule: dict[str, Any] = read_settings(path)["rule"]
    return rule


def _name_apart(found: list[_Source]) -> None:
    """Sources with the same name are called what was typed; then they must differ."""
    names = [source.name for source in found]
    for source in found:
        if names.count(source.name) > 1:
            source.name = source.word
    names = [source.name for source in found]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"{name} is there twice; NAME=FILE names a source")


def _split(place: str) -> tuple[Path, str | None]:
    """FILE or FILE:COLUMN."""
    if os.path.exists(place):
        return Path(place), None
    file, colon, column = place.rpartition(":")
    if colon and os.path.exists(file):
        return Path(file), column
    raise FileNotFoundError(f"{place} does not exist")


def _choose(
    path: Path, columns: list[str], wanted: str | None, usual: str, others: tuple[str, ...]
) -> str:
    """The column that is asked for, or the usual one, or the only one."""
    if wanted is not None and wanted not in columns:
        raise ValueError(f"{path} must have a column {wanted}, got {', '.join(columns)}")
    rest = [name for name in columns if name not in others]
    chosen = wanted or (usual if usual in columns else None)
    if chosen is None and len(rest) == 1:
        chosen = rest[0]
    if chosen is None:
        raise ValueError(
            f"{path}: say which column, as {path}:COLUMN; there are {', '.join(columns)}"
        )
    return chosen


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_table(path)
        import pyarrow.csv as pacsv

        return pacsv.read_csv(
            path,
            parse_options=pacsv.ParseOptions(
                delimiter="\t" if path.suffix == ".tsv" else ",", newlines_in_values=True
            ),
            convert_options=pacsv.ConvertOptions(
                column_types={"key": pa.string()}, strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no {path.suffix[1:]} table: {error}") from error


def _numbers(path: Path, name: str, column: Any) -> NDArray[Any]:
    """A column of scores; an empty cell is NaN."""
    values = np.asarray(column)
    if values.dtype.kind not in "fiu":
        kind = getattr(column, "type", values.dtype)
        raise ValueError(f"{path}: column {name} must be numbers, got {kind}")
    return values


def _load(path: Path, what: str, columns: bool = False) -> NDArray[Any]:
    """An array of one value, or with ``columns`` of some, per row."""
    if path.suffix != ".npy":
        allowed = ".npy" if what != "a source" else ".npy, .parquet, .csv or .tsv"
        raise ValueError(f"{what} must be a {allowed} file, got {path}")
    array = load(path, "r" if columns else None)
    if array.ndim != 1 + columns:
        shape = "(N, d)" if columns else "(N,)"
        raise ValueError(f"{path} must have shape {shape}, got {array.shape}")
    return array


def _truth(
    word: str, nc_values: list[str], rows: Manifest | None, keyed: Manifest | None, count: int
) -> NDArray[np.int8]:
    """(N,) 1, 0 or -1 from a column of the manifest, of a table, or from an array."""
    if not os.path.exists(word) and ":" not in word:
        if rows is None:
            raise UsageError(f"--truth {word} is no file, and a column of the manifest needs one")
        names = rows.table.column_names
        if word not in names:
            raise ValueError(f"--truth must be a file or one of {', '.join(names)}, got {word!r}")
        return _kinds(rows.table[word], nc_values, f"--truth {word}")
    path, column = _split(word)
    if path.suffix not in _TABLES:
        values = _load(path, "--truth")
        if len(values) != count:
            raise ValueError(f"{path} must have {count} values, got {len(values)}")
        return _kinds(_column(values), nc_values, str(path))
    table = _read_table(path)
    if "key" not in table.column_names:
        raise ValueError(f"{path} must have a column key, got {', '.join(table.column_names)}")
    chosen = _choose(path, table.column_names, column, "", _NOT_SCORES)
    kinds = _kinds(table[chosen], nc_values, f"{path}:{chosen}")
    return _by_key(path, table["key"], kinds, _manifest(keyed, "--truth"))


def _by_key(
    path: Path, keys: pa.ChunkedArray, kinds: NDArray[np.int8], manifest: Manifest
) -> NDArray[np.int8]:
    """The rows of a table with keys in the order of the manifest; -1 for rows it lacks."""
    import warnings

    from ..data.layouts.clothing1m import KEY_PREFIX

    place = manifest.lookup(keys, split="train", prefix=KEY_PREFIX, missing="null")
    if (place < 0).any():
        row = int(np.argmin(place))
        line = "" if path.suffix == ".parquet" else f", line {row + 2}"
        raise ValueError(
            f"{path}: each key must be one of the {len(manifest)} rows, "
            f"got {keys[row].as_py()!r} in row {row}{line}"
        )
    made = np.full(len(manifest), -1, np.int8)
    made[place] = kinds
    again = made[place] != kinds
    if again.any():
        key = keys[int(np.argmax(again))].as_py()
        raise ValueError(f"{path} must say one thing of each key, got two of {key!r}")
    repeated = len(place) - len(np.unique(place))
    if repeated:
        warnings.warn(
            f"{path}: {repeated} keys are listed more than once, and count once", stacklevel=2
        )
    return made


def _kinds(column: pa.ChunkedArray, nc_values: list[str] | None, what: str) -> NDArray[np.int8]:
    """1 for values that mean non-conforming, 0 for others, -1 for none; without ``nc_values``
    words other than true and false are not allowed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    words = column.cast(pa.string())
    unknown = np.asarray(words.is_null())
    if nc_values:
        there = words.unique().drop_null().to_pylist()
        for value in nc_values:
            if value not in there:
                some = ", ".join(there[:20])
                raise ValueError(f"{what} must have the value {value!r} somewhere, got {some}")
        positive = np.asarray(pc.is_in(words, value_set=pa.array(nc_values)))
    else:
        words = pc.utf8_lower(words)
        positive = np.asarray(pc.is_in(words, value_set=pa.array(_TRUE)))
        bad = ~positive & ~unknown & ~np.asarray(pc.is_in(words, value_set=pa.array(_FALSE)))
        if bad.any():
            row = int(np.argmax(bad))
            hint = "; --nc-values says which words mean non-conforming"
            raise ValueError(
                f"{what} must be 0, 1, true, false or empty, got {column[row].as_py()!r} in row "
                f"{row}{'' if nc_values is None else hint}"
            )
    return np.where(unknown, -1, positive).astype(np.int8)


def _require_output(path: Path, is_figure: bool) -> None:
    from ..files import require_writable

    if is_figure:
        from ..report.style import FORMATS

        if path.suffix.lower() not in FORMATS:
            raise UsageError(f"--plot must end in {', '.join(FORMATS)}, got {path}")
    require_writable(path)


def _write_json(path: Path, result: Any, found: list[_Source]) -> None:
    import json

    from .. import __version__
    from ..files import atomic_write

    facts = {
        "version": __version__,
        "sources": {source.name: source.facts for source in found},
        **json.loads(result.to_json()),
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(facts, indent=1, allow_nan=False) + "\n", encoding="utf-8")
