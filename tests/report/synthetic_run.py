"""The folder of a run, made in a moment: real tables and pictures, and no training.

The data, the recipe and the scores are written by the package; records, summaries and metrics as
``training/loop.py`` and ``engine.py`` write them.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

import genkl_ext as gk
from genkl_ext.data import Manifest
from genkl_ext.training import recipe as recipes

HOSTILE = "<script>alert('class')</script> & $x_{"
NAMES = ("dress", "=hat", HOSTILE, "t-shirt")
SIZES = {"train": 60, "clean": 8, "val": 10, "test": 20}
SEEDS = (0, 1)
WITHOUT_LABEL, WITHOUT_PREDICTION, WITHOUT_FILE = 3, 5, 7  # rows of the noisy images
RULE = gk.GenKL(num_classes=4, alpha=0.9, beta=0.1, sigma=0.05, num_vectors=20, seed=0)
LAST = 1  # iteration


def write(folder: Path, *, names: tuple[str, ...] = NAMES, pictures: bool = True) -> Path:
    """A run of two iterations and two seeds in ``folder / "run"``; the pictures lie beside it."""
    run = folder / "run"
    run.mkdir(parents=True)
    manifest = _data(folder / "data", names, pictures)
    manifest.save(run / "manifest.parquet")
    keys = manifest.split("train").keys()
    (run / "keys.txt").write_text("".join(f"{key}\n" for key in keys), encoding="utf-8")
    settings = recipes.load(
        "demo",
        [
            f"data.root={folder / 'data'}",
            f"data.num_classes={len(names)}",
            f"members.seeds={list(SEEDS)}",
            f"loop.seeds={list(SEEDS)}",
        ],
    )
    (run / "recipe.yaml").write_text(recipes.to_yaml(settings), encoding="utf-8")
    stages: dict[str, Any] = {}
    baselines = {
        name: [_trained(run, stages, f"{place}/{seed}", seed) for seed in SEEDS]
        for name, place in (
            ("noisy", "baselines/noisy"),
            ("both", "baselines/both"),
            ("members", "iteration-0/members"),
        )
    }
    iterations = [_iteration(run, stages, t, manifest) for t in range(LAST + 1)]
    (run / "records.json").write_text(json.dumps(stages))
    summary = {
        "version": gk.__version__,
        "images": SIZES,
        "classes": len(names),
        "unusable": 0,
        "baselines": baselines,
        "iterations": iterations,
        "stopped": f"{LAST + 1} iterations are done",
        "seconds": {name: stage["seconds"] for name, stage in stages.items()},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def stop(run: Path, at: str) -> None:
    """Make it a run that was interrupted in a stage: that and all later ones are not done."""
    records = run / "records.json"
    stages = json.loads(records.read_text())
    names = list(stages)
    for name in names[names.index(at) + 1 :]:
        del stages[name]
    stages[at] = {"state": "begun", "settings": {}, "inputs": []}
    records.write_text(json.dumps(stages))
    (run / "summary.json").unlink()
    for t in range(LAST + 1):
        if f"iteration-{t}/trial-{SEEDS[-1]}/finetune" not in stages:
            (run / f"iteration-{t}/summary.json").unlink()
        if f"iteration-{t}/score" not in stages:
            (run / f"iteration-{t}/scores.parquet").unlink()


def _data(root: Path, names: tuple[str, ...], pictures: bool) -> Manifest:
    stream = np.random.default_rng(1)
    root.mkdir()
    split = np.repeat(list(SIZES), list(SIZES.values()))
    labels = stream.integers(0, len(names), len(split))
    labels[: len(names)] = range(len(names))
    stems = [f"{name}-{i}" for i, name in enumerate(split)]
    stems[0], stems[1] = "=1+2", "<img src=x onerror=alert(1)>"
    table = pa.table(
        {
            "key": stems,
            "path": [f"{i}.jpg" for i in range(len(split))],
            "given_label": pa.array(labels, mask=np.arange(len(labels)) == WITHOUT_LABEL),
            "split": split,
        }
    )
    for i in range(SIZES["train"] if pictures else 0):
        if i == WITHOUT_FILE:
            continue
        picture = np.full((24, 36, 3), 255 * np.array([i % 2, i % 3 / 2, i % 5 / 4]), np.uint8)
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 2 else 1  # turned: 36 high
        Image.fromarray(picture).save(root / f"{i}.jpg", exif=exif)
    return Manifest(table, names, "table", str(root))


def predictions(stream: np.random.Generator, rows: int, k: int) -> NDArray[np.float32]:
    """From nearly one-hot to nearly flat."""
    logits = stream.standard_normal((rows, k)) * stream.choice([0.2, 1.5, 6.0], (rows, 1))
    exp = np.exp(logits)
    return (exp / exp.sum(axis=1, keepdims=True)).astype(np.float32)


def _record(stages: dict[str, Any], name: str, seconds: float, facts: dict[str, Any]) -> None:
    stages[name] = {
        "state": "done", "settings": {}, "inputs": [], "outputs": {}, "facts": facts,
        "seconds": seconds,
    }  # fmt: skip


def _trained(
    run: Path, stages: dict[str, Any], name: str, seed: int, *, improved: bool = True
) -> dict[str, Any]:
    """Files, records and facts of one training."""
    stream = np.random.default_rng([seed, len(name), sum(name.encode())])
    out = run / name
    out.mkdir(parents=True)
    epochs = 3
    accuracies = np.sort(stream.uniform(0.3, 0.9, epochs))
    lines = ["epoch,step,lr,loss,validation_loss,validation_accuracy,seconds"]
    # Validated every second epoch, and after the last.
    for epoch, value in enumerate(accuracies, 1):
        validated = f"{1 - value},{value}" if epoch != 1 else ","
        lines.append(f"{epoch},{10 * epoch},0.1,{2 / epoch},{validated},1.5")
    (out / "metrics.csv").write_text("\n".join(lines) + "\n")
    facts = {"improved": improved, "best_epoch": 3, "best_accuracy": float(accuracies[-1])}
    _record(stages, name, 4.5, facts)
    if not improved:
        return {"seed": seed, **facts, "test": None}
    q = predictions(stream, SIZES["test"], len(NAMES))
    np.save(out / "test.npy", q)
    _record(stages, f"{name}/test", 0.25, {"rows": len(q), "broken": []})
    labels = Manifest.load(run / "manifest.parquet").split("test").labels
    top1 = float((q.argmax(axis=1) == labels).mean())
    tested = {"top1": top1, "top5": 1.0, "images": len(q), "unusable": 0}
    return {"seed": seed, **facts, "test": tested}


def _iteration(run: Path, stages: dict[str, Any], t: int, manifest: Manifest) -> dict[str, Any]:
    place = run / f"iteration-{t}"
    (place / "predictions").mkdir(parents=True, exist_ok=True)
    stream = np.random.default_rng(100 + t)
    members = []
    for seed in SEEDS:
        q = predictions(stream, SIZES["train"], len(NAMES))
        q[WITHOUT_PREDICTION] = np.nan
        members.append(place / f"predictions/{seed}.npy")
        np.save(members[-1], q)
        _record(stages, f"iteration-{t}/predictions/{seed}", 2.0, {"rows": len(q), "broken": []})
    without = np.arange(SIZES["train"]) == WITHOUT_PREDICTION
    scored = gk.score_files(
        members,
        RULE,
        place / "scores.parquet",
        keys=run / "keys.txt",
        nc_list=place / "nc_set.txt",
        leave_out=without,
    )
    _record(stages, f"iteration-{t}/score", 0.5, {"nc": scored.nc_count, "alpha": RULE.alpha})
    _record(stages, f"iteration-{t}/relabel", 0.5, {})
    trials = []
    for seed in SEEDS:
        name = f"iteration-{t}/trial-{seed}"
        trained = _trained(run, stages, f"{name}/train", seed)
        tuned = _trained(run, stages, f"{name}/finetune", seed, improved=seed == 0)
        trials.append({"seed": seed, "train": trained, "finetune": tuned})
    tests = [trial["train"]["test"]["top1"] for trial in trials]
    facts = {
        "iteration": t,
        "nonconforming": [],
        "jaccard": None,
        "trials": trials,
        "test": {"mean": statistics.mean(tests), "sd": statistics.stdev(tests), "seeds": 2},
    }
    (place / "summary.json").write_text(json.dumps({"version": gk.__version__, **facts}))
    return facts
