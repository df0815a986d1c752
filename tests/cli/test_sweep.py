"""genkl sweep and genkl calibrate: files in, what the functions say out."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import genkl_ext as gk
from genkl_ext import reference, sweep
from genkl_ext.cli.main import main

CLOTHING = ["--preset", "clothing1m"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """p0.npy, p1.npy: 120 rows of 14 classes; v0.npy, v1.npy: 60 verified; keys, truth."""
    stream = np.random.default_rng(0)
    for name, rows in (("p0", 120), ("p1", 120), ("v0", 60), ("v1", 60)):
        np.save(tmp_path / f"{name}.npy", reference.softmax(stream.normal(size=(rows, 14)) * 1.5))
    (tmp_path / "keys.txt").write_text("".join(f"images/{i}.jpg\n" for i in range(120)))
    (tmp_path / "nc.txt").write_text("".join(f"images/{i}.jpg\r\n" for i in range(0, 120, 4)))
    np.save(tmp_path / "truth.npy", np.arange(120) % 4 == 0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> int:
    return main([word for part in words for word in part.split()])


def test_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = "sweep p0.npy p1.npy --preset clothing1m --betas 0.01 0.05 --seeds 0 1 --sigmas 0.02"
    more = "--clean v0.npy v1.npy --truth truth.npy --json s.json --plot s.png"
    assert run(asked, more) == 0
    q, clean = ([np.load(f"{name}{i}.npy") for i in range(2)] for name in "pv")
    rules = sweep.grid(
        gk.GenKL.preset("clothing1m"), betas=[0.01, 0.05], sigmas=[0.02], seeds=[0, 1]
    )
    found = sweep.sweep(q, rules, clean=clean, truth=np.load("truth.npy"))
    assert Path("s.json").read_text() == found.to_json()
    out = capsys.readouterr().out
    assert out.startswith("120 rows, rules: 4\n") and found.table() in out
    assert "on others it will be less" in out
    assert Path("s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("prefix", ["images/", ""])
def test_sweep_with_some_verified_keys_gives_recall(
    folder: Path, capsys: pytest.CaptureFixture[str], prefix: str
) -> None:
    listed = "".join(f"{prefix}{i}.jpg\r\n" for i in range(0, 120, 4))
    Path("nc.txt").write_text(listed, newline="")
    asked = "sweep p0.npy p1.npy --preset clothing1m --betas 0.01 0.05 --keys keys.txt"
    assert run(asked, "--verified nc.txt --json s.json --plot s.svg") == 0
    q = [np.load(f"p{i}.npy") for i in range(2)]
    rules = sweep.grid(gk.GenKL.preset("clothing1m"), betas=[0.01, 0.05])
    found = sweep.sweep(q, rules, verified=np.load("truth.npy"))
    assert Path("s.json").read_text() == found.to_json()
    out = capsys.readouterr().out
    assert found.table() in out and "recall %" in out
    assert "F1" not in out and "AUROC" not in out
    assert "recall" in Path("s.svg").read_text()


def test_sweep_without_preset_takes_clothing1ms_constants_for_k_classes(folder: Path) -> None:
    assert run("sweep p0.npy --alpha 0.5 --alphas 0.1 0.2 --vectors 3 7 --json s.json") == 0
    facts = json.loads(Path("s.json").read_text())
    rules = [gk.GenKL(14, 0.5, 0.03, 0.05, num_vectors=m) for m in (3, 7)]
    assert [gk.GenKL(**rule) for rule in facts["rules"]] == rules
    assert facts["alphas"] == [0.1, 0.2, 0.5]


def test_sweep_of_tables_of_scores(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        seeded = f"--preset clothing1m --seed {seed}"
        assert run(f"score p0.npy p1.npy {seeded} -o s{seed}.parquet") == 0
        assert run(f"score v0.npy {seeded} -o v{seed}.parquet") == 0
    more = "--truth truth.npy --json tables.json"
    assert run(f"sweep s0.parquet s1.parquet --clean v0.parquet v1.parquet {more}") == 0
    assert run("sweep p0.npy p1.npy --preset clothing1m --seeds 0 1 --clean v0.npy",
               "--truth truth.npy --json files.json") == 0  # fmt: skip
    assert Path("tables.json").read_text() == Path("files.json").read_text()
    capsys.readouterr()
    assert run("sweep s0.parquet s1.parquet --clean v1.parquet v0.parquet") == 1
    assert "--clean must be scored with the rules of the inputs" in capsys.readouterr().err
    assert run("sweep s0.parquet s1.parquet --alpha 0.3 --json alpha.json") == 0
    facts = json.loads(Path("alpha.json").read_text())
    assert [rule["alpha"] for rule in facts["rules"]] == [0.3, 0.3] and 0.3 in facts["alphas"]
    assert " 0.3 " in capsys.readouterr().out
    assert run("sweep s0.parquet v1.parquet") == 1
    assert "v1.parquet must have 120 rows like s0.parquet, got 60" in capsys.readouterr().err


def _make_what_is_no_array() -> None:
    Path("empty.npy").write_bytes(b"")
    np.save("pickled.npy", np.array([{}, 1], object))
    np.savez("archive.npz", np.zeros(3))
    Path("archive.npz").rename("archive.npy")


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("p0.npy --plot s.gif", 2, "--plot must end in .png, .svg, .pdf, got 's.gif'"),
        ("p0.npy s.parquet", 2, "inputs and --clean must be all predictions or all tables"),
        ("s.parquet --betas 0.1", 2, "tables of scores have their rules"),
        ("s.parquet --sigma 0", 2, "tables of scores have their rules; --sigma needs predictions"),
        ("s.parquet --seed 0", 2, "tables of scores have their rules; --seed needs predictions"),
        (
            "s.parquet --num-vectors 9",
            2,
            "scores have their rules; --num-vectors needs predictions",
        ),
        (
            "s.parquet --num-classes 9",
            2,
            "scores have their rules; --num-classes needs predictions",
        ),
        ("s.parquet --logits", 2, "tables of scores have their rules; --logits needs predictions"),
        ("p0.npy --truth nc.txt", 2, "--truth must be a .npy file that tells of every row, got nc"),
        ("p0.npy --verified nc.txt", 2, "--verified needs --keys"),
        ("p0.npy --verified nc.txt --truth truth.npy", 2, "--truth and --verified cannot both be"),
        (
            "p0.npy --verified nc.txt --keys keys.txt --quality f1",
            2,
            "--quality f1 needs --truth: --verified says nothing of other rows",
        ),
        ("p0.npy --betas 0.1", 1, "GenKL: beta must be below 1/num_classes"),
        ("p0.npy --truth v0.npy", 1, "v0.npy must have a boolean for each of 120 rows"),
        ("p0.npy --truth two.npy", 1, "two.npy must be 0 or 1 everywhere, got 2 in row 2"),
        ("p0.npy --truth empty.npy", 1, "empty.npy is not a .npy file of numbers"),
        ("p0.npy --truth pickled.npy", 1, "pickled.npy is not a .npy file of numbers"),
        ("p0.npy --truth archive.npy", 1, "archive.npy is not a .npy file of numbers"),
        (
            "p0.npy --verified odd.txt --keys keys.txt",
            1,
            "sweep: odd.txt: each line must be a key of the noisy images, got 1 that are not, "
            "first 'x.jpg' in line 2",
        ),
        ("p0.npy --verified none.txt --keys keys.txt", 1, "none.txt must list a key of keys.txt"),
        ("p0.npy --truth none.npy", 1, "none.npy does not exist"),
        ("none.npy", 1, "none.npy does not exist"),
        ("p0.npy --json none/s.json", 1, "cannot write none/s.json: "),
    ],
)
def test_wrong_usage_of_sweep(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, status: int, line: str
) -> None:
    Path("odd.txt").write_text("images/1.jpg\nimages/x.jpg\n")
    Path("none.txt").write_text("\r\n")
    np.save("two.npy", np.arange(120) % 3)
    _make_what_is_no_array()
    assert run(f"sweep {words}") == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("genkl sweep: ") and line in err and err.count("\n") == 1


def test_a_calibrated_rule_is_what_genkl_score_takes(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calibrate v0.npy v1.npy --false-positives 0.1 -o rule.yaml --json c.json") == 0
    clean = [np.load(f"v{i}.npy") for i in range(2)]
    found = gk.GenKL(14, 1.0, 0.03, 0.05).calibrate(clean, false_positives=0.1)
    assert gk.GenKL(**yaml.safe_load(Path("rule.yaml").read_text())) == found.rule
    assert Path("c.json").read_text() == found.to_json()
    out = capsys.readouterr().out
    assert found.table() in out and "flags 6 of 60 clean rows" in out
    low, high = (100 * end for end in found.interval)
    assert f"{low:.2g} to {high:.2g} % with 95 % confidence" in out
    assert run("score v0.npy v1.npy --config rule.yaml -o scores.parquet") == 0
    assert gk.GenKL(**gk.scoring.read_settings("scores.parquet")["rule"]) == found.rule
    assert "6 rows (10 %)" in capsys.readouterr().out


def test_an_alpha_near_zero_survives_the_yaml(folder: Path) -> None:
    np.save("sure.npy", np.eye(14, dtype=np.float32))
    assert run("calibrate sure.npy -o rule.yaml") == 0
    alpha = yaml.safe_load(Path("rule.yaml").read_text())["alpha"]
    assert isinstance(alpha, float) and 0 < alpha < 1e-30
    assert run("score sure.npy --config rule.yaml -o scores.parquet") == 0
    assert gk.scoring.read_settings("scores.parquet")["rule"]["alpha"] == alpha


def test_calibrate_chooses_a_beta(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("calibrate v0.npy --betas 0.01 0.05 --noisy p0.npy p1.npy", *CLOTHING,
               "-o rule.yaml --seed 3 --confidence 0.9") == 0  # fmt: skip
    rule = gk.GenKL.preset("clothing1m", seed=3)
    noisy = [np.load(f"p{i}.npy") for i in range(2)]
    found = rule.calibrate(np.load("v0.npy"), betas=[0.01, 0.05], noisy=noisy, confidence=0.9)
    assert gk.GenKL(**yaml.safe_load(Path("rule.yaml").read_text())) == found.rule
    assert found.table() in capsys.readouterr().out
    stream = np.random.default_rng(0)
    for name, rows in (("", 120), ("clean_", 60)):
        labels = stream.integers(0, 14, rows)
        np.save(f"{name}labels.npy", labels)
        np.save(f"{name}features.npy", np.eye(14)[labels] + stream.normal(size=(rows, 14)) * 0.1)
    files = " ".join(f"--{name} {name.replace('-', '_')}.npy" for name in
                     ("features", "labels", "clean-features", "clean-labels"))  # fmt: skip
    asked = "calibrate v0.npy --betas 0.01 0.05 --noisy p0.npy --by accuracy --folds 3"
    assert run(asked, files, "--json c.json") == 0
    facts = json.loads(Path("c.json").read_text())
    assert facts["by"] == "accuracy" and facts["candidates"][0]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("v0.npy --betas 0.01 0.02", 2, "--betas needs --noisy"),
        ("v0.npy --by luck", 2, "--by: invalid choice: 'luck'"),
        ("v0.npy --false-positives 1", 2, "--false-positives must be a share from 0 to 1, such as"),
        ("v0.npy --false-positives 5", 2, "must be a share from 0 to 1, such as 0.05, got 5"),
        (
            "v0.npy --confidence 95",
            2,
            "--confidence must be a share from 0 to 1, such as 0.05, got",
        ),
        ("v0.npy --labels empty.npy", 1, "empty.npy is not a .npy file of numbers"),
        ("v0.npy --labels pickled.npy", 1, "pickled.npy is not a .npy file of numbers"),
        ("v0.npy --labels none.npy", 1, "calibrate: none.npy does not exist"),
        (
            "s.parquet",
            1,
            "calibrate: s.parquet must hold predictions, one column per class, got sc",
        ),
        ("s.npy", 1, "calibrate: s.npy must hold predictions, one column per class, got scores"),
        ("v0.npy --noisy s.npy", 1, "calibrate: s.npy must hold predictions, one column per class"),
        ("v0.npy p0.npy", 1, "predictions[1] must be like predictions[0]"),
        ("none.npy", 1, "none.npy does not exist"),
        ("keys.txt", 1, "keys.txt is not a .npy file of numbers"),
        ("v0.npy --num-classes 10", 1, "predictions must have shape (N, 10), got (60, 14)"),
        ("v0.npy --noisy p0.npy --by accuracy", 1, "features must be given for by='accuracy'"),
        ("v0.npy --features keys.txt", 1, "keys.txt is not a .npy file of numbers"),
    ],
)
def test_wrong_usage_of_calibrate(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, status: int, line: str
) -> None:
    _make_what_is_no_array()
    for name in ("s.npy", "s.parquet"):
        assert run(f"score p0.npy --preset clothing1m -o {name}") == 0
    capsys.readouterr()
    assert run(f"calibrate {words} -o rule.yaml") == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("genkl calibrate: ") and line in err
    assert err.count("\n") == 1 and not Path("rule.yaml").exists()
