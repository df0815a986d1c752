"""The data set on disk, and reading it back."""

import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from genkl_ext.data import Manifest
from genkl_ext.demo import digits, results

LISTS = {"train": "noisy_train", "clean": "clean_train", "val": "clean_val", "test": "clean_test"}


@pytest.fixture(scope="module")
def true_digit(digits_folder):
    return results.read_pairs(digits_folder / "true_digit_kv.txt")


def keys_of(folder, name):
    return (folder / "images" / f"{name}_key_list.txt").read_text().splitlines()


def test_every_image_is_in_exactly_one_split(digits_folder, true_digit):
    keys = [key for name in LISTS.values() for key in keys_of(digits_folder, name)]
    assert len(keys) == len(set(keys)) == len(load_digits().target) == 1797
    assert set(keys) == set(true_digit)
    files = {str(p.relative_to(digits_folder)) for p in digits_folder.rglob("*.jpg")}
    assert files == set(keys)


def test_keys_are_those_of_clothing1m(true_digit):
    for key in true_digit:
        match = re.fullmatch(r"images/(\d)/(\d\d)/\d+,(\d+)\.jpg", key)
        assert match, key
        assert match[3][-3:] == match[1] + match[2]


def test_clean_splits_hold_verified_digits_of_the_classes(digits_folder, true_digit):
    labels = results.read_pairs(digits_folder / "images" / "clean_label_kv.txt")
    sizes = {
        "clean_train": digits.CLEAN_TRAIN,
        "clean_val": [digits.CLEAN_VAL] * 8,
        "clean_test": [digits.CLEAN_TEST] * 8,
    }
    for name, per_class in sizes.items():
        keys = keys_of(digits_folder, name)
        assert all(labels[key] == true_digit[key] < 8 for key in keys)
        counts = Counter(labels[key] for key in keys)
        assert [counts[c] for c in range(8)] == list(per_class)
    assert len(set(digits.CLEAN_TRAIN)) > 1  # else the class ratio is the same for all


def test_noisy_split(digits_folder, true_digit):
    labels = results.read_pairs(digits_folder / "images" / "noisy_label_kv.txt")
    keys = keys_of(digits_folder, "noisy_train")
    assert set(labels) == set(keys)
    given = np.array([labels[key] for key in keys])
    true = np.array([true_digit[key] for key in keys])
    assert given.min() == 0
    assert given.max() == 7
    nonconforming = true >= 8
    assert nonconforming.sum() == (load_digits().target >= 8).sum() == 354
    assert np.unique(given[nonconforming]).tolist() == list(range(8))
    conforming = ~nonconforming
    assert (given != true)[conforming].sum() == round(0.25 * conforming.sum())
    flipped = conforming & (given != true)
    np.testing.assert_array_equal(given[flipped], np.array(digits.LOOKALIKE)[true[flipped]])
    # The order of the list gives nothing away.
    assert 0.2 < nonconforming[: len(keys) // 4].mean() < 0.45


def test_lookalikes_come_in_pairs():
    assert [digits.LOOKALIKE[c] for c in digits.LOOKALIKE] == list(range(8))
    assert all(c != other for c, other in enumerate(digits.LOOKALIKE))


def test_random_flips(tmp_path):
    digits.write(tmp_path / "data", 0, "random")
    labels = results.read_pairs(tmp_path / "data/images/noisy_label_kv.txt")
    true = results.read_pairs(tmp_path / "data/true_digit_kv.txt")
    pairs = [(true[key], labels[key]) for key in labels if true[key] < 8]
    flipped = [(digit, label) for digit, label in pairs if digit != label]
    assert len(flipped) == round(0.25 * len(pairs))
    assert len(set(flipped)) > 40  # of 56 pairs


def test_the_list_of_nonconforming_images_has_no_prefix(digits_folder, true_digit):
    listed = (digits_folder / "NC_instances.txt").read_text().splitlines()
    expected = {key.removeprefix("images/") for key, digit in true_digit.items() if digit >= 8}
    assert set(listed) == expected
    assert len(listed) == len(expected)


def test_images_are_the_digits(digits_folder, true_digit):
    for key in list(true_digit)[:20]:
        with Image.open(digits_folder / key) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "L", (32, 32))
    # What is read back looks like the scan: its ink lies where the mean of its digit has ink.
    scans = load_digits()
    means = np.stack([scans.images[scans.target == c].mean(axis=0) for c in range(8)])
    test = Manifest.from_clothing1m(digits_folder).split("test")
    images = []
    for path in test.paths():
        with Image.open(path) as image:
            images.append(np.asarray(image, float).reshape(8, 4, 8, 4).mean(axis=(1, 3)))
    distance = ((np.stack(images)[:, None] * 16 / 255 - means) ** 2).sum(axis=(2, 3))
    assert (distance.argmin(axis=1) == test.labels).mean() > 0.85


def test_same_seed_same_bytes(digits_folder, tmp_path):
    def contents(root):
        return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}

    digits.write(tmp_path / "again", 0)
    assert contents(tmp_path / "again") == contents(digits_folder)
    digits.write(tmp_path / "other", 1)
    assert contents(tmp_path / "other").keys() != contents(digits_folder).keys()


def test_an_interrupted_writer_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(pixels):
        calls.append(1)
        if len(calls) == 100:
            raise KeyboardInterrupt
        return b""

    monkeypatch.setattr(digits, "_jpeg", interrupted)
    with pytest.raises(KeyboardInterrupt):
        digits.write(tmp_path / "data", 0)
    assert list(tmp_path.iterdir()) == []
