"""The whole demo, quickly: what it leaves behind fits together."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from genkl_ext.cli import UsageError
from genkl_ext.cli.demo import demo
from genkl_ext.demo import digits, results
from genkl_ext.training import recipe as recipes

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "demo"
    demo(out=path, seeds=len(SEEDS), quick=True)
    return path


def test_nothing_is_missing_and_nothing_is_left_over(out):
    found = {path.name for path in out.iterdir()}
    expected = {"demo.json", "data", "run", "results.md", "results.json", "report.html"}
    assert found == expected | {"critical_alpha.png", "most_nonconforming.png"}
    trained = {str(p.parent.relative_to(out / "run")) for p in out.rglob("best.safetensors")}
    for seed in SEEDS:
        assert {f"baselines/{name}/{seed}" for name in ("noisy", "both")} <= trained
        assert f"iteration-0/members/{seed}" in trained
        assert {f"iteration-{t}/trial-{seed}/train" for t in (0, 1)} <= trained


def test_the_tables_are_those_of_the_run(out):
    facts = json.loads((out / "results.json").read_text())
    names = [row["name"] for row in facts["accuracy"]]
    assert names[:3] == list(results.NAMES.values())
    assert names[3:] == [
        f"GenKL iteration {t}{tuned}" for t in (0, 1) for tuned in ("", ", fine-tuned")
    ]
    summary = json.loads((out / "run/summary.json").read_text())
    tested = [trial["train"]["test"]["top1"] for trial in summary["iterations"][1]["trials"]]
    assert facts["accuracy"][5]["test"] == tested
    true = results.read_pairs(out / "data/true_digit_kv.txt")
    for t in (0, 1):
        table = pq.read_table(out / f"run/iteration-{t}/scores.parquet").to_pydict()
        truth = np.array([true[key] for key in table["key"]]) >= digits.CLASSES
        nc = np.array(table["nc"])
        found = facts["identification"][2 * t]
        assert (found["score"], found["iteration"]) == ("GenKL", t)
        assert found["flagged"] == pytest.approx(nc.mean())
        assert found["recall"] == pytest.approx(nc[truth].mean())


def test_the_settings_are_those_asked_for(out):
    recipe = recipes.load(out / "run/recipe.yaml")
    assert recipe.loop.seeds == recipe.members.seeds == list(SEEDS)
    assert recipe.training.omega_nnc == 32
    assert json.loads((out / "demo.json").read_text())["flips"] == "lookalike"
    text = (out / "results.md").read_text()
    facts = json.loads((out / "results.json").read_text())
    assert all(note in text for note in facts["notes"])


def test_again_it_has_nothing_to_train(out, capsys):
    demo(out=out, seeds=len(SEEDS), quick=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if " s  " in line]
    assert lines
    assert all("done before" in line or "Jaccard" in line or "accuracy" in line
               or "conform" in line for line in lines)  # fmt: skip


def test_pictures(out):
    for name in ("critical_alpha.png", "most_nonconforming.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.width >= 1000
            assert len(set(image.convert("L").resize((50, 50)).tobytes())) > 5  # not blank


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="^demo: out must be a new or empty folder"):
        demo(out=tmp_path, quick=True)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(OSError, match="^demo: cannot make the folder .*file: "):
        demo(out=taken, quick=True)


def test_bad_options():
    for options in ({"seeds": 0}, {"seeds": 65}, {"seed": -1}):
        with pytest.raises(UsageError, match="must"):
            demo(**options)
