"""The network, the batches, and what a training keeps."""

import dataclasses

import numpy as np
import pytest
import torch

from genkl_ext import GenKL
from genkl_ext.demo import training
from genkl_ext.demo.training import Check, Settings
from genkl_ext.relabel import Targets, class_ratio

SETTINGS = Settings(steps=30, validate_every=10, fine_tune_steps=10)


def no_tick():
    pass


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def trained(splits):
    return training.train_plain(splits["clean"], 8, splits["val"], SETTINGS, 3, no_tick)


def test_a_seed_fixes_the_first_weights_and_nothing_else():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (training.make_network(8, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert same_weights(a, b)
    assert not same_weights(a, c)


def test_predictions_are_softmax_rows_in_order(splits, trained):
    split = splits["train"]
    q = training.predict(trained.best, split)
    assert q.shape == (len(split), 8)
    assert q.dtype == np.float32
    np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-6)
    rows = np.array([700, 3])
    part = training.Split([split.keys[i] for i in rows], split.labels[rows], split.images[rows])
    np.testing.assert_allclose(training.predict(trained.best, part), q[rows], atol=1e-6)


def test_training_learns_and_repeats_itself(splits, trained):
    again = training.train_plain(splits["clean"], 8, splits["val"], SETTINGS, 3, no_tick)
    assert trained.history == again.history
    assert same_weights(trained.best, again.best)
    assert same_weights(trained.last, again.last)
    assert [check.step for check in trained.history] == [10, 20, 30]
    assert trained.best_check.accuracy > 0.5


def test_the_best_check_is_kept(splits, trained):
    best = max(trained.history, key=lambda check: (check.accuracy, -check.loss))
    assert trained.best_check == best
    validation = splits["val"]
    q = training.predict(trained.best, validation)
    assert training.accuracy(q, validation.labels) == best.accuracy
    last = training.predict(trained.last, validation)
    assert training.accuracy(last, validation.labels) == trained.history[-1].accuracy


def test_the_best_weights_are_those_of_their_step(splits, monkeypatch):
    scripted = iter([(0.9, 0.5), (0.8, 0.7), (0.7, 0.6)])
    weights = []

    def validate(network, split):
        weights.append({name: value.clone() for name, value in network.state_dict().items()})
        return next(scripted)

    monkeypatch.setattr(training, "_validate", validate)
    trained = training.train_plain(splits["clean"], 8, splits["val"], SETTINGS, 0, no_tick)
    assert trained.best_check.step == 20
    for network, expected in ((trained.best, weights[1]), (trained.last, weights[2])):
        found = network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_beats():
    check = Check(step=1, training_loss=1.0, loss=0.5, accuracy=0.9)
    assert dataclasses.replace(check, accuracy=0.91, loss=9.0).beats(check)
    assert dataclasses.replace(check, loss=0.4).beats(check)
    assert not check.beats(check)
    assert not dataclasses.replace(check, accuracy=0.89, loss=0.1).beats(check)


def test_fine_tuning_keeps_the_start_unless_it_is_beaten(splits, trained):
    def tune(start):
        return training.fine_tune(start, splits["clean"], splits["val"], SETTINGS, 0, no_tick)

    before = {name: value.clone() for name, value in trained.best.state_dict().items()}
    perfect = dataclasses.replace(
        trained, best_check=dataclasses.replace(trained.best_check, accuracy=1.0, loss=0.0)
    )
    kept = tune(perfect)
    assert kept.best_check == perfect.best_check
    assert same_weights(kept.best, trained.best)
    assert not same_weights(kept.last, trained.best)

    poor = dataclasses.replace(
        trained, best_check=dataclasses.replace(trained.best_check, accuracy=0.0)
    )
    tuned = tune(poor)
    assert tuned.best_check in tuned.history
    # The start itself is left as it was.
    assert all(torch.equal(trained.best.state_dict()[name], before[name]) for name in before)


def test_training_with_the_objective(splits, monkeypatch):
    noisy, clean = splits["train"], splits["clean"]
    q = np.full((len(noisy), 8), 0.1 / 7, np.float32)
    q[np.arange(len(noisy)), noisy.labels] = 0.9
    q[::3] = 1 / 8
    scores = GenKL(8, alpha=1.0, beta=0.05, sigma=0.05).score(q)
    assert scores.nc.sum() == len(q[::3])
    targets = Targets.of(scores, noisy.labels, class_ratio(clean.labels, 8))

    batches = []
    original = training.Objective.__call__

    def spy(self, logits, t, groups, mixup):
        batches.append((logits.detach(), t, groups, mixup))
        return original(self, logits, t, groups, mixup)

    monkeypatch.setattr(training.Objective, "__call__", spy)
    training.train_genkl(noisy, targets, clean, splits["val"], SETTINGS, 0, no_tick)
    assert len(batches) == SETTINGS.steps
    for logits, t, groups, mixup in batches:
        assert logits.shape == t.shape == (64, 8)  # one forward pass for all groups
        assert (groups == training.CLEAN).sum() == 32
        assert torch.equal(t[groups == training.CLEAN].sum(dim=1), torch.ones(32))
        assert (t[groups == training.NC] == 1 / 8).all()
        assert (t[groups == training.NNC].amax(dim=1) > 0.9).all()  # label and model agree here
        assert torch.equal(groups[mixup.partner], groups)
    share = np.mean([(b[2] == training.NC).sum() / 32 for b in batches])
    assert share == pytest.approx(1 / 3, abs=0.05)


def test_batches_visit_every_row_once_in_a_pass():
    batches = training._batches(10, 3, np.random.default_rng(0))
    for _ in range(4):
        seen = np.concatenate([next(batches) for _ in range(3)])
        assert len(set(seen.tolist())) == 9
    with pytest.raises(ValueError, match="a split must fill a batch of 3, got 2 images"):
        next(training._batches(2, 3, np.random.default_rng(0)))


def test_augmentation_is_light(splits):
    images = training._pixels(splits["test"], np.arange(200))
    assert images.min() >= 0
    assert images.max() <= 1
    moved = training._augment(images, np.random.default_rng(0))
    assert moved.shape == images.shape
    difference = (moved - images).abs().flatten(1).mean(dim=1)
    assert (difference > 0).all()
    other = (images.roll(1, 0) - images).abs().flatten(1).mean(dim=1)
    assert difference.mean() < 0.5 * other.mean()
    np.testing.assert_array_equal(moved, training._augment(images, np.random.default_rng(0)))
