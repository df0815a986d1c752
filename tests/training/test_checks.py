import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from genkl_ext.data import Manifest
from genkl_ext.data.published import write_class_ratio
from genkl_ext.training import checks
from genkl_ext.training.recipe import check, check_against, load, names


def manifest(k: int = 14, **sizes: int) -> Manifest:
    """As many rows of each split as are said, with labels in turn."""
    splits = [split for split, size in sizes.items() for _ in range(size)]
    labels = [i % k for size in sizes.values() for i in range(size)]
    keys = [f"{i}.jpg" for i in range(len(splits))]
    columns = {"key": keys, "path": keys, "given_label": labels, "split": splits}
    return Manifest(pa.table(columns), tuple(map(str, range(k))), "drawn", "/nowhere")


WHOLE = {"train": 60, "clean": 30, "val": 20, "test": 20}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that settings can name files in."""
    for name in ("a", "b", "c"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(name: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        check(load(name, ["data.root=.", *overrides]))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", names())
def test_bundled_recipes_need_only_a_root(name: str, files: Path) -> None:
    with warnings.catch_warnings():
        # It gives a member twice (trap R15).
        warnings.simplefilter("ignore" if name == "published/food101n" else "error")
        check(load(name, ["data.root=."]))
        check(load(name, ["data.root=https://example.org/images.csv"]))
    assert "data.root must be given" in problem(name, "data.root=''")
    assert "data.root must be there, got ./nowhere" in problem(name, "data.root=./nowhere")


# Every number has its range; the edges are tried from both sides.
INSIDE = {
    "epochs": [1], "batch_size": [2], "optimizer.lr": [1e-9], "optimizer.momentum": [0.99],
    "optimizer.weight_decay": [0], "schedule.patience": [0], "schedule.factor": [0.01, 0.99],
    "validate_every": [1],
}  # fmt: skip
OUTSIDE = {
    "epochs": [0, -1], "batch_size": [1, 0], "optimizer.lr": [0, -1, ".inf", ".nan"],
    "optimizer.momentum": [1, -0.1], "optimizer.weight_decay": [-1e-9, ".inf"],
    "schedule.patience": [-1], "schedule.factor": [0, 1], "validate_every": [0],
}  # fmt: skip
RANGES = {
    "data.num_classes": ([2, 33], [1, 0]),
    "data.threads": ([1], [0]),
    "rule.alpha": ([0, 3.5], [-0.1, ".nan"]),
    "rule.beta": ([-0.1, 0, 0.07], [".inf", 1 / 14, 0.5]),
    "rule.sigma": ([0, 5], [-0.1]),
    "rule.num_vectors": ([1], [0]),
    "rule.seed": ([0, 2**32 - 1], [-1, 2**32]),
    "rule.flag_validation": ([0.001, 0.999], [0, 1]),
    "training.omega_clean": ([0], [-1]),
    "training.omega_nnc": ([0], [-1]),
    "training.omega_nc": ([0], [-1]),
    "training.loss_scale": ([1e-9], [0, -1]),
    "training.mixup_alpha": ([-1, 0, 8], [".inf", ".nan"]),
    "training.clean_threshold": ([0, 1], [-0.1, 1.1]),
    "finetune.loss_scale": ([1e-9], [0]),
    "finetune.clean_threshold": ([0, 1], [1.1]),
    "loop.iterations": ([0], [-1]),
    "loop.stop_accuracy": ([0, 1], [-0.1, 2]),
    "loop.stop_jaccard": ([1], [0, 1.1]),
    "engine.accumulate": ([1], [0]),
    "engine.clip": ([0.1], [0]),
    "engine.ema": ([0.999], [0, 1, 1.5]),
    "engine.save_every": ([1], [0]),
    "engine.log_every": ([1], [0]),
    "engine.predict_batch_size": ([1], [0]),
    **{
        f"{part}.{name}": (INSIDE[name], OUTSIDE[name])
        for part in ("members", "training", "finetune")
        for name in INSIDE
    },
    "finetune.epochs": ([0], [-1]),
}


def test_every_number_has_a_range() -> None:
    assert RANGES.keys() == checks._RANGES.keys()


@pytest.mark.parametrize("key", RANGES)
def test_ranges(key: str, files: Path) -> None:
    inside, outside = RANGES[key]
    several = ["data.num_classes=14"] if key != "data.num_classes" else []
    for value in inside:
        check(load("clothing1m", ["data.root=.", *several, f"{key}={value}"]))
    for value in outside:
        said = problem("clothing1m", *several, f"{key}={value}")
        assert re.match(rf"recipe: {re.escape(key)} must be .*, got ", said)


@pytest.mark.parametrize(
    "overrides, said",
    [
        # C4, C6: nothing to begin with
        (["members.seeds=[]"], r"there are no members: give members\.seeds \(to train them\), w"),
        (
            ["members.seeds=[]", "members.nc_list=a"],
            r"members\.nc_list says .* but the targets of the others need predictions: give",
        ),
        (
            ["members.average=a", "members.predictions=[b]"],
            r"members\.predictions and members\.average are given; give one of them",
        ),
        (
            ["members.average=a", "members.weights=[b]"],
            r"members\.weights and members\.average are given",
        ),
        (
            ["members.predictions=[a]", "members.weights=[b]"],
            r"members\.weights and members\.predictions are given",
        ),
        (["members.average=x"], r"members\.average must be a file, got 'x'"),
        (["members.weights=[a, x]"], r"members\.weights must be a file, got 'x'"),
        (["members.predictions=[.]"], r"members\.predictions must be a file, got '\.'"),
        (["members.nc_list=x"], r"members\.nc_list must be a file, got 'x'"),
        (["relabel.ratio_file=x"], r"relabel\.ratio_file must be a file, got 'x'"),
        (["members.seeds=[3, 1, 3]"], r"members\.seeds must not repeat a seed, got \[3, 1, 3\]"),
        (["members.seeds=[-1]"], r"members\.seeds must be at least 0 and at most 4294967295"),
        (
            ["members.seeds=[" + ", ".join(map(str, range(65))) + "]"],
            r"members must be at most 64, got 65",
        ),
        (
            ["members.source=folds", "members.folds=1"],
            r"members\.folds must be at least 2, got 1",
        ),
        # Which members
        (
            ["members.pick={1: [0, 7]}"],
            r"members\.pick of trial 1 must be among members\.seeds \[0, 1, 2, 3, 4\], "
            r"got \[0, 7\]",
        ),
        (["members.pick={1: []}"], r"members\.pick of trial 1 must be among .*, got \[\]"),
        (
            ["members.weights=[a, b]", "members.pick={0: [1, 2]}"],
            r"members\.pick of trial 0 must be numbers of the given files, from 0, \[0, 1\], "
            r"got \[1, 2\]",
        ),
        (["members.average=a", "members.pick={0: [0]}"], r"members\.pick chooses members, and"),
        # The rule
        (["data.num_classes=null", "rule.beta=0.5"], r"rule\.beta must be below 1/k = 0\.5 for at"),
        (
            ["data.num_classes=101"],
            r"rule\.beta must be below 1/k = 0\.00990099 for 101 classes, so that tau = 1/k - "
            r"beta is positive, got 0\.03",
        ),
        (["rule.alpha=null", "members.average=a"], r"rule\.alpha=null needs the members' weights"),
        (["rule.alpha=null", "members.predictions=[a]"], r"rule\.alpha=null needs the members'"),
        # Targets
        (
            ["relabel.ratio_file=a", "relabel.ratio_splits=[clean]"],
            r"relabel\.ratio_file and relabel\.ratio_splits both say",
        ),
        (
            ["relabel.ratio_splits=[clean, test]"],
            r"relabel\.ratio_splits must be of train, clean, val, got 'test'",
        ),
        # Trainings
        (
            ["training.optimizer.momentum=0"],
            r"training\.optimizer\.nesterov needs momentum, got 0; set nesterov to false",
        ),
        (
            ["training.omega_clean=0", "training.omega_nnc=0", "training.omega_nc=0"],
            r"training\.omega_clean, omega_nnc and omega_nc must not all be 0",
        ),
        (
            ["training.start=member", "members.predictions=[a, b]"],
            r"training\.start=member needs the weights of a member",
        ),
        (
            ["training.start=member", "members.average=a"],
            r"training\.start=member needs the weights of a member",
        ),
        # The loop and the machine
        (["loop.seeds=[]"], r"loop\.seeds must hold a seed for each trial, got none"),
        (["loop.seeds=[1, 1]"], r"loop\.seeds must not repeat a seed, got \[1, 1\]"),
        (
            ["loop.seeds=[" + ", ".join(map(str, range(65))) + "]"],
            r"trials, which are the members of the next iteration, must be at most 64, got 65",
        ),
        (["loop.iterations=0", "members.weights=[a]"], r"loop\.iterations=0 trains the members"),
        (
            ["engine.precision=16-mixed", "engine.accelerator=cpu"],
            r"engine\.precision=16-mixed needs a GPU",
        ),
        (["data.eval.flip=0.5"], r"data\.eval must give the same pixels each time.*flip 0\.5"),
        (["data.eval.crop=random"], r"data\.eval must give the same pixels .* got crop random"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], said: str, files: Path) -> None:
    assert re.match("recipe: " + said, problem("clothing1m", *overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        ["members.average=a"],
        ["members.predictions=[a, b]", "members.nc_list=c"],
        ["members.weights=[a, b]", "members.pick={0: [1, 0]}", "rule.alpha=null"],
        ["members.weights=[a]", "training.start=member"],
        ["members.seeds=[]", "members.weights=[a]"],
        ["members.pick={17: [4]}", "loop.seeds=[17, 2]"],
        ["members.average=a", "loop.iterations=0", "loop.baselines=[noisy]"],
        ["loop.iterations=0", "loop.seeds=[]"],
        ["training.optimizer={momentum: 0, nesterov: false}"],
        ["training.optimizer={name: adamw, momentum: 0}"],
        ["training.omega_clean=0", "training.omega_nc=0"],
        ["relabel.ratio_splits=[train, clean, val]"],
        ["relabel.ratio_file=a"],
        ["data.num_classes=null", "rule.beta=0.45"],
        ["data.num_classes=500", "rule.beta=null", "rule.sigma=null"],
        ["engine.precision=16-mixed"],
    ],
)
def test_what_can_work_is_not_refused(overrides: list[str], files: Path) -> None:
    check(load("clothing1m", ["data.root=.", *overrides]))


def test_settings_that_would_be_ignored_are_refused(files: Path) -> None:
    assert problem("clothing1m", "members.pick={17: [4]}") == (
        "recipe: members.pick names trial 17, and loop.seeds are [0, 1, 2]; leave it out, or "
        "members.pick={} to use all members"
    )
    overrides = ["relabel.double_hot=false", "compatibility.ratio_broadcast=true"]
    assert "the same for every class" in problem("clothing1m", *overrides)


def test_a_member_that_counts_twice_is_told(files: Path) -> None:
    with pytest.warns(UserWarning, match=r"members\.pick of trial 0 \[1, 2, 3, 4, 4\] has a mem"):
        check(load("published/food101n", ["data.root=."]))
    with pytest.warns(UserWarning, match=r"members \['a', 'b', 'a'\] has a member more than once"):
        check(load("clothing1m", ["data.root=.", "members.weights=[a, b, a]"]))


def test_a_logger_that_is_not_installed(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    assert problem("clothing1m", "engine.loggers=[csv, wandb]") == (
        "recipe: engine.loggers: wandb needs a package that is not here: pip install wandb"
    )
    monkeypatch.setattr(checks, "find_spec", lambda name: name == "tensorboardX" or None)
    check(load("clothing1m", ["data.root=.", "engine.loggers=[tensorboard]"]))


# Against a data set


def against(data: Manifest, name: str, *overrides: str) -> str:
    """What is said against a recipe; "" if nothing."""
    try:
        check_against(load(name, overrides), data)
    except ValueError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


@pytest.mark.parametrize("name", names())
def test_bundled_recipes_fit_their_data_sets(name: str) -> None:
    k = load(name).data.num_classes or 5
    splits = {"train": 2 * k, "clean": 2 * k, "val": k, "test": k}
    if name.endswith("webvision"):
        splits = {"train": 2 * k, "test": k}
    if name == "folder":
        splits = {"train": 4 * k, "val": k}
    assert against(manifest(k, **splits), name) == ""
    assert "data.num_classes must be that of the data set" in against(
        manifest(k + 1, **splits), name, f"data.num_classes={k}"
    )


@pytest.mark.parametrize(
    "lacking, name, overrides, said",
    [
        ("train", "clothing1m", [], "the data set must have noisy images (split train), got none"),
        ("clean", "clothing1m", [],
         "members.source=clean needs verified images (split clean), and the data set has none; "
         "use members.source=folds or noisy"),
        ("clean", "clothing1m", ["members.source=noisy"],
         "training.clean=loader needs verified images (split clean), and the data set has none; "
         "use training.clean=dynamic"),
        ("clean", "food101n", ["members.source=folds"], "training.clean=joint needs verified"),
        ("clean", "clothing1m", ["members.source=noisy", "training.clean=dynamic"],
         "finetune.clean=split needs verified images (split clean), and the data set has none; "
         "use finetune.clean=dynamic, or finetune.epochs=0"),
        ("clean", "folder", ["loop.baselines=[both]"], "loop.baselines=[both] needs verified"),
        ("clean", "folder", ["relabel.ratio_splits=[clean]"],
         "relabel.ratio_splits=clean needs verified images"),
        ("val", "clothing1m", [],
         "members.schedule=plateau needs validation images (split val), and the data set has "
         "none; use members.schedule.name=cosine"),
        ("val", "clothing1m", ["members.schedule.name=cosine"], "training.schedule=plateau needs"),
        ("val", "food101n", ["members.schedule.name=cosine"], "finetune.schedule=plateau needs"),
        ("val", "folder", [], "rule.alpha=null needs validation images (split val), and the data "
         "set has none; set some images apart for it, or give rule.alpha"),
        ("val", "folder", ["rule.alpha=1", "loop.stop_accuracy=0.001"],
         "loop.stop_accuracy needs validation images"),
    ],
)  # fmt: skip
def test_splits_that_settings_need(
    lacking: str, name: str, overrides: list[str], said: str
) -> None:
    k = load(name).data.num_classes or 14
    splits = {split: 2 * k for split in WHOLE if split != lacking}
    assert against(manifest(k, **splits), name, *overrides).startswith(f"recipe: {said}")


@pytest.mark.parametrize(
    "lacking, overrides",
    [
        ("clean", ["members.source=folds", "training.clean=dynamic", "finetune.clean=dynamic"]),
        ("clean", ["members.source=noisy", "training.clean=dynamic", "finetune.epochs=0"]),
        ("clean", ["members.weights=[a]", "training.clean=dynamic", "finetune.clean=dynamic"]),
        ("clean", ["members.source=noisy", "loop.iterations=0"]),
        ("val", ["members.schedule.name=constant", "training.schedule.name=cosine"]),
        ("val", ["members.average=a", "training.schedule.name=cosine"]),
        ("val", ["members.schedule.name=cosine", "loop.iterations=0"]),
        ("test", []),
    ],
)
def test_splits_that_nobody_needs(lacking: str, overrides: list[str], files: Path) -> None:
    sizes = {split: size for split, size in WHOLE.items() if split != lacking}
    assert against(manifest(**sizes), "clothing1m", *overrides) == ""


def test_the_rule_is_held_against_the_classes() -> None:
    said = against(manifest(40, **WHOLE), "clothing1m", "data.num_classes=null")
    assert said.startswith("recipe: rule.beta must be below 1/k = 0.025 for 40 classes")
    sizes = {"train": 80, "clean": 80, "val": 40}
    usual = ["data.num_classes=null", "rule.beta=null", "rule.sigma=null"]
    assert against(manifest(40, **sizes), "clothing1m", *usual) == ""
    assert "at least 2 classes, got 1" in against(manifest(1, **WHOLE), "folder")


def test_batches_need_two_images() -> None:
    def said(*overrides: str, **sizes: int) -> str:
        usual = ["data.num_classes=null", "rule.beta=0.3", *overrides]
        return against(manifest(2, **{**WHOLE, **sizes}), "clothing1m", *usual)

    assert said(clean=2) == ""  # one batch of two, however large a batch may be
    assert said(clean=1).startswith("recipe: members needs at least 2 images of clean, which make")
    noisy = "members.source=noisy"
    assert said(noisy, clean=1).startswith("recipe: training.clean=loader needs at least 2 images")
    joint = [noisy, "training.clean=joint"]
    assert said(*joint, clean=1).startswith("recipe: finetune needs at least 2 images of clean")
    ratio = ["relabel.ratio_splits=[train]", "finetune.epochs=0"]
    assert said(*joint, *ratio, clean=1) == ""
    assert said("members.weights=[a]", train=1).startswith("recipe: training needs at least 2")


def test_folds_need_images() -> None:
    data = manifest(5, train=12, val=5)
    assert against(data, "folder", "members.folds=3") == ""
    assert against(data, "folder", "members.folds=4") == (
        "recipe: members.folds must be at most the 3 images of the largest class, got 4"
    )
    given = ["members.folds=4", "members.weights=[a]"]
    assert against(data, "folder", *given) == ""


def test_the_class_ratio_needs_every_class(tmp_path: Path) -> None:
    data = manifest(14, train=60, clean=13, val=20)  # no verified image of the last class
    said = against(data, "clothing1m")
    assert said.startswith("recipe: relabel.ratio_splits must be splits that hold every class")
    assert "got no image of class 13" in said
    assert against(data, "clothing1m", "relabel.ratio_splits=[train]") == ""
    assert against(data, "clothing1m", "loop.iterations=0") == ""

    path = tmp_path / "ratio.txt"
    write_class_ratio(path, np.full(14, 1 / 14))
    assert against(data, "clothing1m", f"relabel.ratio_file={path}") == ""
    write_class_ratio(path, np.full(13, 1 / 13), "vector")
    assert against(data, "clothing1m", f"relabel.ratio_file={path}") == (
        "recipe: relabel.ratio_file must be of 14 classes, got 13 in it"
    )


def test_an_nc_list_must_be_of_the_noisy_images(tmp_path: Path) -> None:
    path = tmp_path / "nc_set.txt"
    path.write_text("3.jpg\n")
    data = manifest(**WHOLE)
    assert against(data, "clothing1m", f"members.nc_list={path}") == ""
    path.write_text("3.jpg\n61.jpg\n")  # verified
    with pytest.raises(KeyError, match="each line must be a key of the noisy images"):
        against(data, "clothing1m", f"members.nc_list={path}")
