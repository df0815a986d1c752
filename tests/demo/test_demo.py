"""The whole demo, quickly: what it leaves behind fits together."""

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from genkl_ext import GenKL
from genkl_ext.cli import UsageError
from genkl_ext.cli.demo import demo
from genkl_ext.demo import digits, folder, training
from genkl_ext.relabel import Targets, class_ratio
from genkl_ext.scoring import read_nc_list

SEEDS = (0, 1)
QUICK = training.Settings(steps=20, validate_every=10, fine_tune_steps=5)  # of --quick


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "demo"
    demo(out=path, seeds=len(SEEDS), quick=True)
    return path


@pytest.fixture(scope="module")
def noisy_keys(out):
    return (out / "data/images/noisy_train_key_list.txt").read_text().splitlines()


def load(path):
    network = training.make_network(digits.CLASSES, 0)
    network.load_state_dict(load_file(path))
    return network


def same_weights(network, path):
    weights = network.state_dict()
    return all(torch.equal(weights[key], value) for key, value in load_file(path).items())


def test_nothing_is_missing_and_nothing_is_left_over(out):
    networks = ("best.safetensors", "last.safetensors", "metrics.csv")
    tuned = tuple(f"finetune_{name}" for name in networks)
    expected = {"recipe.yaml", "summary.json", "results.md"}
    expected |= {"critical_alpha.png", "most_nonconforming.png"}
    for seed in SEEDS:
        for name in ("plain", "plain-both", "iteration-0/members"):
            expected |= {f"{name}/{seed}/{file}" for file in networks}
        for t in (0, 1):
            expected.add(f"iteration-{t}/predictions/{seed}.npy")
            expected |= {f"iteration-{t}/trial-{seed}/{file}" for file in networks + tuned}
    for t in (0, 1):
        names = ("scores.parquet", "nc_set.txt", "summary.json")
        expected |= {f"iteration-{t}/{name}" for name in names}
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith("data/")} == expected


@pytest.mark.parametrize("t", [0, 1])
def test_scores_are_those_of_the_saved_predictions(out, noisy_keys, t):
    place = out / f"iteration-{t}"
    table = pq.read_table(place / "scores.parquet")
    column = {name: table[name].to_numpy() for name in table.column_names}
    assert column["key"].tolist() == noisy_keys
    np.testing.assert_array_equal(column["nc"], column["votes"] > 0)
    assert read_nc_list(place / "nc_set.txt") == column["key"][column["nc"]].tolist()

    summary = json.loads((place / "summary.json").read_text())
    rule = GenKL(**summary["rule"])
    predictions = [np.load(place / "predictions" / f"{seed}.npy") for seed in SEEDS]
    assert all(q.dtype == np.float32 for q in predictions)
    scores = rule.score(predictions)
    for name in ("critical_alpha", "divergence", "votes", "nc", "top_class", "top_prob"):
        np.testing.assert_array_equal(column[name], getattr(scores, name))
    assert summary["nc_images"] == column["nc"].sum()
    assert summary["noisy_images"] == len(noisy_keys)


@pytest.mark.parametrize("t", [0, 1])
def test_predictions_are_those_of_the_members(out, splits, t):
    summary = json.loads((out / f"iteration-{t}" / "summary.json").read_text())
    source = "iteration-0/trial-" if t else "iteration-0/members/"
    assert summary["members"] == [f"{source}{seed}/best.safetensors" for seed in SEEDS]
    for seed, member in zip(SEEDS, summary["members"], strict=True):
        q = training.predict(load(out / member), splits["train"])
        saved = np.load(out / f"iteration-{t}" / "predictions" / f"{seed}.npy")
        np.testing.assert_allclose(q, saved, atol=1e-6)


def test_what_each_kind_of_network_was_trained_on(out, splits):
    clean, noisy = splits["clean"], splits["train"]
    sources = {"iteration-0/members": clean, "plain": noisy, "plain-both": noisy + clean}
    for name, split in sources.items():
        again = training.train_plain(split, 8, splits["val"], QUICK, 1, lambda: None)
        assert same_weights(again.last, out / name / "1" / "last.safetensors")


@pytest.mark.parametrize("t", [0, 1])
def test_trials_are_trained_on_the_relabelled_images_and_tuned_on_clean_ones(out, splits, t):
    place = out / f"iteration-{t}"
    rule = GenKL(**json.loads((place / "summary.json").read_text())["rule"])
    scores = rule.score([np.load(place / "predictions" / f"{seed}.npy") for seed in SEEDS])
    noisy, clean, validation = (splits[n] for n in ("train", "clean", "val"))
    targets = Targets.of(scores, noisy.labels, class_ratio(clean.labels, digits.CLASSES))
    trial = training.train_genkl(noisy, targets, clean, validation, QUICK, 1, lambda: None)
    tuned = training.fine_tune(trial, clean, validation, QUICK, 1, lambda: None)
    assert same_weights(trial.best, place / "trial-1/best.safetensors")
    assert same_weights(trial.last, place / "trial-1/last.safetensors")
    assert same_weights(tuned.best, place / "trial-1/finetune_best.safetensors")
    assert same_weights(tuned.last, place / "trial-1/finetune_last.safetensors")
    assert not same_weights(tuned.last, place / "trial-1/best.safetensors")


def test_alpha_comes_from_the_validation_images(out, splits):
    for t in (0, 1):
        summary = json.loads((out / f"iteration-{t}" / "summary.json").read_text())
        members = [load(out / member) for member in summary["members"]]
        q = [training.predict(member, splits["val"]) for member in members]
        critical = GenKL(**summary["rule"]).score(q).critical_alpha
        assert (critical >= summary["rule"]["alpha"] - 1e-5).sum() == 8  # 5 % of 160


def test_the_nc_truth_reaches_no_training(tmp_path, out, monkeypatch):
    """The same run with the truth about the images removed makes the same files."""
    write = digits.write

    def write_and_hide(root, seed, flips):
        write(root, seed, flips)
        for name in ("NC_instances.txt", "true_digit_kv.txt"):
            (root / name).rename(tmp_path / name)

    monkeypatch.setattr(digits, "write", write_and_hide)
    blind = tmp_path / "blind"
    with pytest.raises(FileNotFoundError, match="true_digit_kv"):  # only when it is judged
        demo(out=blind, seeds=len(SEEDS), quick=True)
    compared = 0
    for path in out.rglob("*"):
        inside = path.relative_to(out)
        if path.suffix in (".npy", ".safetensors", ".csv") or path.name == "nc_set.txt":
            assert (blind / inside).read_bytes() == path.read_bytes(), inside
            compared += 1
        if path.suffix == ".parquet":  # its metadata hold the time of the predictions
            assert pq.read_table(blind / inside).equals(pq.read_table(path))
            compared += 1
    assert compared == 2 * (3 * 3 + 2 * 6) + 2 * (2 + 2)


def test_accuracies_are_those_of_the_saved_networks(out, splits):
    summary = json.loads((out / "summary.json").read_text())
    places = {
        "plain, noisy labels": ("plain/{}", ""),
        "plain, noisy and clean labels": ("plain-both/{}", ""),
        "clean labels only": ("iteration-0/members/{}", ""),
        "GenKL iteration 0": ("iteration-0/trial-{}", ""),
        "GenKL iteration 0, fine-tuned": ("iteration-0/trial-{}", "finetune_"),
        "GenKL iteration 1": ("iteration-1/trial-{}", ""),
        "GenKL iteration 1, fine-tuned": ("iteration-1/trial-{}", "finetune_"),
    }
    assert [row["name"] for row in summary["accuracy"]] == list(places)
    test = splits["test"]
    for row in summary["accuracy"]:
        place, prefix = places[row["name"]]
        for kind in ("best", "last"):
            for seed, value in zip(SEEDS, row[kind], strict=True):
                network = load(out / place.format(seed) / f"{prefix}{kind}.safetensors")
                assert training.accuracy(training.predict(network, test), test.labels) == value


def test_identification_is_that_of_the_saved_scores(out, noisy_keys):
    listed = (out / "data/NC_instances.txt").read_text().splitlines()
    truth = np.isin([key.removeprefix("images/") for key in noisy_keys], listed)
    assert truth.sum() == 354
    rows = json.loads((out / "summary.json").read_text())["identification"]
    assert [(row["iteration"], row["score"]) for row in rows] == [
        (t, score) for t in (0, 1) for score in ("GenKL", "entropy")
    ]
    for t in (0, 1):
        table = pq.read_table(out / f"iteration-{t}" / "scores.parquet")
        nc = table["nc"].to_numpy()
        genkl = rows[2 * t]
        assert genkl["flagged"] == pytest.approx(nc.mean(), abs=2e-3)
        assert genkl["recall"] == pytest.approx((nc & truth).sum() / truth.sum(), abs=5e-3)
        assert 0 <= genkl["auroc"] <= 1


def test_metrics_and_recipe(out):
    with open(out / "plain/0/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20]
    assert all(0 <= float(row["validation_accuracy"]) <= 1 for row in rows)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["command"] == "demo"
    assert recipe["seeds"] == list(SEEDS)
    assert recipe["flips"] == "lookalike"
    assert recipe["training"]["objective"]["nnc"] == 32


def test_the_page_says_how_the_rule_was_chosen(out):
    text = (out / "results.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert all(note in text for note in summary["notes"])
    assert "Clothing1M's times 14/8" in text
    assert "the critical alpha that 5 % of the clean validation images reach" in text
    for t in (0, 1):
        rule = json.loads((out / f"iteration-{t}" / "summary.json").read_text())["rule"]
        assert f"{rule['alpha']:.3g}" in text


def test_pictures(out):
    for name in ("critical_alpha.png", "most_nonconforming.png"):
        with Image.open(out / name) as image:
            image.load()
            assert image.width >= 1000
            assert len(set(image.convert("L").resize((50, 50)).tobytes())) > 5  # not blank


def test_an_earlier_run_is_replaced_and_nothing_else(tmp_path):
    out = tmp_path / "runs" / "demo"
    folder.prepare(out, {"seeds": [0]})
    stale = ["iteration-0/trial-9/best.safetensors", "summary.json", ".summary.1a.partial.json"]
    mine = ["notes.txt", ".git/HEAD", "iteration.md", "photo.png"]
    for name in stale + mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("")
    folder.prepare(out, {"seeds": [1]})
    assert not any((out / name).exists() for name in stale)
    assert all((out / name).exists() for name in mine)
    assert yaml.safe_load((out / "recipe.yaml").read_text()) == {"command": "demo", "seeds": [1]}


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="^demo: out must be a new or empty folder"):
        demo(out=tmp_path, quick=True)
    (tmp_path / "recipe.yaml").write_text("command: run\n")
    with pytest.raises(ValueError, match="^demo: out must be a new or empty folder"):
        demo(out=tmp_path, quick=True)
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(FileExistsError, match="^demo: cannot make the folder .*file: File exists"):
        demo(out=taken, quick=True)


def test_bad_options():
    for options in ({"seeds": 0}, {"seeds": 65}, {"seed": -1}):
        with pytest.raises(UsageError, match="must"):
            demo(**options)
