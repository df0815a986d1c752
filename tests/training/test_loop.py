"""The whole loop on miniatures of each layout, with tiny networks: what it leaves fits together."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import genkl_ext as gk
from genkl_ext.data import Manifest, examples
from genkl_ext.data.published import read_row_list
from genkl_ext.relabel import targets as dense_targets
from genkl_ext.training import loop, stages
from genkl_ext.training.loop import Summary

K = 5
TINY = [
    "network.name=genkl_ext.demo.network:small",
    "network.pretrained=null",
    "network.options={}",
    "network.channels_last=false",
    "data.train={size: 16, resize: 18, crop: random, flip: 0.5, rotation: 0.0}",
    "data.eval={size: 16, resize: 16, crop: center, flip: 0.0}",
    "data.num_classes=5",
    "members.epochs=1",
    "members.seeds=[0, 1]",
    "members.batch_size=8",
    "members.pick={}",
    "members.folds=2",
    "training.epochs=1",
    "training.batch_size=8",
    "training.start=pretrained",
    "finetune.epochs=1",
    "finetune.batch_size=8",
    "loop.iterations=2",
    "loop.seeds=[0, 1]",
    "engine.predict_batch_size=16",
    "engine.accelerator=cpu",
    "rule.beta=null",
    "rule.sigma=null",
]


class Case:
    """A miniature data set and a folder for runs."""

    def __init__(self, folder: Path, layout: str, count: int = 48) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.layout = layout
        self.lines: list[str] = []
        examples.make(layout, self.data, count=count, classes=K, seed=1)  # type: ignore[arg-type]

    def run(self, *overrides: str, out: str = "run", recipe: str = "", **more: Any) -> Summary:
        self.lines.clear()
        return gk.run(
            recipe or self.layout,
            data_root=self.data,
            out=self.folder / out,
            overrides=[*TINY, *overrides],
            say=self.lines.append,
            **more,
        )

    def log_of_work(self) -> list[str]:
        """What the lines of the last run begin with, those of stages done before apart."""
        return [line.split(":")[0] for line in self.lines if not line.endswith(": done before")]

    def done_again(self) -> list[str]:
        """Stages that the last run did, in order."""
        known = json.loads((self.folder / "run/records.json").read_text())
        return [name for name in self.log_of_work() if name in known]


@pytest.fixture(scope="module", params=["clothing1m", "food101n", "webvision", "folder"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = Case(tmp_path_factory.mktemp(request.param), request.param)
    made.summary = made.run()  # type: ignore[attr-defined]
    return made


@pytest.fixture
def clothing(tmp_path: Path) -> Case:
    return Case(tmp_path, "clothing1m", count=32)


def columns(path: Path) -> dict[str, np.ndarray]:
    table = pq.read_table(path)
    return {name: table[name].to_numpy() for name in table.column_names}


@pytest.mark.parametrize("t", [0, 1])
def test_scores_and_targets_are_those_of_the_predictions(case: Case, t: int) -> None:
    place = case.folder / f"run/iteration-{t}"
    manifest = Manifest.load(case.folder / "run/manifest.parquet")
    noisy = manifest.split("train")
    files = sorted((place / "predictions").glob("*.npy"))
    assert len(files) == (len(case.summary.iterations[0]["trials"]) if t else 2)
    predictions = [np.load(path) for path in files]
    assert all(q.shape == (len(noisy), K) and q.dtype == np.float32 for q in predictions)
    facts = case.summary.iterations[t]["nonconforming"][0]
    recipe = loop.recipes.load(case.folder / "run/recipe.yaml")
    rule = dataclasses.replace(recipe.rule.of(K, 0), alpha=facts["alpha"])
    assert rule.tau == pytest.approx(1 / K - 0.42 / K)
    expected = rule.score(predictions)
    scores = columns(place / "scores.parquet")
    for name in ("critical_alpha", "votes", "nc", "top_class", "top_prob"):
        np.testing.assert_array_equal(scores[name], getattr(expected, name))
    assert facts["nc"] == expected.nc.sum()
    np.testing.assert_array_equal(read_row_list(place / "nc_set.txt", manifest), expected.nc)

    made, used = stages.read_targets(place / "targets.parquet", manifest)
    ratio = manifest.class_ratio()
    np.testing.assert_array_equal(made.dense(), dense_targets(expected, noisy.labels, ratio))
    assert used.all()


@pytest.mark.parametrize("case", ["folder"], indirect=True)
def test_alpha_is_from_the_validation_images(case: Case) -> None:
    place = case.folder / "run/iteration-0/validation"
    predictions = [np.load(path) for path in sorted(place.glob("*.npy"))]
    rule = gk.GenKL(num_classes=K, alpha=1, beta=0.42 / K, sigma=0.7 / K, seed=0)
    critical = rule.score(predictions).critical_alpha
    alpha = case.summary.iterations[0]["nonconforming"][0]["alpha"]
    reached = np.quantile(critical, 0.95, method="higher")
    assert alpha == pytest.approx(reached)
    flagged = dataclasses.replace(rule, alpha=alpha).score(predictions).nc
    np.testing.assert_array_equal(flagged, critical >= reached)


@pytest.mark.parametrize("case", ["folder"], indirect=True)
def test_members_of_folds_predict_what_they_were_not_trained_on(case: Case) -> None:
    recipe = loop.recipes.load(case.folder / "run/recipe.yaml")
    manifest = Manifest.load(case.folder / "run/manifest.parquet")
    noisy = manifest.rows("train")
    for seed in (0, 1):
        place = case.folder / f"run/iteration-0/members/{seed}"
        joined = np.load(case.folder / f"run/iteration-0/predictions/{seed}.npy")
        parts = [np.load(place / f"fold-{f}/predictions.npy") for f in range(recipe.members.folds)]
        assert sum(map(len, parts)) == len(noisy)
        assert {tuple(row) for part in parts for row in part} == {tuple(row) for row in joined}
    records = json.loads((case.folder / "run/records.json").read_text())
    trained = {r["settings"]["rows"] for name, r in records.items() if "/fold-" in name}
    assert len(trained) > recipe.members.folds  # other rows for each fold, to train and to predict


def test_what_a_run_leaves(case: Case) -> None:
    run = case.folder / "run"
    hidden = [p for p in run.rglob("*") if p.name.startswith(".")]
    assert hidden == []
    for name in ("recipe.yaml", "manifest.parquet", "ledger.parquet", "summary.json"):
        assert (run / name).is_file()
    for t in (0, 1):
        for seed in (0, 1):
            place = run / f"iteration-{t}/trial-{seed}/train"
            assert (place / "best.safetensors").is_file()
            assert (place / "metrics.csv").is_file()
        facts = json.loads((run / f"iteration-{t}/summary.json").read_text())
        assert facts["iteration"] == t
        assert len(facts["trials"]) == 2
    whole = json.loads((run / "summary.json").read_text())
    assert whole["stopped"] == "2 iterations are done"
    tested = [trial["train"]["test"]["top1"] for trial in whole["iterations"][1]["trials"]]
    manifest = Manifest.load(run / "manifest.parquet")
    labels = manifest.split("test").labels
    for seed, share in zip((0, 1), tested, strict=True):
        q = np.load(run / f"iteration-1/trial-{seed}/train/test.npy")
        assert share == pytest.approx((q.argmax(1) == labels).mean())


def test_the_same_again_does_nothing(case: Case) -> None:
    again = case.run()
    assert case.done_again() == []
    assert again.iterations == case.summary.iterations
    assert again.baselines == case.summary.baselines


def test_a_run_is_reproducible(case: Case) -> None:
    case.run(out="again")
    first, second = case.folder / "run", case.folder / "again"
    names = [
        path.relative_to(first)
        for path in first.rglob("*")
        if path.suffix in (".npy", ".safetensors", ".txt") or path.name == "targets.parquet"
    ]
    assert len(names) > 10
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    shutil.rmtree(second)


def test_a_changed_setting_runs_again_what_depends_on_it(clothing: Case) -> None:
    clothing.run()
    clothing.run("finetune.optimizer.lr=0.001")
    assert all("finetune" in name for name in clothing.done_again())
    assert len(clothing.done_again()) >= 4
    clothing.run("finetune.optimizer.lr=0.001", "rule.alpha=0.2")
    again = clothing.done_again()
    assert again[0] == "iteration-0/score"
    assert not any("members" in name or "0/predictions" in name for name in again)
    assert "iteration-1/trial-1/train" in again


def test_fewer_seeds_run_again_what_depends_on_them(clothing: Case) -> None:
    clothing.run()
    clothing.run("members.seeds=[0]", "loop.seeds=[1]")
    again = clothing.done_again()
    assert again[0] == "iteration-0/score"
    assert "iteration-1/score" in again
    place = clothing.folder / "run/iteration-1"
    recipe = loop.recipes.load(clothing.folder / "run/recipe.yaml")
    expected = recipe.rule.of(K, 0).score(np.load(place / "predictions/1.npy"))
    found = columns(place / "scores.parquet")["critical_alpha"]
    np.testing.assert_array_equal(found, expected.critical_alpha)


def test_a_moved_data_set_is_no_change(clothing: Case) -> None:
    first = clothing.run("loop.iterations=1")
    clothing.data = clothing.data.rename(clothing.folder / "moved")
    again = clothing.run("loop.iterations=1")
    assert clothing.done_again() == ["scan"]  # the files are looked at once more
    assert again.iterations == first.iterations
    assert Manifest.load(clothing.folder / "run/manifest.parquet").root == str(clothing.data)


def test_leftovers_of_killed_processes_are_removed(clothing: Case) -> None:
    out = clothing.folder / "run"
    clothing.run("loop.iterations=0")
    left = [out / ".scores.0123456789ab.partial.parquet", out / "a/.x.0123456789ab.partial"]
    mine = out / ".notes.partial.txt"
    for path in (*left, mine):
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    clothing.run("loop.iterations=0")
    assert not any(path.exists() for path in left)
    assert mine.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("network.name=resnet19", "resnet18"),
        ("members.predictions=[DATA/short.npy]", r"must have a row for each noisy image.*\(3, 5\)"),
        ("members.weights=[DATA/short.npy]", "checkpoint"),
    ],
)
def test_what_is_given_is_looked_at_first(clothing: Case, setting: str, message: str) -> None:
    np.save(clothing.data / "short.npy", np.full((3, K), 0.2, np.float32))
    with pytest.raises(ValueError, match=message):
        clothing.run(setting.replace("DATA", str(clothing.data)))
    assert [p.name for p in (clothing.folder / "run").iterdir()] == []


def test_a_broken_validation_image_does_not_stop_the_choice_of_alpha(clothing: Case) -> None:
    manifest = Manifest.from_clothing1m(clothing.data)
    Path(manifest.path(manifest.rows("val")[1])).write_bytes(b"no image")
    with pytest.warns(UserWarning):
        summary = clothing.run("data.scan=false", "rule.alpha=null", "loop.iterations=1")
    assert summary.iterations[0]["nonconforming"][0]["alpha"] > 0


def test_more_iterations_go_on(clothing: Case) -> None:
    first = clothing.run("loop.iterations=1")
    second = clothing.run("loop.iterations=2")
    assert second.iterations[0] == first.iterations[0]
    assert all(name.startswith("iteration-1/") for name in clothing.done_again())


def test_given_predictions_average_weights_and_lists(clothing: Case) -> None:
    whole = clothing.run("loop.iterations=1")
    place = clothing.folder / "run/iteration-0"
    files = [place / f"predictions/{seed}.npy" for seed in (0, 1)]
    expected = columns(place / "scores.parquet")

    def scores(*overrides: str) -> dict[str, np.ndarray]:
        clothing.run("loop.iterations=1", *overrides, out="other")
        found = columns(clothing.folder / "other/iteration-0/scores.parquet")
        shutil.rmtree(clothing.folder / "other")
        return found

    given = f"members.predictions=[{files[0]}, {files[1]}]"
    np.testing.assert_equal(scores(given), expected)
    weights = [place / f"members/{seed}/best.safetensors" for seed in (0, 1)]
    np.testing.assert_equal(scores(f"members.weights=[{weights[0]}, {weights[1]}]"), expected)
    average = clothing.folder / "average.npy"
    np.save(average, (np.load(files[0]) + np.load(files[1])) / np.float32(2))
    np.testing.assert_equal(scores(f"members.average={average}"), expected)

    nc_list = clothing.folder / "list.txt"
    keys = Manifest.load(clothing.folder / "run/manifest.parquet").split("train").keys([3, 5])
    nc_list.write_text("\r\n".join(keys))
    clothing.run("loop.iterations=1", given, f"members.nc_list={nc_list}", out="listed")
    kinds = columns(clothing.folder / "listed/iteration-0/targets.parquet")["target"]
    assert np.flatnonzero(kinds == "uniform").tolist() == [3, 5]
    assert len(whole.iterations) == 1
    clothing.run("loop.iterations=1", given, out="listed")
    assert "iteration-0/relabel" in clothing.log_of_work()
    kinds = columns(clothing.folder / "listed/iteration-0/targets.parquet")["target"]
    assert np.flatnonzero(kinds == "uniform").tolist() == np.flatnonzero(expected["nc"]).tolist()


def test_trials_with_members_and_vectors_of_their_own(clothing: Case) -> None:
    clothing.run("members.pick={0: [0], 1: [1, 0]}", "rule.seed=null", "loop.iterations=1")
    place = clothing.folder / "run/iteration-0"
    q = {seed: np.load(place / f"predictions/{seed}.npy") for seed in (0, 1)}
    recipe = loop.recipes.load(clothing.folder / "run/recipe.yaml")
    for seed, picked in ((0, [0]), (1, [1, 0])):
        expected = recipe.rule.of(K, seed).score([q[i] for i in picked])
        found = columns(place / f"trial-{seed}/scores.parquet")
        np.testing.assert_array_equal(found["critical_alpha"], expected.critical_alpha)
        assert (place / f"trial-{seed}/targets.parquet").is_file()
    assert not (place / "scores.parquet").exists()


@pytest.mark.parametrize("scan", ["true", "false"])
def test_broken_images_are_left_out(clothing: Case, scan: str) -> None:
    manifest = Manifest.from_clothing1m(clothing.data)
    broken = {name: manifest.rows(name)[1] for name in ("train", "clean", "val", "test")}
    for row in broken.values():
        Path(manifest.path(row)).write_bytes(b"no image")
    with_warnings = pytest.warns(UserWarning) if scan == "false" else pytest.MonkeyPatch.context()
    with with_warnings:
        summary = clothing.run(f"data.scan={scan}", "loop.iterations=1")
    place = clothing.folder / "run/iteration-0"
    scores = columns(place / "scores.parquet")
    assert np.flatnonzero(np.isnan(scores["critical_alpha"])).tolist() == [1]
    assert not scores["nc"][1]
    assert columns(place / "targets.parquet")["target"][1] == "left out"
    tested = summary.iterations[0]["trials"][0]["train"]["test"]
    assert tested["images"] == len(manifest.rows("test")) - 1
    assert summary.iterations[0]["nonconforming"][0]["left_out"] == 1


def test_a_dry_run_says_what_would_be_done(clothing: Case) -> None:
    planned = clothing.run(dry_run=True).plan
    assert not (clothing.folder / "run").exists()
    names = [p.stage.name for p in planned]
    assert not any(p.done for p in planned)
    clothing.run()
    done = json.loads((clothing.folder / "run/records.json").read_text())
    assert set(done) <= set(names)  # what was better is tested, and nobody knows that before
    assert all(name.endswith("/finetune/test") for name in set(names) - set(done))
    assert all(p.done for p in clothing.run(dry_run=True).plan)
    planned = clothing.run("training.epochs=3", dry_run=True).plan
    todo = [p.stage.name for p in planned if not p.done]
    assert todo[0] == "iteration-0/trial-0/train"
    assert "iteration-1/score" in todo
    assert "iteration-0/members/0" not in todo
    assert next(p for p in planned if not p.done).why == "fit.epochs is 3, was 1"


def test_stops_when_the_nc_set_stays(clothing: Case) -> None:
    # No image at all conforms: the same set each time.
    summary = clothing.run("rule.alpha=0.0001", "loop.iterations=3", "loop.stop_jaccard=0.99")
    assert len(summary.iterations) == 1
    assert "Jaccard index 1.000" in summary.stopped
    assert not (clothing.folder / "run/iteration-1/trial-0").exists()


def test_stops_when_validation_gains_nothing(clothing: Case) -> None:
    summary = clothing.run("loop.iterations=4", "loop.stop_accuracy=1.0")
    assert len(summary.iterations) == 2
    assert summary.stopped.startswith("iteration 1 gained")


def test_parts_can_be_taken_away(clothing: Case) -> None:
    clothing.run("loop.iterations=1", "relabel.uniform=false", "rule.alpha=0.0001")
    place = clothing.folder / "run/iteration-0"
    assert columns(place / "scores.parquet")["nc"].all()
    assert set(columns(place / "targets.parquet")["target"]) == {"double-hot"}
    clothing.run("loop.iterations=1", "relabel.double_hot=false", out="other")
    manifest = Manifest.load(clothing.folder / "run/manifest.parquet")
    made, _ = stages.read_targets(clothing.folder / "other/iteration-0/targets.parquet", manifest)
    rows = np.flatnonzero(~made.nc)
    labels = manifest.split("train").labels
    np.testing.assert_array_equal(made.dense()[rows].argmax(1), labels[rows])
    assert ((made.dense()[rows] > 0).sum(1) == 1).all()


def test_a_folder_of_something_else_is_left_alone(clothing: Case) -> None:
    out = clothing.folder / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"run: out must be .*which holds thesis\.tex"):
        clothing.run()
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]


def test_only_one_at_a_time(clothing: Case) -> None:
    from genkl_ext.files import exclusive

    clothing.run("loop.iterations=0")
    with (
        exclusive(clothing.folder / "run/.lock"),
        pytest.raises(OSError, match="is in use by another process"),
    ):
        clothing.run("loop.iterations=0")


def test_two_processes(clothing: Case) -> None:
    """They predict, to the last bit, what one does, and train together."""
    clothing.run("loop.iterations=1")
    place = clothing.folder / "run/iteration-0"
    weights = ", ".join(str(place / f"members/{seed}/best.safetensors") for seed in (0, 1))
    words = [*TINY, "loop.iterations=1", f"members.weights=[{weights}]"]
    out = clothing.folder / "two"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "genkl_ext.cli.main", "run", "clothing1m", *words),
            *("--data-root", str(clothing.data), "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for seed in (0, 1):
        name = f"iteration-0/predictions/{seed}.npy"
        assert (out / name).read_bytes() == (clothing.folder / "run" / name).read_bytes()
        trial = out / f"iteration-0/trial-{seed}/train"
        assert (trial / "best.safetensors").is_file()
        assert (trial / "metrics.csv").read_text().count("\n") == 2
    for name in ("scores.parquet", "targets.parquet"):
        assert (out / "iteration-0" / name).read_bytes() == (place / name).read_bytes()
    assert [path for path in out.rglob(".*") if path.is_file()] == []
    # What one line says is said once.
    assert done.stdout.count("iteration-0/trial-0/train\n") == 1


def test_a_recipe_object_is_as_good(clothing: Case) -> None:
    recipe = loop.recipes.load("clothing1m", TINY)
    data = dataclasses.replace(recipe.data, root=str(clothing.data))
    few = dataclasses.replace(recipe.loop, iterations=0)
    given = dataclasses.replace(recipe, data=data, loop=few)
    summary = gk.run(given, out=clothing.folder / "run", say=clothing.lines.append)
    assert len(summary.baselines["members"]) == 2
    assert summary.iterations == []
