"""``genkl run`` and its stages alone: ``train``, ``relabel``, ``finetune`` make what it makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from genkl_ext.cli.main import main
from genkl_ext.data import Manifest, examples
from genkl_ext.data.published import read_row_list
from genkl_ext.relabel import class_ratio

K = 4
RECIPE = """
extends: clothing1m
data:
  num_classes: 4
  train: {size: 16, resize: 18, crop: random, flip: 0.5, rotation: 0.0}
  eval: {size: 16, resize: 16, crop: center, flip: 0.0}
network:
  {name: genkl_ext.demo.network:small, pretrained: null, options: {}, channels_last: false}
members: {epochs: 2, seeds: [0, 1], batch_size: 8, pick: {}}
training: {epochs: 2, batch_size: 8, start: pretrained}
finetune: {epochs: 1, batch_size: 8, beat_training: false}
rule: {beta: null, sigma: null, alpha: 1.0, seed: 3}
loop: {iterations: 1, seeds: [0]}
engine: {predict_batch_size: 16, accelerator: cpu}
"""
RULE = f"--num-classes {K} --alpha 1.0 --beta {0.42 / K} --sigma {0.7 / K} --seed 3"


def genkl(*words: object) -> int:
    return main(" ".join(map(str, words)).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/, recipe.yaml, and run/ by ``genkl run``."""
    folder = tmp_path_factory.mktemp("whole")
    examples.make("clothing1m", folder / "data", count=40, classes=K, seed=1)
    (folder / "recipe.yaml").write_text(RECIPE)
    where = f"--data-root {folder / 'data'} --out {folder / 'run'}"
    assert genkl("run", folder / "recipe.yaml", where) == 0
    return folder


@pytest.fixture
def here(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder of one's own with the data, the recipe and the finished run."""
    for name in ("data", "run", "recipe.yaml"):
        (tmp_path / name).symlink_to(whole / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(path: str) -> bytes:
    return Path(path, "best.safetensors").read_bytes()


def test_by_hand_as_by_the_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage on its own, in the order of the run: the same networks, scores and targets."""
    recipe = "recipe.yaml --data-root data"
    for seed in (0, 1):
        assert genkl(f"train {recipe} --seed {seed} -o member-{seed}") == 0
        assert weights(f"member-{seed}") == weights(f"run/iteration-0/members/{seed}")
    # genkl predict has tests of its own.
    files = " ".join(f"run/iteration-0/predictions/{seed}.npy" for seed in (0, 1))
    assert genkl(f"score {files} {RULE} --keys run/keys.txt -o scores.parquet") == 0
    capsys.readouterr()
    assert genkl("relabel data --scores scores.parquet -o targets.parquet") == 0
    said = capsys.readouterr().out
    made, run = (pq.read_table(p) for p in ("targets.parquet", "run/iteration-0/targets.parquet"))
    assert made.equals(run)
    kinds = made["target"].to_pylist()
    assert f"uniform           {kinds.count('uniform'):,}\n" in said and "uniform" in kinds
    assert genkl(f"train {recipe} --targets targets.parquet -o trial") == 0
    assert weights("trial") == weights("run/iteration-0/trial-0/train")
    assert genkl(f"finetune {recipe} --weights trial/best.safetensors -o tuned") == 0
    assert weights("tuned") == weights("run/iteration-0/trial-0/finetune")


def test_relabel_with_another_nc_list_and_ratio(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Manifest.from_clothing1m("data")
    noisy = manifest.split("train")
    keys = noisy.keys()
    chosen = [keys[i] for i in (0, 3, 9)]
    Path("nc.txt").write_bytes("\r\n".join(chosen).encode())
    scores = "--scores run/iteration-0/scores.parquet"
    assert genkl(f"relabel data {scores} --nc-list nc.txt --ratio clean -o t.parquet") == 0
    made = pq.read_table("t.parquet").to_pydict()
    nc = np.array([kind == "uniform" for kind in made["target"]])
    np.testing.assert_array_equal(nc, read_row_list("nc.txt", manifest))
    assert nc.nonzero()[0].tolist() == [0, 3, 9]
    ratio = class_ratio(manifest.split("clean").labels, K)
    assert not np.allclose(ratio, class_ratio(noisy.labels, K))
    prior = ratio[noisy.labels].astype(np.float32)
    np.testing.assert_array_equal(np.array(made["prior"], np.float32)[~nc], prior[~nc])
    assert "uniform           3\n" in capsys.readouterr().out


def test_started_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Done is done; with another setting it is done again."""
    words = "train recipe.yaml --data-root data --targets run/iteration-0/targets.parquet -o trial"
    assert genkl(words) == 0
    first = capsys.readouterr().out
    before = Path("trial/best.safetensors").stat()
    assert genkl(words) == 0
    again = capsys.readouterr()
    assert "train: done before" in again.out + again.err
    assert Path("trial/best.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    assert first.splitlines()[-2:] == again.out.splitlines()[-2:]
    assert first.splitlines()[-1] == "weights           trial/best.safetensors"
    assert genkl(words.replace("--data-root", "training.epochs=1 --data-root")) == 0
    assert "done before" not in capsys.readouterr().out
    assert json.loads(Path("trial/records.json").read_text())["train"]


def bad(capsys: pytest.CaptureFixture[str], words: str, status: int = 1) -> str:
    """The one line that a command that fails leaves."""
    capsys.readouterr()
    assert genkl(words) == status
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


RUN = "recipe.yaml --data-root data"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (f"train {RUN} --targets no.parquet -o t", "genkl train: no.parquet does not exist\n"),
        (
            f"train {RUN} --weights run/iteration-0/trial-0/train/best.safetensors -o t",
            "genkl train: weights must be left out without targets\n",
        ),
        (f"finetune {RUN} --weights no.st -o t", "genkl finetune: no.st does not exist\n"),
        (
            "relabel data --scores no.parquet -o t.parquet",
            "genkl relabel: scores: no.parquet does not exist\n",
        ),
        (
            "finetune recipe.yaml finetune.clean=dynamic --data-root data "
            "--weights run/iteration-0/trial-0/train/best.safetensors -o t",
            "genkl finetune: predictions must be given for finetune.clean=dynamic\n",
        ),
    ],
)
def test_bad_input(here: Path, capsys: pytest.CaptureFixture[str], words: str, line: str) -> None:
    assert bad(capsys, words) == line
    assert not Path("t.parquet").exists() and not Path("t/best.safetensors").exists()


def test_files_of_another_kind(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores, targets = (f"run/iteration-0/{name}.parquet" for name in ("scores", "targets"))
    assert "scores.parquet" in bad(capsys, f"train {RUN} --targets {scores} -o t")
    assert "targets.parquet" in bad(capsys, f"relabel data --scores {targets} -o t.parquet")
    assert "targets.parquet" in bad(capsys, f"finetune {RUN} --weights {targets} -o t")
    shutil.copy("run/keys.txt", "keys.parquet")
    assert "keys.parquet" in bad(capsys, f"train {RUN} --targets keys.parquet -o t")
    assert "keys.parquet" in bad(capsys, "relabel data --scores keys.parquet -o t.parquet")


def test_targets_of_other_images(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples.make("clothing1m", here / "other", count=41, classes=K, seed=2)
    run = "recipe.yaml --data-root other --targets run/iteration-0/targets.parquet"
    assert "targets.parquet" in bad(capsys, f"train {run} -o t")
    scores = "--scores run/iteration-0/scores.parquet"
    assert "scores.parquet" in bad(capsys, f"relabel other {scores} -o t.parquet")


@pytest.mark.parametrize("command", ["train", "finetune", "relabel"])
def test_wrong_usage(here: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert bad(capsys, f"{command} recipe.yaml", status=2).startswith(f"genkl {command}: ")


def test_dry_run(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, run = whole / "recipe.yaml", whole / "run"
    words = f"--data-root {whole / 'data'} --out {run} --dry-run"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert genkl("run", recipe, words) == 0
    lines = capsys.readouterr().out.splitlines()
    stages = {line.split()[0]: line for line in lines if line.startswith("  ")}
    known = json.loads((run / "records.json").read_text())
    assert set(known) <= set(stages) and all(line.endswith(" done") for line in stages.values())
    assert any(line.startswith("to do: about 0") for line in lines), lines
    assert genkl("run", recipe, "training.epochs=3", words) == 0
    lines = capsys.readouterr().out.splitlines()
    changed = {line.split()[0]: line for line in lines if line.startswith("  ")}
    again = {name for name, line in changed.items() if "to do" in line}
    assert {name for name in again if "iteration-0" in name} == {
        name for name in known if name.startswith("iteration-0/trial-0")
    }
    assert "images trained on" in changed["iteration-0/trial-0/train"]
    assert ", again: " in changed["iteration-0/trial-0/train"]
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
