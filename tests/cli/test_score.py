import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pyarrow.parquet as pq
import pytest

import genkl_ext as gk
from genkl_ext import rule as rules
from genkl_ext.cli import score as score_module
from genkl_ext.cli.main import main

RULE = ("--alpha", "1.05", "--beta", "0.03", "--sigma", "0.05")


def genkl(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "genkl_ext.cli.main", "score", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """p0.npy and p1.npy: 600 rows of 14 classes; q.npy: of 10; keys.txt."""
    stream = np.random.default_rng(0)

    def save(name: str, classes: int) -> None:
        exp = np.exp(stream.standard_normal((600, classes)) * stream.choice([0.1, 5], (600, 1)))
        np.save(tmp_path / name, (exp / exp.sum(1, keepdims=True)).astype(np.float32))

    save("p0.npy", 14)
    save("p1.npy", 14)
    save("q.npy", 10)
    (tmp_path / "keys.txt").write_text("".join(f"images/{i}.jpg\n" for i in range(600)))
    return tmp_path


def test_scores_files(folder: Path) -> None:
    words = "p0.npy p1.npy --preset clothing1m --seed 3 --keys keys.txt --nc-list nc_set.txt"
    done = genkl(folder, *words.split(), "-o", "cli.parquet")
    assert (done.returncode, done.stderr) == (0, "")
    result = gk.score_files(
        [folder / "p0.npy", folder / "p1.npy"],
        gk.GenKL.preset("clothing1m", seed=3),
        folder / "api.parquet",
        keys=folder / "keys.txt",
    )
    assert (folder / "cli.parquet").read_bytes() == (folder / "api.parquet").read_bytes()
    assert len((folder / "nc_set.txt").read_text().splitlines()) == result.nc_count

    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert lines["scored"] == "600 rows of 14 classes, 2 models averaged"
    share = f"{result.nc_count / 6:.3g} %"
    assert lines["non-conforming"] == f"{result.nc_count} rows ({share}) at alpha = 1.05"
    assert "rows/s" in lines["speed"] and "GB/s" in lines["speed"]
    assert lines["table"] == "cli.parquet"
    median = f"{np.median(result.scores.critical_alpha):.4f}"
    assert median in done.stdout


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("q.npy " + " ".join(RULE), gk.GenKL(10, 1.05, 0.03, 0.05)),
        (
            "q.npy --alpha 1 --beta 0.01 --sigma 0 --num-vectors 3 --seed 5 --num-classes 10",
            gk.GenKL(10, 1.0, 0.01, 0.0, num_vectors=3, seed=5),
        ),
        ("p0.npy --preset clothing1m", gk.GenKL(14, 1.05, 0.03, 0.05)),
        ("p0.npy --preset clothing1m --alpha 1.2", gk.GenKL(14, 1.2, 0.03, 0.05)),
        (
            "q.npy --preset webvision --num-classes 10",
            gk.GenKL(10, 0.9, 0.015, 0.05, seed=42),
        ),
    ],
)
def test_rule(folder: Path, monkeypatch: pytest.MonkeyPatch, words: str, rule: gk.GenKL) -> None:
    monkeypatch.chdir(folder)
    assert main(["score", *words.split(), "-o", "t.parquet"]) == 0
    assert gk.GenKL(**gk.scoring.read_settings("t.parquet")["rule"]) == rule


def test_presets_are_those_of_the_rule() -> None:
    hint = get_type_hints(score_module.score)["preset"]
    assert set(get_args(get_args(hint)[0])) == set(rules._PRESETS)


def test_options_reach_the_job(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    np.save("bad.npy", np.full((5, 10), np.nan, np.float32))
    assert main(["score", "bad.npy", *RULE, "-o", "t.parquet", "--no-validate"]) == 0
    assert main(["score", "q.npy", *RULE, "-o", "t.parquet", "--logits"]) == 0
    settings = gk.scoring.read_settings("t.parquet")
    assert (settings["logits"], settings["validate"]) == (True, True)


def test_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("c.yaml").write_text("inputs: [p0.npy]\npreset: clothing1m\nout: t.csv\n")
    assert main(["score", "--config", "c.yaml"]) == 0
    assert Path("t.csv").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("q.npy -o t.csv", "without --preset, --alpha, --beta, --sigma must be given"),
        ("q.npy -o t.csv --alpha 1 --sigma 0", "without --preset, --beta must be given"),
        ("q.npy -o t.csv --preset x", "argument --preset: invalid choice: 'x'"),
        ("q.npy --preset clothing1m", "the following arguments are required: out"),
        (
            "p0.npy -o t.csv --preset clothing1m --nc-list l.txt",
            "--nc-list needs --keys or --key-column",
        ),
        (
            "p0.npy -o t.csv --preset clothing1m --keys l.txt --key-column key",
            "--keys and --key-column must not be given together",
        ),
    ],
)
def test_wrong_usage(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    line: str,
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(os.listdir())
    assert main(["score", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"genkl score: {line}") and err.count("\n") == 1
    assert sorted(os.listdir()) == before


def _make_bad_files() -> None:
    good = np.load("p0.npy")
    content = Path("p0.npy").read_bytes()
    Path("empty.npy").write_bytes(b"")
    Path("text.npy").write_text("0.5,0.5\n")
    Path("truncated.npy").write_bytes(content[:-4])
    np.save("pickled.npy", np.array([[None]]), allow_pickle=True)
    np.save("short.npy", good[:-1])
    np.save("half.npy", good.astype(np.float16))
    nan = good.copy()
    nan[123, 4] = np.nan
    np.save("nan.npy", nan)
    np.save("logits.npy", np.log(good))
    Path("short.txt").write_text("a\nb\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("none.npy", "none.npy does not exist"),
        ("empty.npy", "empty.npy is empty"),
        ("text.npy", "text.npy is not a .npy file of numbers"),
        (
            "truncated.npy",
            "truncated.npy is truncated: (600, 14) float32 takes 33728 bytes, the file has 33724",
        ),
        ("pickled.npy", "pickled.npy holds pickled Python objects, which are not read"),
        ("q.npy", "q.npy must have rule.num_classes = 14 columns, got shape (600, 10)"),
        (
            "p0.npy short.npy",
            "short.npy must be like p0.npy, (600, 14) float32, got (599, 14) float32",
        ),
        (
            "p0.npy half.npy",
            "half.npy must be like p0.npy, (600, 14) float32, got (600, 14) float16",
        ),
        ("nan.npy", "nan.npy must be finite and not negative, got nan at row 123, class 4"),
        ("p0.npy nan.npy", "nan.npy must be finite and not negative, got nan at row 123, class 4"),
        ("logits.npy", "logits.npy must be finite and not negative, got -"),
        (
            "p0.npy --keys short.txt",
            "short.txt must have one key for each of 600 rows, got 2 lines",
        ),
        ("p0.npy --keys none.txt", "none.txt does not exist"),
        ("p0.npy -o none/t.csv", "cannot write none/t.csv: "),
        ("p0.npy -o /proc/t.csv", "cannot write /proc/t.csv: "),
        ("p0.npy -o t.txt", "t.txt must have a suffix of .parquet, .csv, .npy, got '.txt'"),
        ("p0.npy -o p0.npy", "out must be another file than p0.npy"),
        ("p0.npy --beta 0.1", "GenKL: beta must be below 1/num_classes = 0.0714286"),
        ("p0.npy --seed -1", "GenKL: seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    line: str,
) -> None:
    monkeypatch.chdir(folder)
    _make_bad_files()
    before = {name: Path(name).read_bytes() for name in os.listdir()}
    assert main(["score", "-o", "t.csv", "--preset", "clothing1m", *words.split()]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"genkl score: {line}") and err.count("\n") == 1
    assert {name: Path(name).read_bytes() for name in os.listdir()} == before


def test_exit_status_of_the_process(folder: Path) -> None:
    assert genkl(folder, "none.npy", "-o", "t.csv", *RULE).returncode == 1
    assert genkl(folder, "q.npy", "-o", "t.csv").returncode == 2


def test_repeated_keys_are_a_warning(folder: Path) -> None:
    (folder / "keys.txt").write_text("a\n" * 600)
    done = genkl(
        folder, "p0.npy", "--preset", "clothing1m", "--keys", "keys.txt", "-o", "t.parquet"
    )
    assert done.returncode == 0
    assert done.stderr == (
        "genkl score: warning: keys.txt: 599 keys appear more than once, first 'a' in line 2\n"
    )
    assert pq.read_table(folder / "t.parquet").num_rows == 600


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(folder: Path, rows: int) -> None:
    np.save(folder / "few.npy", np.full((rows, 10), 0.1))
    done = genkl(folder, "few.npy", *RULE, "-o", "t.csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{rows} rows of 10 classes" in done.stdout


def test_needs_no_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from genkl_ext.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'torch', 'rich', 'nvidia'} & set(sys.modules)\n"
    )
    words = ["score", "p0.npy", "--preset", "clothing1m", "-o", "t.parquet"]
    subprocess.run(
        [sys.executable, "-c", program, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )


def test_bad_rows(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    q = np.load("p0.npy")
    q[[3, 4, 599], 1] = np.nan
    np.save("bad.npy", q)
    words = "score bad.npy --preset clothing1m --keys keys.txt --bad-rows bad.txt"
    assert main(f"{words} -o t.parquet".split()) == 1
    assert "bad.npy must be finite and not negative, got nan at row 3" in capsys.readouterr().err
    assert not Path("t.parquet").exists() and not Path("bad.txt").exists()
    for policy, rows in (("nan", 600), ("skip", 597)):
        assert main(f"{words} --on-bad-row {policy} -o t.parquet".split()) == 0
        assert pq.read_table("t.parquet").num_rows == rows
        assert "no prediction   3 rows" in capsys.readouterr().out
        kept = Path("bad.txt").read_text()
        assert kept == "3\timages/3.jpg\n4\timages/4.jpg\n599\timages/599.jpg\n"


def test_other_kinds_of_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    q, rule = np.load("q.npy"), gk.GenKL(10, 1.05, 0.03, 0.05)
    expected = rule.score(q).critical_alpha
    q.tofile("q.raw")
    np.savez("q.npz", q=q, zero=np.zeros(3))
    Path("shards").mkdir()
    for i, part in enumerate(np.array_split(q, 4)):
        np.save(f"shards/{i}.npy", part)
    given = " ".join(RULE)
    for words in (
        "q.raw --raw float32 --num-classes 10",
        "q.npz --column q",
        "shards",
        "shards/*.npy",
        "shards/0.npy shards/1.npy shards/2.npy shards/3.npy --one-model",
    ):
        assert main(f"score {words} {given} -o t.parquet".split()) == 0, words
        np.testing.assert_array_equal(pq.read_table("t.parquet")["critical_alpha"], expected)
    capsys.readouterr()
    assert main(f"score q.raw --raw float32 {given} -o t.parquet".split()) == 2
    assert "--raw needs --num-classes, or --preset" in capsys.readouterr().err
    assert main(f"score q.npz {given} -o t.parquet".split()) == 1
    assert "q.npz holds q, zero: column must say which" in capsys.readouterr().err


def test_explain(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    words = "score p0.npy p1.npy --preset clothing1m -o t.parquet --explain"
    assert main(words.split()) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["to"] == "score        600 rows of 14 classes, 2 models averaged"
    assert said["inputs"] == "2 files, float32, 6.72e-05 GB"
    assert said["chunks"] == "1 of 600 rows"
    assert sorted(folder.iterdir()) == before
