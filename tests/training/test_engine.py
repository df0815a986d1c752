"""engine.fit against bare torch loops, and killed at many moments.

Run as a program, this file is a nursery: it loads torch once, and forks a child for every line of
its input, which trains as the line says.
"""

import csv
import dataclasses
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from genkl_ext.ranks import Ranks, join
from genkl_ext.training import engine
from genkl_ext.training.checkpoints import read_checkpoint
from genkl_ext.training.settings import Engine, Fit, Optimizer, Schedule
from genkl_ext.training.steps import PlainStep

CLASSES = 3
IMAGES, BATCH = 22, 6  # the last batch of four is smaller


class Batches:
    """Shuffled batches of random pictures with noise, all from (seed, epoch, number)."""

    def __init__(self, shard=(0, 1), images=IMAGES, seed=5, given=None, leave_out=None, empty=None):
        self.images, self.labels = pictures(images)
        self.shard, self.seed = shard, seed
        self.given = given or (lambda batch: None)
        self.leave_out = leave_out  # a batch of which all images are broken
        self.empty = empty  # one of which the last process has no images
        self.epoch = self.done = 0
        self.next = (0, 0)

    def __len__(self):
        return -(-len(self.images) // BATCH)

    def set_epoch(self, epoch):
        self.next = self.epoch, self.done = epoch, 0

    def state_dict(self):
        return {"epoch": self.epoch, "batches": self.done, "shard": list(self.shard)}

    def load_state_dict(self, state):
        assert state["shard"] == list(self.shard)
        self.epoch, self.done = state["epoch"], state["batches"]
        self.next = (self.epoch + 1, 0) if self.done >= len(self) else (self.epoch, self.done)

    def __iter__(self):
        (self.epoch, self.done), self.next = self.next, (self.next[0] + 1, 0)
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        order = torch.randperm(len(self.images), generator=generator)
        noise = 0.1 * torch.randn(self.images.shape, generator=generator)
        for number in range(self.done, len(self)):
            rows = order[number * BATCH : (number + 1) * BATCH][self.shard[0] :: self.shard[1]]
            self.done += 1
            if number == self.leave_out:
                continue
            if number == self.empty and self.shard[0] == self.shard[1] - 1:
                rows = rows[:0]
            batch = {"image": self.images[rows] + noise[rows], "label": self.labels[rows]}
            self.given(batch)
            yield batch


def pictures(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, 5, 5, generator=generator)
    return images, (images.sum((1, 2, 3)) > 0).long() + (images[:, 0, 0, 0] > 0.5).long()


def validation(shard=(0, 1), n=17):
    """Batches of 5, 5, 5 and 2."""
    images, labels = pictures(n, seed=1)
    batches = zip(images.split(5), labels.split(5), strict=True)
    return [
        {"image": x[shard[0] :: shard[1]], "label": y[shard[0] :: shard[1]]} for x, y in batches
    ]


def network(dropout=0.3, norm=True):
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4) if norm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(36, CLASSES),
        )


def step(net, batch):
    loss = F.cross_entropy(net(batch["image"]), batch["label"])
    return {"loss": loss, "half": loss / 2}


def settings(epochs=3, schedule="constant", lr=0.05, optimizer="sgd", **more):
    return Fit(epochs, BATCH, Optimizer(optimizer, lr), Schedule(schedule, patience=0), **more)


def fit(out, fit_settings=None, engine_settings=None, *, net=None, batches=None, **more):
    more.setdefault("validation", validation())
    return engine.fit(
        network() if net is None else net,
        Batches() if batches is None else batches,
        more.pop("step", step),
        out,
        fit_settings or settings(),
        engine_settings or Engine(loggers=[]),
        seed=more.pop("seed", 0),
        ranks=more.pop("ranks", Ranks()),
        say=more.pop("say", lambda line: None),
        **more,
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return [
            {name: float(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def best(out):
    return load_file(out / "best.safetensors")


def last(out):
    weights = read_checkpoint(out / "last.ckpt")["state_dict"]
    return {name.removeprefix("network."): value for name, value in weights.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# What a training computes


def plain_training(fit_settings, accumulate=1, clip=None, ema=None, seed=0):
    """The same training as a bare loop: metrics, last and best weights."""
    net, average = network(), None
    chosen = fit_settings.optimizer
    if chosen.name == "sgd":
        optimizer = torch.optim.SGD(
            net.parameters(), chosen.lr, 0.9, nesterov=True, weight_decay=1e-3
        )
    else:
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[chosen.name]
        optimizer = kind(net.parameters(), chosen.lr, weight_decay=1e-3)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    rows, best_row, best_weights, steps = [], None, None, 0
    torch.manual_seed(seed)
    for epoch, batches in enumerate([Batches()] * fit_settings.epochs):
        if fit_settings.schedule.name == "cosine":
            for group in optimizer.param_groups:
                group["lr"] = chosen.lr * (1 + math.cos(math.pi * epoch / fit_settings.epochs)) / 2
        losses, lr = [], optimizer.param_groups[0]["lr"]
        net.train()
        for number, batch in enumerate(batches):
            loss = F.cross_entropy(net(batch["image"]), batch["label"])
            (loss / accumulate).backward()
            losses.append(loss.item())
            if (number + 1) % accumulate == 0 or number + 1 == len(batches):
                if clip is not None:
                    nn.utils.clip_grad_norm_(net.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                steps += 1
                if ema is not None:
                    now = {k: v.clone() for k, v in net.state_dict().items()}
                    average = average or now
                    average = {
                        k: v if not v.is_floating_point() else v + (now[k] - v) * (1 - ema)
                        for k, v in average.items()
                    }
        state = {k: v.clone() for k, v in (average or net.state_dict()).items()}
        judged = network().eval()
        judged.load_state_dict(state)
        images, labels = pictures(17, seed=1)
        with torch.no_grad():
            logits = judged(images)
        row = {
            "epoch": epoch + 1,
            "step": steps,
            "lr": lr,
            "loss": sum(losses) / len(losses),
            "half": sum(losses) / len(losses) / 2,
            "validation_loss": F.cross_entropy(logits, labels).item(),
            "validation_accuracy": (logits.argmax(1) == labels).double().mean().item(),
        }
        if fit_settings.schedule.name == "plateau":
            plateau.step(row["validation_loss"])
        rows.append(row)
        order = ("validation_accuracy", -1), ("validation_loss", 1)
        key = tuple(-sign * row[name] for name, sign in order)
        if best_row is None or key > best_row:
            best_row, best_weights = key, state
    return rows, net.state_dict(), best_weights


@pytest.mark.parametrize(
    ("wanted", "how"),
    [
        (settings(5), {}),
        (settings(4, "cosine"), {}),
        (settings(6, "plateau", lr=0.3), {}),
        (settings(3, optimizer="adam", lr=0.01), {"accumulate": 3}),
        (settings(3, optimizer="adamw", lr=0.01), {"clip": 0.5}),
        (settings(4, lr=0.2), {"ema": 0.8, "accumulate": 2}),
    ],
    ids=["sgd", "cosine", "plateau", "adam-accumulate", "adamw-clip", "ema"],
)
def test_is_what_a_bare_loop_computes(tmp_path, wanted, how):
    fitted = fit(tmp_path, wanted, Engine(loggers=[], **how))
    rows, weights, best_weights = plain_training(wanted, **how)
    found = metrics(tmp_path)
    assert [list(row) for row in found] == [[*row, "seconds"] for row in rows]
    for row, expected in zip(found, rows, strict=True):
        assert row.pop("seconds") >= 0
        assert row == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(last(tmp_path), dict(weights), rtol=1e-6, atol=1e-6)
    kept = {k: v for k, v in best(tmp_path).items() if "num_batches" not in k}
    expected = {k: v for k, v in best_weights.items() if "num_batches" not in k}
    torch.testing.assert_close(kept, expected, rtol=1e-5, atol=1e-6)
    chosen = max(rows, key=lambda row: (row["validation_accuracy"], -row["validation_loss"]))
    assert fitted.improved
    assert fitted.best_epoch == chosen["epoch"]
    assert fitted.best_accuracy == pytest.approx(chosen["validation_accuracy"])
    assert fitted.best_loss == pytest.approx(chosen["validation_loss"], rel=1e-6)
    assert (fitted.epochs, fitted.steps) == (wanted.epochs, rows[-1]["step"])


def test_cosine_ends_at_exactly_zero(tmp_path):
    fit(tmp_path, settings(3, "cosine", lr=0.7))
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx([0.7, 0.525, 0.175])
    assert read_checkpoint(tmp_path / "last.ckpt")["optimizer_states"][0]["param_groups"][0][
        "lr"
    ] == (0.0)


def test_two_seeds_draw_other_dropout_and_leave_the_generator_alone(tmp_path):
    before = torch.get_rng_state()
    trained = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        fit(tmp_path / name, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        trained.append(best(tmp_path / name))
    assert_same(trained[0], trained[1])
    assert not torch.equal(trained[0]["5.weight"], trained[2]["5.weight"])


def test_bf16_trains(tmp_path):
    dtypes = []

    def look(net, batch):
        logits = net(batch["image"])
        dtypes.append(logits.dtype)
        return {"loss": F.cross_entropy(logits.float(), batch["label"])}

    fit(tmp_path, engine_settings=Engine(precision="bf16-mixed", loggers=[]), step=look)
    assert set(dtypes) == {torch.bfloat16}
    assert best(tmp_path)["5.weight"].dtype == torch.float32


def test_validation_is_the_true_mean():
    net = network().eval()
    batches = [*validation(), {"image": torch.empty(0, 3, 5, 5), "label": torch.empty(0).long()}]
    images, labels = pictures(17, seed=1)
    found = engine.validate(net, batches, torch.device("cpu"), Ranks())
    with torch.no_grad():
        logits = net(images)
    losses = F.cross_entropy(logits, labels, reduction="none").double()
    assert found.loss == pytest.approx(losses.mean().item())
    assert found.accuracy == (logits.argmax(1) == labels).double().mean().item()
    assert found.published_loss == pytest.approx(losses[15:].mean().item() / 17)  # N3
    with pytest.raises(ValueError, match="validation must have images"):
        engine.validate(net, batches[-1:], torch.device("cpu"), Ranks())


class Script:
    """Validation batches on which an identity network reaches scripted accuracy and loss.

    Each epoch is (images of 4 that are right, margin of the logits, margin of the last image).
    """

    def __init__(self, *epochs):
        self.epochs = iter(epochs)

    def __iter__(self):
        right, margin, last_margin = next(self.epochs)
        labels = torch.zeros(4, dtype=torch.int64)
        logits = torch.tensor([[margin, 0.0] if i < right else [0.0, margin] for i in range(4)])
        logits[3] = logits[3] * last_margin / margin
        yield {"image": logits[:3], "label": labels[:3]}
        yield {"image": logits[3:], "label": labels[3:]}


def scripted(out, *epochs, fit_settings=None, **more):
    """A training of so many epochs that changes nothing, with a script for validation."""
    net = nn.Linear(2, 2, bias=False)
    nn.init.eye_(net.weight)

    def still(net, batch):
        return {"loss": 0.0 * net.weight.sum()}

    fit_settings = fit_settings or settings(len(epochs))
    free = dataclasses.replace(
        fit_settings, optimizer=dataclasses.replace(fit_settings.optimizer, weight_decay=0.0)
    )
    return fit(out, free, net=net, step=still, validation=Script(*epochs), **more)


def test_best_is_the_most_accurate_then_the_lowest_loss(tmp_path):
    script = [(2, 1, 1), (3, 1, 1), (3, 2, 3), (3, 1, 1), (2, 9, 9)]
    fitted = scripted(tmp_path / "a", *script)
    losses = [row["validation_loss"] for row in metrics(tmp_path / "a")]
    assert losses[2] > losses[1] == losses[3] == fitted.best_loss
    assert (fitted.best_epoch, fitted.best_accuracy) == (2, 0.75)
    assert scripted(tmp_path / "b", *script, (3, 2, 1)).best_epoch == 6


@pytest.mark.parametrize(
    ("start", "epoch"), [((0.75, 9.0), 2), ((0.75, 0.1), None), ((0.8, 9.0), None), ((0.5, 0.0), 2)]
)
def test_only_what_beats_the_start_is_kept(tmp_path, start, epoch):
    fitted = scripted(tmp_path, (1, 1, 1), (3, 1, 1), (3, 3, 3), start=start)
    assert fitted.best_epoch == epoch
    assert fitted.improved == (tmp_path / "best.safetensors").exists() == (epoch is not None)
    assert fitted.best_accuracy == (None if epoch is None else 0.75)


def test_start_itself_is_not_better_than_itself(tmp_path):
    known = scripted(tmp_path / "a", (3, 1, 1))
    start = (known.best_accuracy, known.best_loss)
    assert not scripted(tmp_path / "b", (3, 1, 1), start=start).improved


@pytest.mark.parametrize("published", [False, True])
def test_plateau_follows_the_mean_or_the_published_loss(tmp_path, published):
    # The mean falls all the time; the last image alone gets worse.
    script = (3, 1, 1), (3, 1, 2), (4, 1, 1), (4, 2, 0.5), (4, 3, 0.1)
    scripted(
        tmp_path,
        *script,
        fit_settings=settings(5, "plateau", lr=1.0),
        last_batch_validation_loss=published,
    )
    rows = metrics(tmp_path)
    losses = [row["validation_loss"] for row in rows]
    images = [next(iter(list(Script(epoch))[1:])) for epoch in script]
    watched = [F.cross_entropy(x["image"], x["label"]).item() for x in images]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    expected = []
    for loss in watched if published else losses:
        expected.append(optimizer.param_groups[0]["lr"])
        plateau.step(loss)
    assert [row["lr"] for row in rows] == expected
    assert len(set(expected)) > 1


def test_without_validation_the_last_epoch_is_kept(tmp_path):
    fitted = fit(tmp_path, validation=None)
    assert_same(best(tmp_path), last(tmp_path))
    assert fitted == dataclasses.replace(fitted, improved=True, best_epoch=3, best_accuracy=None)
    assert "validation_loss" not in metrics(tmp_path)[0]


def test_validates_every_other_epoch_and_the_last(tmp_path):
    seen = []

    class Counted(list):
        def __iter__(self):
            seen.append(1)
            return super().__iter__()

    fit(tmp_path, settings(5, validate_every=2), validation=Counted(validation()))
    looked = [row["validation_loss"] is not None for row in metrics(tmp_path)]
    assert looked == [False, True, False, True, True]
    assert len(seen) == 3


def test_lr_zero_changes_statistics_only(tmp_path):  # T4
    net = network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(tmp_path, net=net, lr_zero=True)
    after = best(tmp_path)
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name, _ in net.named_parameters()}
    assert {row["lr"] for row in metrics(tmp_path)} == {0.0}


@pytest.mark.parametrize("frozen", [False, True])
def test_eval_mode_after_the_first_epoch(tmp_path, frozen):  # T5
    modes, statistics = [], []

    def look(net, batch):
        modes.append(net.training)
        statistics.append(net[1].running_mean.clone())
        return step(net, batch)

    fit(tmp_path, step=look, eval_mode_after_first_epoch=frozen)
    assert modes == [True] * 4 + [not frozen] * 8
    assert torch.equal(statistics[4], statistics[11]) == frozen
    assert not torch.equal(statistics[1], statistics[2])


def test_an_epoch_may_have_fewer_batches_than_said(tmp_path):
    fitted = fit(tmp_path, settings(3, "cosine"), batches=Batches(leave_out=2))
    assert fitted.steps == 9
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx([0.05, 0.0375, 0.0125])


# What can be wrong


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    def spoilt(net, batch):
        spoilt.calls += 1
        losses = step(net, batch)
        return {"loss": losses["loss"], "half": losses["half"] * (math.inf if bad() else 1)}

    def bad():
        return spoilt.calls == 7

    spoilt.calls = 0
    watch = Engine(loggers=[], log_every=50)
    with pytest.raises(FloatingPointError, match="half = inf in epoch 2, step 7"):
        fit(tmp_path, step=spoilt, engine_settings=watch)
    assert len(read_checkpoint(tmp_path / "last.ckpt")[engine._STATE]["history"]) == 1
    # Whatever made it so being mended, the training goes on.
    fit(tmp_path, engine_settings=watch)
    fit(tmp_path / "whole", engine_settings=watch)
    assert_same(best(tmp_path), best(tmp_path / "whole"))


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def spoilt(net, batch):
        losses = step(net, batch)
        if net.training and spoilt.calls == 5:  # the loss is fine, its gradient is not
            losses["loss"] = losses["loss"] + torch.sqrt(0.0 * net[5].bias.sum())
        spoilt.calls += 1
        return losses

    spoilt.calls = 0
    watch = Engine(loggers=[], save_every=2)
    with pytest.raises(FloatingPointError, match=r"weights must be finite.* after step 6"):
        fit(tmp_path, step=spoilt, engine_settings=watch)
    assert all(value.isfinite().all() for value in last(tmp_path).values())


@pytest.mark.parametrize(
    ("message", "fit_settings", "more"),
    [
        ("epochs must be at least 1, got 0", settings(0), {}),
        ("batches must be at least one", None, {"batches": Batches(images=0)}),
        ("validate_every must be at least 1", settings(validate_every=0), {}),
        ("plateau schedule must have validation", settings(2, "plateau"), {"validation": None}),
        ("start must come with validation", None, {"validation": None, "start": (0.5, 1.0)}),
        ("16-mixed", None, {"engine_settings": Engine(precision="16-mixed")}),
    ],
)
def test_settings_that_cannot_be(tmp_path, message, fit_settings, more):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, fit_settings, more.pop("engine_settings", None), **more)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_that_is_not_installed(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, f"lightning.pytorch.loggers.{name}", None)
    loggers = sys.modules["lightning.pytorch.loggers"]

    def absent(*_, **__):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(
        loggers, {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger"}[name], absent
    )
    with pytest.raises(ImportError, match=f"needs the package {name}"):
        fit(tmp_path, engine_settings=Engine(loggers=[name]))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    fit(tmp_path)
    cases = [
        ("settings", {"fit_settings": settings(4)}),
        ("settings", {"fit_settings": settings(lr=0.06)}),
        ("engine", {"engine_settings": Engine(loggers=[], ema=0.9)}),
        ("seed", {"seed": 1}),
        ("batches", {"batches": Batches(images=40)}),
        ("validation", {"validation": None}),
        ("lr_zero", {"lr_zero": True}),
        ("this network", {"net": network(norm=False)}),
    ]
    for what, more in cases:
        with pytest.raises(ValueError, match=f"last.ckpt must be of .*{what}.*to begin anew"):
            fit(tmp_path, **more)
    (tmp_path / "last.ckpt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="must be a checkpoint"):
        fit(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="by fit"):
        fit(tmp_path)


# Going on


def test_what_is_finished_is_not_done_again(tmp_path):
    said = []
    first = fit(tmp_path, say=said.append)
    assert len(said) == 3
    assert "epoch 2 of 3" in said[1]
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(net, batch):
        raise AssertionError

    assert fit(tmp_path, step=fail) == first
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    # Killed after last.ckpt, and before the two others.
    (tmp_path / "metrics.csv").unlink()
    if first.best_epoch == 3:
        (tmp_path / "best.safetensors").unlink()
    assert fit(tmp_path, step=fail) == first
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_what_lies_there_without_a_checkpoint_is_not_kept(tmp_path):
    for name in ("best.safetensors", "metrics.csv", ".best.0a1b.partial.safetensors"):
        (tmp_path / name).write_text("old")
    (tmp_path / "steps.csv").write_text("step,loss\n3,1.0\n4,")
    assert not scripted(tmp_path, (1, 1, 1), start=(1.0, 0.0)).improved
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.csv", "last.ckpt"}


def test_keyboard_interrupt_leaves_a_usable_state(tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    batches = Batches()

    def interrupted(net, batch):
        if (batches.epoch, batches.done) == (1, 3):
            raise KeyboardInterrupt
        return step(net, batch)

    how = {"engine_settings": Engine(loggers=[], save_every=1)}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "a", batches=batches, step=interrupted, **how)
    assert signal.getsignal(signal.SIGINT) is handler
    said = []
    fit(tmp_path / "a", batches=batches, say=said.append, **how)
    assert said[0] == "goes on after step 6, in epoch 2 of 3"
    fit(tmp_path / "b", **how)
    assert_same(best(tmp_path / "a"), best(tmp_path / "b"))
    assert untimed(metrics(tmp_path / "a")) == untimed(metrics(tmp_path / "b"))


def test_an_error_in_the_step_passes_through(tmp_path):
    def wrong(net, batch):
        raise KeyError("target")

    with pytest.raises(KeyError, match="target"):
        fit(tmp_path, step=wrong)


@pytest.fixture(autouse=True, scope="module")
def program():
    """The nursery; it loads torch while the first tests run."""
    pipe = subprocess.PIPE
    program = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)
    yield program
    program.kill()
    program.wait()


@pytest.fixture
def nursery(program):
    """Sends a request to the nursery and returns the answer."""

    def ask(**request):
        program.stdin.write(json.dumps(request) + "\n")
        program.stdin.flush()
        return json.loads(program.stdout.readline())

    return ask


CASES = {
    "plain": {},
    "every step": {"save_every": 1, "schedule": "cosine", "log_every": 1},
    "plateau": {"save_every": 2, "schedule": "plateau", "lr": 0.3, "optimizer": "adam"},
    "ema": {"save_every": 1, "ema": 0.8, "accumulate": 2, "validate_every": 2, "log_every": 1},
    "frozen": {"save_every": 3, "frozen": True, "start": [0.3, 9.0]},
    "short": {"save_every": 1, "leave_out": 3},
    "unvalidated": {"save_every": 3, "validation": False, "clip": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again(tmp_path, nursery, case):
    whole = nursery(out=str(tmp_path / "whole"), case=CASES[case])
    assert whole["status"] == 0, whole
    rng = random.Random(case)
    lives = 0
    while True:
        # An event is a batch, or one side of a file's being put in place.
        lives += 1
        limit = rng.randrange(1, 12) + (16 if "save_every" not in CASES[case] else 4)
        answer = nursery(out=str(tmp_path / "killed"), case=CASES[case], die_at_event=limit)
        if answer["status"] != -signal.SIGKILL:
            break
        assert lives < 40
    assert lives > 1
    assert answer["status"] == 0, answer
    assert_same_training(tmp_path / "killed", tmp_path / "whole")
    timeless = [dict(a["fitted"], seconds=0) for a in (answer, whole)]
    assert timeless[0] == timeless[1]


def test_killed_from_outside(tmp_path, nursery):
    case = {"save_every": 2, "epochs": 8, "slow": 0.01, "log_every": 3}
    nursery(out=str(tmp_path / "whole"), case={**case, "slow": 0})
    rng = random.Random(0)
    killed = 0
    while True:
        seconds = rng.uniform(0.1, 0.6)
        answer = nursery(out=str(tmp_path / "killed"), case=case, die_after_seconds=seconds)
        if answer["status"] == 0:
            break
        assert answer["status"] == -signal.SIGKILL, answer
        killed += 1
    assert killed > 0
    assert_same_training(tmp_path / "killed", tmp_path / "whole")


def test_sigterm_saves_and_ends(tmp_path, nursery):
    nursery(out=str(tmp_path / "whole"), case={})
    answer = nursery(out=str(tmp_path / "ended"), case={}, terminate_at_batch=6)
    assert answer["status"] == 128 + signal.SIGTERM, answer
    assert read_checkpoint(tmp_path / "ended" / "last.ckpt")[engine._STATE]["step"] == 6
    assert nursery(out=str(tmp_path / "ended"), case={})["status"] == 0
    assert_same_training(tmp_path / "ended", tmp_path / "whole")


def assert_same_training(a, b):
    names = {p.name for p in b.iterdir()}
    assert {p.name for p in a.iterdir()} == names
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()
    assert untimed(metrics(a)) == untimed(metrics(b))
    if "steps.csv" in names:
        assert (a / "steps.csv").read_text() == (b / "steps.csv").read_text()
    left, right = (read_checkpoint(out / "last.ckpt") for out in (a, b))
    assert_equal(left["state_dict"], right["state_dict"])
    assert_equal(left["optimizer_states"], right["optimizer_states"])
    for name in ("scheduler", "average", "averaged", "ranks", "step", "about"):
        assert_equal(left[engine._STATE][name], right[engine._STATE][name])


def assert_equal(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


# Two processes


def test_two_processes_train_as_one(tmp_path, nursery):
    case = {"norm": False, "dropout": 0.0, "log_every": 2}
    alone = nursery(out=str(tmp_path / "one"), case=case)
    both = nursery(out=str(tmp_path / "two"), case=case, processes=2)
    assert both["status"] == 0, both
    # The last batch of 4 is shared equally too, so that means of means are means.
    torch.testing.assert_close(best(tmp_path / "two"), best(tmp_path / "one"))
    rows = [untimed(metrics(tmp_path / name)) for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert both["fitted"]["best_accuracy"] == alone["fitted"]["best_accuracy"]


def test_a_process_may_have_an_empty_batch(tmp_path, nursery):
    case = {"epochs": 1, "log_every": 1, "empty": 1, "plain_step": True}
    assert nursery(out=str(tmp_path), case=case, processes=2)["status"] == 0
    assert all(value.isfinite().all() for value in best(tmp_path).values())
    assert metrics(tmp_path)[0]["step"] == 4


def test_two_processes_killed(tmp_path, nursery):
    case = {"save_every": 1, "log_every": 2, "ema": 0.8}
    whole = nursery(out=str(tmp_path / "whole"), case=case, processes=2)
    assert whole["status"] == 0, whole
    # The statistics of batch norm that were judged are those that were kept.
    net = network().eval()
    net.load_state_dict(best(tmp_path / "whole"))
    found = engine.validate(net, validation(), torch.device("cpu"), Ranks())
    assert found.loss == pytest.approx(whole["fitted"]["best_loss"], rel=1e-6)
    assert found.accuracy == whole["fitted"]["best_accuracy"]
    for event in (7, 12):
        answer = nursery(out=str(tmp_path / "k"), case=case, processes=2, die_at_event=event)
        assert answer["status"] == -signal.SIGKILL
    assert nursery(out=str(tmp_path / "k"), case=case, processes=2)["status"] == 0
    assert_same_training(tmp_path / "k", tmp_path / "whole")
    answer = nursery(out=str(tmp_path / "k"), case=case)
    assert "processes 1, got 2" in answer["error"]


# The nursery


def serve():
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.create_server(("127.0.0.1", 0)) as free:
            request["port"] = free.getsockname()[1]
        ranks = range(request.get("processes", 1))
        children = [child(request, rank) for rank in ranks]
        if seconds := request.get("die_after_seconds"):
            time.sleep(seconds)
            os.kill(children[0], signal.SIGKILL)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        answer = Path(request["out"] + ".answer")
        told = json.loads(answer.read_text()) if answer.exists() else {}
        answer.unlink(missing_ok=True)
        print(json.dumps({"status": statuses[0], **told}), flush=True)


def child(request, rank):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        work(request, rank)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException as error:
        if rank == 0:
            Path(request["out"] + ".answer").write_text(json.dumps({"error": repr(error)}))
    finally:
        os._exit(status)


def work(request, rank):
    case, size = request["case"], request.get("processes", 1)
    out = Path(request["out"])
    ranks = Ranks()
    if size > 1:
        told = {
            "RANK": rank,
            "WORLD_SIZE": size,
            "LOCAL_RANK": rank,
            "LOCAL_WORLD_SIZE": size,
            "GROUP_RANK": 0,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": request["port"],
            "TORCHELASTIC_RUN_ID": "test",
        }
        os.environ.update({name: str(value) for name, value in told.items()})
        ranks = join("cpu")
    events = 0

    def event(*_):
        nonlocal events
        events += 1
        if rank == 0 and events == request.get("die_at_event"):
            os.kill(os.getpid(), signal.SIGKILL)

    replace = os.replace

    def watched(*args):
        event()
        replace(*args)
        event()

    os.replace = watched

    def given(batch):
        event()
        time.sleep(case.get("slow", 0))
        if batches.epoch * len(batches) + batches.done == request.get("terminate_at_batch"):
            os.kill(os.getpid(), signal.SIGTERM)

    shard = (rank, size)
    batches = Batches(shard, given=given, leave_out=case.get("leave_out"), empty=case.get("empty"))
    fitted = fit(
        out,
        settings(
            case.get("epochs", 3),
            case.get("schedule", "constant"),
            case.get("lr", 0.05),
            case.get("optimizer", "sgd"),
            validate_every=case.get("validate_every", 1),
        ),
        Engine(
            accelerator="cpu",
            accumulate=case.get("accumulate", 1),
            clip=case.get("clip"),
            ema=case.get("ema"),
            save_every=case.get("save_every"),
            log_every=case.get("log_every", 50),
        ),
        net=network(case.get("dropout", 0.3), case.get("norm", True)),
        batches=batches,
        step=PlainStep() if case.get("plain_step") else step,
        ranks=ranks,
        validation=validation(shard) if case.get("validation", True) else None,
        start=tuple(case["start"]) if "start" in case else None,
        eval_mode_after_first_epoch=case.get("frozen", False),
    )
    assert torch.get_num_threads() == 1
    if rank == 0:
        text = json.dumps({"fitted": dataclasses.asdict(fitted)})
        Path(request["out"] + ".answer").write_text(text)


if __name__ == "__main__":
    serve()
