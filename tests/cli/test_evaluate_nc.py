import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

import genkl_ext as gk
from genkl_ext import evaluation, identifiers
from genkl_ext.cli.main import main
from genkl_ext.data import Manifest

ROWS = 200
RULE = {"num_classes": 5, "alpha": 0.8, "beta": 0.05, "sigma": 0.05, "num_vectors": 20, "seed": 0}


def truth() -> np.ndarray:
    return np.arange(ROWS) % 4 == 1


def labels() -> np.ndarray:
    return np.where(np.arange(ROWS) % 7 == 0, -1, np.arange(ROWS) % 5)


def keys() -> list[str]:
    return [f"images/{row % 10}/{row:03},x.jpg" for row in range(ROWS)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Predictions, the scores of them, a manifest, and lists and tables of what is true."""
    monkeypatch.chdir(tmp_path)
    stream = np.random.default_rng(0)
    spread = np.where(truth(), 0.6, 2.0)[:, None]
    for name in ("p0.npy", "p1.npy"):
        exp = np.exp(stream.standard_normal((ROWS, 5)) * spread)
        np.save(name, (exp / exp.sum(1, keepdims=True)).astype(np.float32))
    Path("keys.txt").write_text("".join(key + "\r\n" for key in keys()), newline="")
    gk.score_files(["p0.npy", "p1.npy"], gk.GenKL(**RULE), "scores.parquet", keys="keys.txt")
    kinds = np.where(truth(), np.where(np.arange(ROWS) % 8 == 1, "other", "ambiguous"), "right")
    table = {
        "key": keys(),
        "path": keys(),
        "split": ["train"] * ROWS,
        "given_label": pa.array(labels(), mask=labels() < 0),
        "kind": kinds,
        "verified": pa.array(~truth(), mask=np.arange(ROWS) % 3 == 0),
    }
    more = {"key": ["v"], "path": ["v"], "split": ["val"], "given_label": [0]}
    table = pa.concat_tables([pa.table(more), pa.table(table)], promote_options="permissive")
    Manifest(table, tuple("abcde"), "clothing1m", ".").save("manifest.parquet")
    listed = [key.removeprefix("images/") for key, nc in zip(keys(), truth(), strict=True) if nc]
    Path("NC_instances.txt").write_text("".join(f"{key}\r\n" for key in listed[:30]), newline="")
    order = stream.permutation(ROWS)[:150]
    seen = {"key": np.array(keys())[order], "nc": truth()[order].astype(int)}
    pacsv.write_csv(pa.table(seen), "seen.csv")
    np.save("mine.npy", stream.standard_normal(ROWS) + truth())
    np.save("labels.npy", labels())
    np.save("truth.npy", truth())
    return tmp_path


def run(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that succeeds prints."""
    status = main(["evaluate-nc", *words.split()])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def expected(**given: object) -> evaluation.Evaluation:
    table = pq.read_table("scores.parquet")
    return evaluation.evaluate(
        {"scores": np.asarray(table["critical_alpha"])},
        decisions={"scores": np.asarray(table["nc"])},
        draws=50,
        **given,  # type: ignore[arg-type]
    )


def test_verified_keys(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        "scores.parquet --verified NC_instances.txt --manifest manifest.parquet --draws 50 "
        "--json found.json --plot curves.svg",
        capsys,
    )
    rows = np.flatnonzero(truth())[:30]
    result = expected(verified=rows, groups=labels(), group_names=tuple("abcde"))
    assert out == (f"{result.table()}\n\nnumbers   found.json\ncurves    curves.svg\n")
    facts = json.loads(Path("found.json").read_text())
    source = {"file": "scores.parquet", "column": "critical_alpha", "rule": RULE}
    assert facts.pop("sources") == {"scores": source} and facts.pop("version")
    assert facts == json.loads(result.to_json())
    assert "scores: area" in Path("curves.svg").read_text()


@pytest.mark.parametrize("rows", ["--keys keys.txt", ""])
def test_keys_without_a_manifest(
    folder: Path, capsys: pytest.CaptureFixture[str], rows: str
) -> None:
    out = run(f"scores.parquet --verified NC_instances.txt {rows} --draws 50", capsys)
    assert out == expected(verified=np.flatnonzero(truth())[:30]).table() + "\n\n"


@pytest.mark.parametrize(
    "words",
    [
        "--truth kind --nc-values ambiguous other --manifest manifest.parquet",
        "--truth truth.npy --manifest manifest.parquet",
        "--truth truth.npy --labels labels.npy --manifest manifest.parquet",
    ],
)
def test_full_truth(folder: Path, capsys: pytest.CaptureFixture[str], words: str) -> None:
    out = run(f"scores.parquet {words} --draws 50", capsys)
    result = expected(truth=truth(), groups=labels(), group_names=tuple("abcde"))
    assert out == result.table() + "\n\n"


@pytest.mark.parametrize(
    ("words", "known"),
    [
        ("--truth seen.csv", "seen"),
        ("--truth seen.csv:nc --manifest manifest.parquet --labels none.npy", "seen"),
        ("--truth verified --nc-values false --manifest manifest.parquet", "verified"),
    ],
)
def test_rows_of_which_nothing_is_known(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, known: str
) -> None:
    np.save("none.npy", np.full(ROWS, -1))
    if known == "seen":
        listed = set(pacsv.read_csv("seen.csv")["key"].to_pylist())
        looked = np.array([key in listed for key in keys()])
    else:
        looked = np.arange(ROWS) % 3 != 0
    facts = {"truth": np.where(looked, truth().astype(int), -1)}
    if known == "verified":
        facts |= {"groups": labels(), "group_names": tuple("abcde")}  # type: ignore[dict-item]
    out = run(f"scores.parquet {words} --draws 50", capsys)
    assert out == expected(**facts).table() + "\n\n"
    assert f"{(~looked).sum()} rows of which nothing is known" in out


def test_sources_of_every_kind(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = np.load("mine.npy")
    pacsv.write_csv(pa.table({"key": keys(), "a": value, "b": -value}), "mine.csv")
    pq.write_table(pa.table({"only": value.astype(np.float32)}), "mine.parquet")
    gk.score_files(["p0.npy"], gk.GenKL(**RULE), "structured.npy")
    gk.score_files(["p0.npy"], gk.GenKL(**RULE), "table.csv")
    run(
        "scores.parquet mine.npy A=mine.csv:a mine.csv:b M=mine.parquet structured.npy "
        "T=table.csv entropy vote_entropy self_confidence "
        "--predictions p0.npy p1.npy --labels labels.npy --truth truth.npy --draws 0 --json f.json",
        capsys,
    )
    facts = json.loads(Path("f.json").read_text())
    models = [np.load("p0.npy"), np.load("p1.npy")]
    alone = gk.GenKL(**RULE).score(models[0])
    scores = {
        "scores": gk.GenKL(**RULE).score(models).critical_alpha,
        "mine": value,
        "A": value,
        "b": -value,
        "M": value.astype(np.float32),
        "structured": alone.critical_alpha,
        "T": alone.critical_alpha,
        "entropy": identifiers.entropy(models),
        "vote_entropy": identifiers.vote_entropy(models),
        "self_confidence": identifiers.self_confidence(models, labels()),
    }
    assert list(facts["overall"]) == list(scores) == list(facts["sources"])
    for name, column in scores.items():
        auroc = facts["overall"][name]["metrics"]["auroc"]["value"]
        assert auroc == pytest.approx(evaluation.auroc(column, truth()), abs=1e-9), name
    flagged = [name for name, q in facts["overall"].items() if "flagged" in q["metrics"]]
    assert flagged == ["scores", "structured", "T"]
    assert facts["overall"]["T"]["metrics"]["flagged"]["value"] == alone.nc.mean()
    assert facts["sources"]["entropy"] == {"title": "normalised entropy", "finds": "nc"}


def test_all_takes_what_the_inputs_allow(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("all --predictions p0.npy --truth truth.npy --draws 0 --json f.json", capsys)
    of_one = set(json.loads(Path("f.json").read_text())["overall"])
    needs = {name: identifiers.get(name).needs for name in identifiers.names()}
    assert of_one == {n for n, need in needs.items() if need == {"predictions"}} - {"genkl"}
    run(
        "all --predictions p0.npy p1.npy --labels labels.npy --truth truth.npy --draws 0 "
        "--json f.json",
        capsys,
    )
    of_all = set(json.loads(Path("f.json").read_text())["overall"])
    there = {"predictions", "members", "labels"}
    assert of_all == {n for n, need in needs.items() if need <= there} - {"genkl"}


def test_rows_without_prediction_are_never_flagged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = np.arange(ROWS) % 9 == 0
    for name in ("p0.npy", "p1.npy"):
        rows = np.load(name)
        rows[broken] = np.nan
        np.save(name, rows)
    features = np.random.default_rng(1).standard_normal((ROWS, 3)).astype(np.float32)
    np.save("features.npy", features)
    words = "entropy knn_distance mutual_information normalised_margin --features features.npy"
    out = run(
        f"{words} --predictions p0.npy p1.npy --labels labels.npy --truth truth.npy --draws 0 "
        "--json f.json",
        capsys,
    )
    facts = json.loads(Path("f.json").read_text())["overall"]
    assert facts["entropy"]["unscored"] == facts["mutual_information"]["unscored"] == broken.sum()
    assert facts["knn_distance"]["unscored"] == 0
    assert facts["normalised_margin"]["unscored"] == (broken | (labels() < 0)).sum()
    assert f"{broken.sum()} rows have no score of entropy: never flagged" in out
    models = [np.load("p0.npy"), np.load("p1.npy")]
    scores = identifiers.entropy(models, validate=False)
    auroc = facts["entropy"]["metrics"]["auroc"]["value"]
    assert auroc == pytest.approx(evaluation.auroc(scores, truth()), abs=1e-9)


@pytest.mark.parametrize("kind", ["int", "bool", "float"])
def test_an_empty_decision_is_none(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    yes, no = {"int": "10", "bool": ("true", "False"), "float": ("1.0", "0.0")}[kind]
    # One has no decision, one no score to make it by, one neither.
    lines = ["key,critical_alpha,nc", f"a,0.9,{yes}", "b,0.5,", f"c,,{yes}", f"d,0.1,{no}", "e,,"]
    Path("tiny.csv").write_text("\n".join(lines) + "\n")
    Path("listed.txt").write_text("a\n")
    run("tiny.csv --verified listed.txt --draws 0 --json f.json", capsys)
    metrics = json.loads(Path("f.json").read_text())["overall"]["tiny"]["metrics"]
    assert metrics["flagged"]["value"] == 0.2 and metrics["recall"]["value"] == 1


def test_verified_rows_reach_the_identifiers(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = np.random.default_rng(2)
    features = stream.standard_normal((ROWS, 4)) + truth()[:, None]
    reference = stream.standard_normal((50, 4))
    classes = np.arange(50) % 5
    for name, array in (("features", features), ("ref", reference), ("classes", classes)):
        np.save(f"{name}.npy", array)
    names = "combined density_ratio knn_distance mahalanobis neighbour_disagreement entropy"
    run(
        f"{names} --predictions p0.npy --features features.npy --labels labels.npy --reference "
        "ref.npy --reference-labels classes.npy --truth truth.npy --draws 0 --json f.json",
        capsys,
    )
    near = {"reference": reference, "reference_labels": classes}
    predictions = np.load("p0.npy")
    scores = {
        "combined": identifiers.combined(predictions, features, **near),
        "density_ratio": identifiers.density_ratio(features, **near),
        "knn_distance": identifiers.knn_distance(features, reference=reference),
        "mahalanobis": identifiers.mahalanobis(features, labels(), **near),
        "neighbour_disagreement": identifiers.neighbour_disagreement(features, labels(), **near),
        "entropy": identifiers.entropy(predictions),
    }
    facts = json.loads(Path("f.json").read_text())["overall"]
    assert list(facts) == list(scores)
    for name, column in scores.items():
        auroc = facts[name]["metrics"]["auroc"]["value"]
        assert auroc == pytest.approx(evaluation.auroc(column, truth()), abs=1e-9), name


def test_options_reach_the_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(
        "scores.parquet --truth truth.npy --shares 0.03 0.5 --false-positives 0.1 --draws 20 "
        "--seed 4 --level 0.8 --json f.json",
        capsys,
    )
    facts = json.loads(Path("f.json").read_text())
    table = pq.read_table("scores.parquet")
    result = evaluation.evaluate(
        {"scores": np.asarray(table["critical_alpha"])},
        truth(),
        decisions={"scores": np.asarray(table["nc"])},
        shares=(0.03, 0.5),
        false_positives=0.1,
        draws=20,
        seed=4,
        level=0.8,
    )
    del facts["version"], facts["sources"]
    assert facts == json.loads(result.to_json())
    assert "with 80 % intervals from 20 bootstrap draws" in out


def test_keys_listed_twice_are_a_warning(folder: Path) -> None:
    with open("NC_instances.txt", "a") as file:
        file.write(keys()[1] + "\n")
    words = "scores.parquet --verified NC_instances.txt --draws 0"
    done = subprocess.run(
        [sys.executable, "-m", "genkl_ext.cli.main", "evaluate-nc", *words.split()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "30 (15 %) known to be positive" in done.stdout
    assert done.stderr == (
        "genkl evaluate-nc: warning: NC_instances.txt: 1 keys are listed more than once, and "
        "count once\n"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("scores.parquet", "one of --verified and --truth must be given, and not both"),
        (
            "scores.parquet --verified NC_instances.txt --truth truth.npy",
            "one of --verified and --truth must be given, and not both",
        ),
        (
            "scores.parquet --verified NC_instances.txt --nc-values a",
            "--nc-values needs --truth",
        ),
        ("mine.npy --verified NC_instances.txt", "--verified needs the keys of the rows: "),
        ("mine.npy --truth seen.csv", "--truth needs the keys of the rows: "),
        ("mine.npy --truth kind", "--truth kind is no file, and a column of the manifest needs"),
        ("entropy --truth truth.npy", "entropy needs --predictions"),
        (
            "vote_entropy --truth truth.npy --predictions p0.npy",
            "vote_entropy needs two or more --predictions",
        ),
        (
            "self_confidence --truth truth.npy",
            "self_confidence needs --labels, or --manifest with labels and --predictions",
        ),
        ("all --truth truth.npy", "all needs --predictions, --logits or --features"),
        (
            "genkl --truth truth.npy --predictions p0.npy",
            "for genkl give the table that genkl score wrote",
        ),
        (
            "scores.parquet --truth truth.npy --predictions p0.npy",
            "--predictions, --logits, --features and --reference are for names of identifiers",
        ),
        (
            "combined --truth truth.npy --predictions p0.npy --features f.npy",
            "combined needs --reference with --reference-labels",
        ),
        (
            "entropy --truth truth.npy --predictions p0.npy --reference-labels labels.npy",
            "--reference-labels needs --reference",
        ),
        ("mine.npy mine.npy --truth truth.npy", "mine.npy is there twice; NAME=FILE names"),
        ("mine.npy --truth truth.npy --plot x.jpg", "--plot must end in .png, .svg, .pdf, got"),
        ("mine.npy --truth truth.npy --shares 0.1 0", "--shares must be a share from 0 to 1, such"),
        ("mine.npy --truth truth.npy --shares 5", "--shares must be a share from 0 to 1, such as "),
        (
            "mine.npy --truth truth.npy --level 95",
            "--level must be a share from 0 to 1, such as 0.",
        ),
        (
            "mine.npy --truth truth.npy --false-positives 5",
            "--false-positives must be a share from 0 to 1, such as 0.05, got 5",
        ),
        ("mine.npy --truth truth.npy --draws -1", "--draws and --seed must not be negative"),
    ],
)
def test_wrong_usage(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    before = sorted(os.listdir())
    assert main(["evaluate-nc", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"genkl evaluate-nc: {line}") and err.count("\n") == 1
    assert sorted(os.listdir()) == before


def _make_bad_files() -> None:
    Path("unknown.txt").write_bytes(b"1/001,x.jpg\r\n\r\n9/999,x.jpg\r\n")
    Path("others.txt").write_text("\n".join([*keys()[:-1], "x"]))
    np.save("few.npy", np.arange(3))
    np.save("all.npy", np.ones(ROWS, int))
    np.save("rows.npy", np.arange(ROWS))
    Path("text.npy").write_text("0.5\n")
    Path("text.parquet").write_text("0.5\n")
    np.save("short.npy", np.zeros(ROWS - 1))
    np.save("square.npy", np.zeros((ROWS, 2)))
    np.save("words.npy", np.array(["yes", "no"] * (ROWS // 2)))
    np.save("two.npy", np.arange(ROWS) % 3)
    Path("empty.npy").write_bytes(b"")
    Path("blank.txt").write_text("\r\n")
    np.save("pickled.npy", np.array([{}] * ROWS, object))
    np.save("fields.npy", np.array([("x", True)] * ROWS, [("text", "U1"), ("flag", "?")]))
    score = pa.array(np.zeros(ROWS))
    pq.write_table(pa.table({"critical_alpha": score, "nc": ["no"] * ROWS}), "said.parquet")
    value = pa.array(np.zeros(ROWS))
    pq.write_table(pa.table({"a": value, "b": value}), "two.parquet")
    pq.write_table(pa.table({"key": keys()[::-1], "a": value}), "reversed.parquet")
    pq.write_table(pa.table({"a": ["x"] * ROWS}), "words.parquet")
    pacsv.write_csv(pa.table({"key": ["1/001,x.jpg", "z.jpg"], "nc": [1, 0]}), "other.csv")
    pacsv.write_csv(
        pa.table({"key": ["1/001,x.jpg", "images/1/001,x.jpg"], "nc": [1, 0]}), "both.csv"
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("none.npy --truth truth.npy", "none.npy does not exist"),
        ("scores.parquet:no --truth truth.npy", "scores.parquet must have a column no, got row,"),
        ("mine.npy:a --truth truth.npy", "mine.npy has no columns, got 'a'"),
        ("entropi --truth truth.npy", "identifiers.get: no identifier 'entropi'; did you mean"),
        ("text.npy --truth truth.npy", "text.npy is not a .npy file of numbers"),
        ("empty.npy --truth truth.npy", "empty.npy is not a .npy file of numbers"),
        ("pickled.npy --truth truth.npy", "pickled.npy is not a .npy file of numbers"),
        ("mine.npy --truth empty.npy", "empty.npy is not a .npy file of numbers"),
        ("fields.npy:text --truth truth.npy", "fields.npy: column text must be numbers, got <U1"),
        ("fields.npy:flag --truth truth.npy", "fields.npy: column flag must be numbers, got bool"),
        (
            "said.parquet --truth truth.npy",
            "said.parquet:nc must be 0, 1, true, false or empty, got 'no' in row 0\n",
        ),
        (
            "mine.npy --truth all.npy",
            "all.npy must have both 0 and 1, got 200 of 200 rows positive",
        ),
        ("scores.parquet --verified blank.txt", "blank.txt must list a key at least, got none"),
        (
            "mine.npy --truth truth.npy --manifest manifest.parquet --labels rows.npy",
            "rows.npy must be below 5, the manifest's number of classes, got 199 in row 199",
        ),
        ("text.parquet --truth truth.npy", "text.parquet is no parquet table: "),
        ("keys.txt --truth truth.npy", "a source must be a .npy, .parquet, .csv or .tsv file"),
        ("square.npy --truth truth.npy", "square.npy must have shape (N,), got (200, 2)"),
        (
            "two.parquet --truth truth.npy",
            "two.parquet: say which column, as two.parquet:COLUMN; there are a, b",
        ),
        ("words.parquet --truth truth.npy", "words.parquet: column a must be numbers, got string"),
        (
            "mine.npy short.npy --truth truth.npy",
            "short.npy must have a score for each of 200 rows, as mine.npy has, got 199",
        ),
        ("mine.npy --truth short.npy", "short.npy must have 200 values, got 199"),
        ("mine.npy --truth none.csv:a", "none.csv:a does not exist"),
        ("mine.npy --truth two.npy", "two.npy must be 0, 1, true, false or empty, got 2 in row 2"),
        (
            "mine.npy --truth words.npy",
            "words.npy must be 0, 1, true, false or empty, got 'yes' in row 0; --nc-values says",
        ),
        (
            "mine.npy --truth words.npy --nc-values yes maybe",
            "words.npy must have the value 'maybe' somewhere, got yes, no",
        ),
        ("short.npy --truth short.npy --labels labels.npy", "--labels must be the 199 rows of sho"),
        (
            "short.npy --truth short.npy --manifest manifest.parquet",
            "the manifest's noisy images must be the 199 rows of short.npy, got 200",
        ),
        (
            "mine.npy --truth none --manifest manifest.parquet",
            "--truth must be a file or one of key, path, given_label, split, verified, kind, got",
        ),
        (
            "short.npy --truth short.npy --keys keys.txt",
            "keys.txt must have one key for each of 199 rows, got 200 lines",
        ),
        (
            "scores.parquet reversed.parquet --truth truth.npy",
            "reversed.parquet must have the rows of scores.parquet in their order, got key "
            "'images/9/199,x.jpg' for 'images/0/000,x.jpg' in row 0",
        ),
        (
            "scores.parquet --truth truth.npy --keys others.txt --manifest manifest.parquet",
            "others.txt must have the rows of the manifest in their order, got key 'x' for "
            "'images/9/199,x.jpg' in row 199",
        ),
        (
            "self_confidence --predictions p0.npy --labels few.npy --truth truth.npy",
            "self_confidence: all files and labels must have the same number of rows, got 3, 200",
        ),
        (
            "scores.parquet --verified unknown.txt",
            "unknown.txt: each line must be a key of the noisy images, got 1 that are not, "
            "first '9/999,x.jpg' in line 3",
        ),
        (
            "scores.parquet --truth other.csv",
            "other.csv: each key must be one of the 200 rows, got 'z.jpg' in row 1, line 3",
        ),
        ("scores.parquet --truth both.csv", "both.csv must say one thing of each key, got two of"),
        ("mine.npy --truth truth.npy --json none/f.json", "cannot write none/f.json: "),
        ("mine.npy --truth truth.npy --plot none/f.png", "cannot write none/f.png: "),
        (
            "entropy --predictions square.npy --truth truth.npy",
            "entropy: rows of predictions must sum to 1 within 0.001, got 0 at row 0",
        ),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, line: str
) -> None:
    _make_bad_files()
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert main(["evaluate-nc", "--draws", "0", *words.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"genkl evaluate-nc: {line}"), err
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def test_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from genkl_ext.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'matplotlib', 'sklearn', 'nvidia'} & set(sys.modules)\n"
    )
    words = "evaluate-nc scores.parquet --truth kind --nc-values other --manifest manifest.parquet"
    subprocess.run(
        [sys.executable, "-c", program, *words.split(), "--draws", "5"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
