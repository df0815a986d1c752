"""Side files of the published programs."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file

from genkl_ext.data import Manifest, published
from genkl_ext.relabel import class_ratio

# The class sizes behind the published ratios.
CLOTHING1M_COUNTS = [
    3974, 3032, 2507, 5225, 4126, 3670, 2690, 1326, 4420, 3467, 2223, 3126, 4051, 3733,
]  # fmt: skip
WEBVISION_COUNTS = [
    1274, 1070, 1423, 1168, 462, 1904, 698, 1360, 713, 1170, 1438, 1398, 2159, 1238, 2769, 1895,
    701, 604, 713, 707, 1426, 609, 1668, 645, 2050, 1542, 1322, 535, 1296, 1086, 1419, 894, 3112,
    1333, 1822, 604, 661, 1466, 606, 1920, 2202, 1359, 717, 1107, 640, 1262, 1368, 1379, 3134, 1896,
]  # fmt: skip
FOOD101N_COUNTS = [
    2467, 2581, 2874, 2028, 2012, 2921, 2802, 2675, 2982, 2752, 2895, 3178, 2846, 2806, 2966, 3494,
    2843, 3672, 2979, 2577, 2873, 3016, 2793, 2799, 3070, 2937, 3110, 3063, 2173, 3086, 2392, 3765,
    3274, 2647, 2876, 2262, 3590, 2752, 3015, 3036, 2832, 2385, 3046, 2326, 3529, 3253, 2781, 3879,
    2972, 2204, 2835, 3369, 3420, 4095, 2225, 3772, 2483, 3803, 3959, 3262, 2544, 2110, 2614, 2710,
    2703, 3366, 3727, 2921, 2628, 3686, 4063, 3439, 3704, 2411, 3040, 5344, 5165, 2738, 3643, 3179,
    2712, 4600, 3844, 2374, 3357, 2396, 3494, 3150, 2052, 2853, 2744, 2298, 3013, 4791, 2386, 4533,
    4423, 2673, 3013, 2691, 3568,
]  # fmt: skip
PUBLISHED = {
    "clothing1m_clean_trainreverseclassratio.txt": (CLOTHING1M_COUNTS, "matrix", 1e-15),
    "FNtrain_reverseclassratio.txt": (FOOD101N_COUNTS, "matrix", 1e-15),
    "miniwebvision1_vector_v.txt": (WEBVISION_COUNTS, "vector", 5e-12),
}


@pytest.fixture(scope="session")
def published_files(shared_data: Path) -> Path:
    """The published side files, where they are laid beside a checkout."""
    folder = shared_data.parent / "reference" / "data" / "genkl"
    if not folder.is_dir():
        pytest.skip(f"no published files: {folder} is no folder")
    return folder


def manifest(dataset: str, keys: list[str], labels: list[int], root: str = "/data/x") -> Manifest:
    """The keys as noisy images, after a clean one that has the key of the first."""
    columns = {
        "key": [keys[0], *keys],
        "path": ["clean", *keys],
        "given_label": [0, *labels],
        "split": ["clean"] + ["train"] * len(keys),
    }
    return Manifest(pa.table(columns), tuple("abc"), dataset, root)


CLOTHING1M = manifest(
    "clothing1m", ["images/0/99/a b,1.jpg", "images/ü.jpg", "images/c.jpg"], [0, 1, 2]
)
FOOD101N = manifest("food101n", ["pie/1.jpg", "soup/ü 2.jpg", "soup/3.jpg"], [0, 1, 1])
WEBVISION = manifest(
    "webvision", ["google/q1/a b.jpg", "google/ü.jpg", "google/3.jpg"], [7 % 3, 0, 2]
)
OTHER = manifest("folder", ["train/a/1.jpg", "train/b/ü 1", "c"], [0, 1, 2])
ROWS = np.array([True, True, False])


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (CLOTHING1M, "images/0/99/a b,1.jpg\nimages/ü.jpg\n"),
        (
            FOOD101N,
            "/data/x/Food-101N_release/images/pie/1.jpg\n"
            "/data/x/Food-101N_release/images/soup/ü 2.jpg\n",
        ),
        (WEBVISION, "google/q1/a b.jpg 1\ngoogle/ü.jpg 0\n"),
        (OTHER, "train/a/1.jpg\ntrain/b/ü 1\n"),
    ],
    ids=lambda value: value.dataset if isinstance(value, Manifest) else "",
)
def test_row_lists_in_the_words_of_each_program(tmp_path: Path, data: Manifest, lines: str) -> None:
    path = tmp_path / "nc_set.txt"
    published.write_row_list(path, data, ROWS)
    assert path.read_bytes() == lines.encode()
    assert published.read_row_list(path, data).tolist() == ROWS.tolist()
    # As their programs leave it: other order, the lines of an earlier run, CR LF.
    again = "empty_set\r\n" + "\r\n".join(reversed(lines.split("\n"))) + "\r\n" + lines
    path.write_bytes(again.encode())
    assert published.read_row_list(path, data).tolist() == ROWS.tolist()

    published.write_row_list(path, data, np.zeros(3, bool))
    assert path.read_bytes() == b"empty_set\n"
    assert published.read_row_list(path, data).tolist() == [False] * 3
    path.write_bytes(b"")
    assert not published.read_row_list(path, data).any()


def test_row_lists_of_food101n_from_another_folder(tmp_path: Path) -> None:
    path = tmp_path / "nc_set.txt"
    published.write_row_list(path, FOOD101N, ROWS, data_path="../data/")
    assert path.read_text().startswith("../data/Food-101N_release/images/pie/1.jpg\n")
    assert published.read_row_list(path, FOOD101N).tolist() == ROWS.tolist()
    path.write_text("pie/1.jpg\n")  # bare keys, too
    assert published.read_row_list(path, FOOD101N).tolist() == [True, False, False]


def test_row_lists_refuse_unknown_keys_and_wrong_shapes(tmp_path: Path) -> None:
    path = tmp_path / "nc_set.txt"
    path.write_text("images/ü.jpg\nimages/n.jpg\nn2\n")
    with pytest.raises(KeyError, match=r"nc_set\.txt: .* got 2 that are not, first 'n\.jpg'"):
        published.read_row_list(path, CLOTHING1M)
    with pytest.raises(ValueError, match=r"must have shape \(3,\), got \(4,\)"):
        published.write_row_list(path, CLOTHING1M, np.ones(4, bool))


def test_nc_instances(tmp_path: Path) -> None:
    path = tmp_path / "NC_instances.txt"
    published.write_nc_instances(path, CLOTHING1M, ROWS)
    assert path.read_bytes() == "0/99/a b,1.jpg\r\nü.jpg\r\n".encode()
    assert published.read_row_list(path, CLOTHING1M).tolist() == ROWS.tolist()


def test_published_nc_instances(tmp_path: Path, published_files: Path) -> None:
    listed = (published_files / "NC_instances.txt").read_text().split()
    assert len(listed) == 200
    order = np.random.default_rng(0).permutation(400)
    keys = [*(f"images/{key}" for key in listed), *(f"images/0/00/{i}.jpg" for i in range(200))]
    data = manifest("clothing1m", [keys[i] for i in order], [0] * 400)
    rows = published.read_row_list(published_files / "NC_instances.txt", data)
    assert rows.tolist() == (order < 200).tolist()
    # Their order is not that of any key list, so compare what a list in it gives.
    in_their_order = manifest("clothing1m", keys, [0] * 400)
    published.write_nc_instances(tmp_path / "a.txt", in_their_order, np.arange(400) < 200)
    theirs = (published_files / "NC_instances.txt").read_bytes()
    assert (tmp_path / "a.txt").read_bytes() == theirs


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_class_ratios(tmp_path: Path, published_files: Path, name: str) -> None:
    counts, form, tolerance = PUBLISHED[name]
    ratio = published.read_class_ratio(published_files / name)
    assert ratio.shape == (len(counts),) and ratio.dtype == np.float64
    ours = class_ratio(np.repeat(np.arange(len(counts)), counts), len(counts))
    np.testing.assert_allclose(ratio, ours, rtol=tolerance)
    for written in (ratio, ours):
        published.write_class_ratio(tmp_path / name, written, form)
        again = published.read_class_ratio(tmp_path / name)
        np.testing.assert_allclose(again, ratio, rtol=tolerance)
    published.write_class_ratio(tmp_path / name, ratio, form)
    assert (tmp_path / name).read_bytes() == (published_files / name).read_bytes()


def test_class_ratio_files(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    published.write_class_ratio(path, np.array([0.25, 0.75]))
    assert path.read_bytes() == (
        b"2.500000000000000000e-01 0.000000000000000000e+00\r\n"
        b"0.000000000000000000e+00 7.500000000000000000e-01\r\n"
    )
    published.write_class_ratio(path, np.array([1 / 3, 2 / 3]), "vector")
    assert path.read_bytes() == b"0.333333333333\r\n0.666666666667\r\n"
    for text, message in (
        ("0.5 0\n0.1 0.5\n", r"zero beside its diagonal, got 0\.1 in line 2, column 1"),
        ("0.5 0 0\n0 0.5 0\n", r"k lines of one number or of k, got 2 of 3"),
        ("0.5 x\n", r"r\.txt: lines must be numbers"),
        ("1 0\n0\n", r"r\.txt: lines must be numbers"),
        ("\n", r"k lines of one number or of k, got 0 of 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            published.read_class_ratio(path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_argm(tmp_path: Path, dtype: type) -> None:
    rng = np.random.default_rng(0)
    top_class, top_prob = rng.integers(0, 50, 1000), rng.random(1000).astype(dtype)
    top_prob[:3] = [1, 0.84321, 1e-7]
    published.write_argm(tmp_path / "argm_m.txt", top_class, top_prob)
    lines = (tmp_path / "argm_m.txt").read_text().splitlines()
    assert lines[0] == f"{top_class[0]} 1.0"
    if dtype is np.float32:
        assert lines[1] == f"{top_class[1]} 0.84321"
    got_class, got_prob = published.read_argm(tmp_path / "argm_m.txt", 1000, 50)
    assert (got_class.dtype, got_prob.dtype) == (np.int32, np.float32)
    np.testing.assert_array_equal(got_class, top_class)
    np.testing.assert_array_equal(got_prob.astype(dtype), top_prob)


def test_argm_refuses(tmp_path: Path) -> None:
    path = tmp_path / "argm_m.txt"
    for text, message in (
        ("1 0.5\n", r"for each of 2 rows, got 1 lines of 2"),
        ("1\n2\n", r"for each of 2 rows, got 2 lines of 1"),
        ("1 0.5\n3 0.5\n", r"a class below 3 and a probability, got 3 0\.5 in line 2"),
        ("1 0.5\n1.5 0.5\n", r"got 1\.5 0\.5 in line 2"),
        ("-1 0.5\n1 0.5\n", r"got -1 0\.5 in line 1"),
        ("1 nan\n1 0.5\n", r"got 1 nan in line 1"),
        ("1 0.5\n1 1.5\n", r"got 1 1\.5 in line 2"),
        ("1 0.5\n1 x\n", r"argm_m\.txt: lines must be numbers"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            published.read_argm(path, 2, 3)
    path.write_text("")
    assert [len(a) for a in published.read_argm(path, 0, 3)] == [0, 0]


def test_weights_in_every_form(tmp_path: Path) -> None:
    weights = {"fc.weight": torch.arange(6.0).reshape(2, 3), "bn.count": torch.tensor(3)}
    wrapped = {f"module.{name}": value for name, value in weights.items()}
    optimiser = torch.optim.SGD([torch.zeros(2, requires_grad=True)], 0.1, momentum=0.9)
    torch.save(weights, tmp_path / "finetune_best.pth")
    torch.save(
        {
            "epoch": 3,
            "state_dict": weights,
            "optimizer": optimiser.state_dict(),
            "train_bvacc": np.float64(81.25),
        },
        tmp_path / "train_best.pth.tar",
    )
    torch.save(
        {"epoch": 3, "state_dict": wrapped, "top1": np.float32(0.5), "top5": torch.tensor(1)},
        tmp_path / "checkpoint.pth.tar",
    )
    torch.save(wrapped, tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "best.safetensors")
    files = list(tmp_path.iterdir())
    assert len(files) == 5
    for file in files:
        loaded = published.load_weights(file)
        assert loaded.keys() == weights.keys(), file
        for name, value in weights.items():
            torch.testing.assert_close(loaded[name], value, rtol=0, atol=0)


class Trap:
    """Something that runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("trapped",)


def test_weights_refuse_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Trap()}, "trap.pth")
    torch.save([torch.zeros(1)], "list.pth")
    torch.save({"epoch": 3}, "numbers.pth")
    torch.save({}, "empty.pth")
    Path("text.pth").write_text("no weights")
    Path("nothing.pth").write_bytes(b"")
    for name in ("trap", "text", "nothing"):
        with pytest.raises(ValueError, match=rf"{name}\.pth must be a checkpoint of plain tensors"):
            published.load_weights(f"{name}.pth")
    assert not Path("trapped").exists()
    for name in ("list", "numbers", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pth must hold named tensors"):
            published.load_weights(f"{name}.pth")
    with pytest.raises(FileNotFoundError):
        published.load_weights("none.pth")


def test_a_million_keys(tmp_path: Path) -> None:
    n = 1_000_000
    keys = pa.array([f"images/0/00/{i}.jpg" for i in range(n)])
    columns = {"key": keys, "path": keys, "split": pa.repeat("train", n)}
    data = Manifest(pa.table(columns), tuple("abc"), "clothing1m", "/data")
    rows = np.random.default_rng(0).random(n) < 0.5
    published.write_row_list(tmp_path / "nc_set.txt", data, rows)
    np.testing.assert_array_equal(published.read_row_list(tmp_path / "nc_set.txt", data), rows)
