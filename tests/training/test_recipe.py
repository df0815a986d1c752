import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from genkl_ext.data import Transforms
from genkl_ext.rule import GenKL
from genkl_ext.training import recipe as recipes
from genkl_ext.training.recipe import load, to_yaml
from genkl_ext.training.settings import (
    Compatibility,
    Data,
    Members,
    Network,
    Optimizer,
    Recipe,
    Rule,
    Schedule,
    Training,
)

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs/compatibility.md"
NAMES = [
    "clothing1m",
    "clothing1m-members",
    "demo",
    "folder",
    "food101n",
    "webvision",
    "published/clothing1m",
    "published/food101n",
    "published/webvision",
]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refused(source: Any, *overrides: str) -> str:
    """What a recipe is refused with: one line."""
    with pytest.raises(ValueError) as caught:
        load(source, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


bundled = functools.cache(load)


def setting(recipe: Any, key: str) -> Any:
    for name in key.split("."):
        recipe = getattr(recipe, name)
    return recipe


# The command-line defaults of the published programs, from the table of hyper-parameters
# (reference: GenKL, section 8). A dash in the table, here None, is a setting the program lacks.
TABLE = [
    # clothing1m: members, training; food101n; webvision
    ("data.num_classes", 14, 101, 50),
    ("training.mixup_alpha", 0.5, -1, 3.0),
    ("rule.alpha", 1.05, 1.1, 0.9),
    ("rule.beta", 0.03, 0.008, 0.015),
    ("rule.sigma", 0.05, 0.0, 0.05),
    ("rule.num_vectors", 20, 20, 20),
    ("training.omega_clean", 1, 20, 10),
    ("training.omega_nnc", 32, 100, 32),
    ("training.omega_nc", 1, 1, 4),
    ("training.clean_threshold", None, None, 0.5),
    ("training.epochs", 20, 40, 300),
    ("training.batch_size", 32, 128, 32),
    ("training.optimizer.name", "sgd", "sgd", "sgd"),
    ("training.optimizer.lr", 0.001, 0.001, 0.01),
    ("training.optimizer.momentum", 0.9, 0.9, 0.9),
    ("training.optimizer.nesterov", True, True, False),
    ("training.optimizer.weight_decay", 1e-3, 5e-3, 1e-4),
    ("training.schedule.name", "plateau", "cosine", "cosine"),
    ("training.schedule.patience", 3, None, None),
    ("training.schedule.factor", 0.1, None, None),
    ("training.loss_scale", None, None, None),
    ("finetune.epochs", 25, 40, 50),
    ("finetune.optimizer.name", "adam", None, "adam"),
    ("finetune.optimizer.lr", 5e-7, None, 5e-7),
    ("finetune.optimizer.weight_decay", 1e-3, None, 1e-3),
    ("finetune.schedule.name", "constant", "plateau", "constant"),
    ("finetune.schedule.patience", None, 4, None),
    ("network.name", "resnet50", "resnet50", "resnet50"),
    ("network.pretrained", "IMAGENET1K_V1", "IMAGENET1K_V1", ...),
    ("data.train.resize", 256, 256, 320),
    ("data.train.size", 224, 224, 299),
    ("data.train.crop", "random", "random", "random_resized"),
    ("data.train.flip", 0.5, 0.5, 0.5),
    ("data.train.rotation", 0, 30, 0),
    ("data.eval.resize", 256, 256, 320),
    ("data.eval.size", 224, 224, 299),
    ("data.eval.crop", "center", "center", "center"),
    # The fields of section 5's table.
    ("training.clean", "loader", "joint", "dynamic"),
    ("training.start", "pretrained", "pretrained", "member"),
    ("finetune.clean", "split", "split", "dynamic"),
]
MEMBERS = [
    ("epochs", 30),
    ("batch_size", 32),
    ("optimizer", Optimizer("sgd", 0.01, 0.9, True, 1e-3)),
    ("schedule", Schedule("plateau", 4, 0.1)),
    ("source", "clean"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0])
def test_recipes_have_the_published_hyper_parameters(row: tuple[str, Any, Any, Any]) -> None:
    key, *wanted = row
    for name, value in zip(("clothing1m", "food101n", "webvision"), wanted, strict=True):
        for published in (name, f"published/{name}"):
            if value is not None:
                assert setting(bundled(published), key) == (None if value is ... else value)


@pytest.mark.parametrize("key, value", MEMBERS)
def test_members_have_those_of_the_clean_subset_trainer(key: str, value: Any) -> None:
    for name in ("clothing1m", "clothing1m-members", "published/clothing1m"):
        assert setting(bundled(name).members, key) == value


@pytest.mark.parametrize("name", ["clothing1m", "food101n", "webvision"])
def test_rule_and_transforms_are_the_presets(name: str) -> None:
    recipe = load(name)
    preset = GenKL.preset(name)
    assert recipe.data.num_classes == preset.num_classes
    assert recipe.rule.of(preset.num_classes, 7) == preset
    assert load(f"published/{name}").rule.of(preset.num_classes, 7).seed == 7
    assert recipe.data.layout == name
    assert recipe.data.train == Transforms.preset(name, "train")  # type: ignore[arg-type]
    assert recipe.data.eval == Transforms.preset(name, "eval")


def test_published_recipes_turn_on_the_slips_of_their_program() -> None:
    def on(name: str) -> dict[str, Any]:
        switches = dataclasses.asdict(load(name).compatibility)
        usual = dataclasses.asdict(Compatibility())
        return {key: value for key, value in switches.items() if value != usual[key]}

    assert on("published/clothing1m") == {
        "nc_target": "averaged",
        "unpermuted_prior": True,
        "members_eval_mode": True,
        "separate_passes": True,
        "last_batch_validation_loss": True,
    }
    assert on("published/food101n") == {
        "unpermuted_prior": True,
        "finetune_lr_zero": True,
        "separate_passes": True,
    }
    assert on("published/webvision") == {
        "ratio_broadcast": True,
        "unpermuted_prior": True,
        "float16_predictions": True,
    }
    for name in NAMES[:-3]:
        assert on(name) == {}

    tuning = {name: load(name).finetune for name in NAMES}
    for name in NAMES[-3:]:  # T7
        assert tuning[name].loss_scale is None
        assert tuning[name.removeprefix("published/")].loss_scale == 1.0
    assert tuning["published/clothing1m"].beat_training  # R14
    assert not tuning["published/food101n"].beat_training
    assert tuning["webvision"].without_nc and not tuning["published/webvision"].without_nc  # T10

    clothing, food = load("published/clothing1m"), load("published/food101n")
    assert clothing.members.pick == {0: [1, 2, 4, 7, 9], 1: [19, 2, 4, 7, 9], 2: [1, 9, 4, 7, 19]}
    assert clothing.loop.seeds == [0, 1, 2]
    assert food.members.pick == {0: [1, 2, 3, 4, 4]}
    assert food.loop.seeds == [0]
    assert load("published/webvision").loop.seeds == [42]


@pytest.mark.skipif(not DOCUMENT.is_file(), reason="docs are in the source tree only")
def test_the_documented_switches_are_those_of_the_recipes() -> None:
    text = DOCUMENT.read_text()
    switches = text.partition("## Switches")[2].partition("##")[0]
    rows = re.findall(r"^\| `(\w+)(?:: \w+)?` \|.*\| ([^|]*) \|$", switches, re.MULTILINE)
    documented = {switch: set(on.split(", ")) for switch, on in rows}
    usual = Compatibility()
    assert documented == {
        field.name: {
            name
            for name in ("clothing1m", "food101n", "webvision")
            if getattr(load(f"published/{name}").compatibility, field.name)
            != getattr(usual, field.name)
        }
        for field in dataclasses.fields(Compatibility)
    }
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text()), (file, name)


def test_names_are_listed_with_their_first_line() -> None:
    found = recipes.names()
    assert list(found) == NAMES
    assert found["food101n"].startswith("Food-101N: 310,009 web images of 101 dishes")
    assert all(line and not line.startswith("#") for line in found.values())


@pytest.mark.parametrize("name", NAMES)
def test_yaml_gives_the_recipe_back(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    text = to_yaml(recipe)
    assert load(write(tmp_path / "a.yaml", text)) == recipe
    # Any reader of YAML 1.1 finds all settings, in their order.
    plain = yaml.safe_load(text)
    assert list(plain) == [field.name for field in dataclasses.fields(Recipe)]
    assert list(plain["training"])[:5] == [
        "epochs", "batch_size", "optimizer", "schedule", "validate_every",
    ]  # fmt: skip
    assert plain["members"]["seeds"] == recipe.members.seeds
    assert plain["finetune"]["optimizer"]["lr"] == recipe.finetune.optimizer.lr


TEXT = st.sampled_from(
    [
        "",
        "1e5",
        "5e-7",
        "1.5e3",
        "yes",
        "~",
        "null",
        "12",
        "a: b",
        "#",
        "- x",
        "ä",
        "\t",
        "a\nb",
        "'",
    ]
)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(
    root=TEXT,
    options=st.dictionaries(TEXT, PLAIN, max_size=3),
    lr=st.floats(allow_nan=False),
    weights=st.lists(TEXT.filter(bool), max_size=3),
    pick=st.dictionaries(st.integers(), st.lists(st.integers()), max_size=2),
)
def test_yaml_gives_odd_values_back(
    tmp_path_factory: pytest.TempPathFactory,
    root: str,
    options: dict[str, Any],
    lr: float,
    weights: list[str],
    pick: dict[int, list[int]],
) -> None:
    recipe = Recipe(
        data=Data(root=root),
        network=Network(options=options),
        members=Members(weights=weights, pick=pick, optimizer=Optimizer(lr=lr)),
        rule=Rule(alpha=None, beta=None),
    )
    path = tmp_path_factory.getbasetemp() / "odd.yaml"
    assert load(write(path, to_yaml(recipe))) == recipe
    assert load(recipe) == recipe


def test_yaml_has_no_form_for_an_object() -> None:
    recipe = Recipe(network=Network(options={"norm": Transforms}))
    with pytest.raises(ValueError, match=r"network\.options must be numbers, text, lists"):
        to_yaml(recipe)


# Reading


def test_what_is_left_out_keeps_its_default(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml",
        "data: {train: {size: 200}}\nfinetune:\n  optimizer:\n    lr: 1e-5\nloop:\n  # nothing\n",
    )
    usual = Recipe()
    recipe = load(path)
    assert recipe.data.train == dataclasses.replace(usual.data.train, size=200)
    assert recipe.finetune.optimizer == dataclasses.replace(usual.finetune.optimizer, lr=1e-5)
    assert recipe.loop == usual.loop
    assert load(write(path, "")) == usual
    assert load(write(path, "\N{ZERO WIDTH NO-BREAK SPACE}# nothing yet\n")) == usual


def test_overrides(tmp_path: Path) -> None:
    recipe = load(
        "clothing1m",
        [
            "training.omega_nnc=16",
            "training.omega_nnc=8",
            "training.optimizer={name: adamw, lr: 2e-4}",
            "members.seeds=[3, 4]",
            "members.pick={0: [3, 4, 4]}",
            "members.average=null",
            "network.options={a: '1', b: [x]}",
            "rule.alpha=null",
            "engine.clip=1",
            "data.train.scale=[0.25, 1]",
        ],
    )
    usual = load("clothing1m")
    assert recipe.training == dataclasses.replace(
        usual.training,
        omega_nnc=8.0,
        optimizer=dataclasses.replace(usual.training.optimizer, name="adamw", lr=2e-4),
    )
    assert recipe.members == dataclasses.replace(usual.members, seeds=[3, 4], pick={0: [3, 4, 4]})
    assert recipe.network.options == {"a": "1", "b": ["x"]}
    assert recipe.rule.alpha is None
    assert recipe.engine.clip == 1.0
    assert recipe.data.train.scale == (0.25, 1.0)


@pytest.mark.parametrize("root", ["2024", "@home", "a: b", "null", "1e5", "[x", "/data/x=y", "yes"])
def test_text_needs_no_quotes_in_an_override(root: str) -> None:
    assert load("folder", [f"data.root={root}"]).data.root == root
    assert load("folder", [f'data.root="{root}"']).data.root == root


def test_bundled_recipes_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder is no recipe
    assert load("demo.yaml") == load("demo")
    write(tmp_path / "demo.yaml", "loop: {iterations: 7}")
    assert load("demo.yaml").loop.iterations == 7
    assert load("demo").loop.iterations == 2
    assert load(Path("demo.yaml")).loop.iterations == 7


def test_extends(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", "extends: webvision\ntraining: {epochs: 3}\n")
    mine = write(tmp_path / "mine.yaml", "extends: base.yaml\nmembers: {optimizer: {lr: 0.5}}\n")
    usual = load("webvision")
    recipe = load(mine)
    assert recipe.training == dataclasses.replace(usual.training, epochs=3)
    optimizer = dataclasses.replace(usual.members.optimizer, lr=0.5)
    assert recipe.members == dataclasses.replace(usual.members, optimizer=optimizer)
    assert recipe.rule == usual.rule

    write(base, "extends: mine.yaml\n")
    assert re.search(r"base\.yaml: extends must not lead back to itself", refused(mine))
    write(base, "extends: bse\n")
    assert f"{base}: extends must be a YAML file or one of clothing1m," in refused(mine)
    write(base, "extends: [a]\n")
    assert refused(mine) == f"{base}: extends must be the name of a recipe, got ['a']"
    write(base, "training: {epochs: few}\n")
    assert refused(mine) == f"{base}: training.epochs must be an integer, got 'few'"


# Refusing


@pytest.mark.parametrize(
    "override, unknown, near",
    [
        ("training.omga_nnc=3", "training.omga_nnc", "training.omega_nnc"),
        ("trianing.omega_nnc=3", "trianing", "training"),
        ("training.optimiser.lr=3", "training.optimiser", "training.optimizer"),
        ("training.lr=3", "training.lr", "training.optimizer.lr"),
        ("training.optimizer.rate=3", "training.optimizer.rate", None),
        ("omega_nnc=3", "omega_nnc", "training.omega_nnc"),
        ("mixup_alpha=3", "mixup_alpha", "training.mixup_alpha"),
        ("training.beta=3", "training.beta", "rule.beta"),
        ("epochs=3", "epochs", "members.epochs or training.epochs or finetune.epochs"),
        ("data.trains.size=3", "data.trains", "data.train"),
        ("compatibility.nc_targets=x", "compatibility.nc_targets", "compatibility.nc_target"),
        ("extends=demo", "extends", None),
        ("training.extends=demo", "training.extends", None),
        ("zzz=3", "zzz", None),
    ],
)
def test_unknown_keys_are_refused_with_what_may_be_meant(
    override: str, unknown: str, near: str | None
) -> None:
    hint = "" if near is None else f"; did you mean {near}?"
    assert refused("clothing1m", override) == f"{override}: unknown setting {unknown}{hint}"


def test_unknown_keys_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "training:\n  omega_nc_: 3\n")
    assert refused(path) == (
        f"{path}: unknown setting training.omega_nc_; did you mean training.omega_nc?"
    )
    assert "unknown setting 1" in refused(write(path, "1: 2\n"))


@pytest.mark.parametrize(
    "key, value, wanted",
    [
        ("training.omega_nnc", "much", "a number"),
        ("training.omega_nnc", "true", "a number"),
        ("training.omega_nnc", "[1]", "a number"),
        ("training.omega_nnc", "", "a number"),
        ("training.omega_nnc", "'16'", "a number"),
        ("training.epochs", "2.5", "an integer"),
        ("training.epochs", "2.0", "an integer"),
        ("training.epochs", "true", "an integer"),
        ("members.seeds", "3", "a list, each item an integer"),
        ("members.seeds", "[0, x]", "a list, each item an integer"),
        ("members.seeds", "[0, true]", "a list, each item an integer"),
        ("members.weights", "[3]", "a list, each item text"),
        ("members.pick", "[3]", "a mapping of integers to a list, each item an integer"),
        ("members.pick", "{a: [3]}", "a mapping of integers to a list, each item an integer"),
        ("members.source", "dirty", "one of clean, noisy, folds"),
        ("engine.loggers", "[csv, x]", "a list, each item one of csv, tensorboard, wandb"),
        ("engine.clip", "x", "a number or null"),
        ("rule.seed", "1.5", "an integer or null"),
        ("network.pretrained", "3", "text or null"),
        ("network.channels_last", "1", "true or false"),
        ("network.channels_last", "", "true or false"),
        ("network.channels_last", "'yes'", "true or false"),
        ("network.options", "3", "a mapping"),
        ("data.train.scale", "[0.1, 0.2, 0.3]", "a list of 2 numbers"),
        ("data.train.size", "big", "an integer"),
    ],
)
def test_wrong_types_are_refused(key: str, value: str, wanted: str, tmp_path: Path) -> None:
    came = yaml.safe_load(value)
    message = f"{key} must be {wanted}, got {came!r}"
    assert refused("clothing1m", f"{key}={value}") == f"{key}={value}: {message}"
    part, *below, name = key.split(".")
    text = f"{part}: {{{''.join(f'{b}: {{' for b in below)}{name}: {value}{'}' * len(below)}}}"
    path = write(tmp_path / "a.yaml", text)
    assert refused(path) == f"{path}: {message}"


def test_a_part_must_be_a_mapping(tmp_path: Path) -> None:
    assert refused("demo", "training=5") == (
        "training=5: training must be a mapping of settings, got 5"
    )
    path = write(tmp_path / "a.yaml", "- training\n")
    assert refused(path) == f"{path} must be a mapping of the parts of a recipe, got ['training']"


def test_transforms_that_cannot_be(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "data: {eval: {resize: 100}}\n")
    assert refused(path) == (
        f"{path}: data.eval.resize must be an integer of at least 224, got 100"
    )
    assert refused(path, "data.eval={size: 90}", "data.train.flip=2") == (
        "data.train.flip=2: data.train.flip must be a probability, got 2.0"
    )


@pytest.mark.parametrize(
    "text, problem",
    [
        ("loop:\n  iterations: 1\n  seeds: [1\n", ", line 4: "),
        ("loop:\n  iterations: 1\n\tseeds: 3\n", ", line 3: found character '\\t' that"),
        (
            "loop:\n  iterations: 1\n  iterations: 2\n",
            ", line 3: the key 'iterations' is there twice",
        ),
        ("rule: {}\nloop: {}\nrule: {}\n", ", line 3: the key 'rule' is there twice"),
        ("{[1]: 2}\n", ", line 1: found unhashable key"),
        ("a: 1\n---\nb: 2\n", ", line 2: "),
        ("a: !!python/object:os.system x\n", ", line 1: could not determine a constructor"),
        ("data: {root: 2024-13-45}\n", ": month must be in 1..12"),
        ("a: *b\n", ", line 1: found undefined alias"),
    ],
)
def test_broken_yaml_is_named_with_file_and_line(text: str, problem: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", text)
    assert refused(path).startswith(f"{path}{problem}")


def test_keys_merged_from_an_anchor_are_not_there_twice(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.yaml",
        "members: {optimizer: &o {lr: 0.5, momentum: 0.8}}\n"
        "training: {optimizer: {<<: *o, lr: 0.25}}\n",
    )
    assert load(path).training.optimizer == Optimizer(lr=0.25, momentum=0.8)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"loop: \xff\xfe")
    assert refused(path).startswith(f"{path} must be a text file in UTF-8: ")
    path.write_bytes(b"loop: \x00")
    assert refused(path).startswith(f"{path}: ")


def test_no_such_recipe(tmp_path: Path) -> None:
    assert refused("clothing1") == (
        f"recipe must be a YAML file or one of {', '.join(NAMES)}, got 'clothing1'; "
        "did you mean clothing1m?"
    )
    assert refused(tmp_path / "none.yaml").endswith(f"got '{tmp_path}/none.yaml'")
    assert "published/food101n?" in refused("publishd/food101n")


@pytest.mark.parametrize("override", ["", "training.epochs", "=3"])
def test_an_override_needs_key_and_value(override: str) -> None:
    assert refused("demo", override) == (f"recipe: an override must be KEY=VALUE, got {override!r}")


def test_scaled_rule() -> None:
    rule = Rule(alpha=None, beta=None, sigma=None, seed=None).of(28, 5)
    assert (rule.alpha, rule.beta, rule.sigma, rule.seed) == (1.0, 0.015, 0.025, 5)
    assert Rule(beta=None, sigma=None).of(14, 5) == GenKL.preset("clothing1m")


def test_inherited_settings_are_known() -> None:
    assert load(Recipe(training=Training(epochs=3))).training.epochs == 3
