"""``genkl predict``: what it takes, what it says, how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genkl_ext import unfinished
from genkl_ext.cli.main import main
from genkl_ext.data import Manifest, Transforms, examples
from genkl_ext.ranks import Ranks
from genkl_ext.training import networks, predict
from genkl_ext.training.checkpoints import save_weights
from genkl_ext.training.settings import Data, Engine, Network

# A network of one's own, for --network own:build.
OWN = """
from torch import nn


def build(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """clothing1m/ and webvision/, two miniatures of 24 noisy images."""
    folder = tmp_path_factory.mktemp("data")
    examples.make("clothing1m", folder / "clothing1m", count=24, classes=4)
    examples.make("webvision", folder / "webvision", count=24, classes=6)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: own.py and w.safetensors, its weights for 4 classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    sys.modules.pop("own", None)
    save_weights("w.safetensors", networks.build(Network("own:build"), 4, seed=3).state_dict())
    return tmp_path


WORDS = "--network own:build --weights w.safetensors -o q.npy"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, str], str]:
    status = main(["predict", *" ".join(map(str, words)).split()])
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line[:1] != " "]
    return status, {line[:18].strip(): line[18:] for line in lines}, err


def expected(manifest: Manifest, transforms: Transforms, size: int = 128) -> bytes:
    """The file that the function makes."""
    network = networks.build(Network("own:build"), 4, seed=0)
    networks.load_into(network, "w.safetensors")
    engine = Engine("cpu", predict_batch_size=size)
    predict.predict(
        network,
        manifest,
        "expected.npy",
        data=Data(eval=transforms),
        engine=engine,
        ranks=Ranks(),
    )
    return Path("expected.npy").read_bytes()


def test_a_data_set(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data / "clothing1m"
    status, said, err = run(capsys, root, WORDS)
    manifest = Manifest.from_clothing1m(root)
    noisy = manifest.split("train")
    assert (status, err) == (0, "")
    assert said["predicted"] == "24 images of clothing1m, 4 classes"
    assert said["seen as"] == "224 x 224 of the middle, shorter side 256"
    assert said["broken"] == "none"
    assert "img/s" in said["speed"] and said["predictions"] == "q.npy"
    assert "resumed" not in said
    assert Path("q.npy").read_bytes() == expected(noisy, Transforms.preset("clothing1m", "eval"))
    right = predict.accuracy("q.npy", noisy.labels)
    shares = f"top-1 {100 * right.top1:.2f} %, top-5 {100 * right.top5:.2f} %"
    assert said["given labels"] == f"{shares} of 24"

    manifest.save("m.parquet")
    words = "m.parquet --split val --size 32 --batch-size 3 --dtype float16 --threads 1"
    assert run(capsys, words, WORDS)[1]["predicted"] == "4 images of clothing1m, 4 classes"
    made = np.load("q.npy")
    assert (made.dtype, made.shape) == (np.float16, (4, 4))
    expected(manifest.split("val"), Transforms(size=32, resize=37), size=3)
    np.testing.assert_array_equal(made, np.load("expected.npy").astype(np.float16))


def test_webvision_with_fewer_classes(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said, _ = run(capsys, data / "webvision", "--num-classes 4", WORDS)
    manifest = Manifest.from_webvision(data / "webvision", 4).split("train")
    assert status == 0 and 0 < len(manifest) < 24
    assert said["predicted"] == f"{len(manifest)} images of webvision, 4 classes"
    assert said["seen as"] == "299 x 299 of the middle, shorter side 320"
    assert Path("q.npy").read_bytes() == expected(manifest, Transforms.preset("webvision", "eval"))


def test_another_number_of_classes_than_that_of_the_labels(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(networks.build(Network("own:build"), 2, seed=0).state_dict(), "w.pth")
    words = "--network own:build --weights w.pth --num-classes 2 -o q.npy --transforms webvision"
    status, said, _ = run(capsys, data / "clothing1m", words)
    assert status == 0 and "given labels" not in said
    assert said["predicted"] == "24 images of clothing1m, 2 classes"
    assert said["seen as"] == "299 x 299 of the middle, shorter side 320"
    assert np.load("q.npy").shape == (24, 2)


def test_options_of_the_network(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = Network("own:build", options={"width": 7})
    save_weights("w.safetensors", networks.build(wide, 4, seed=3).state_dict())
    words = (data / "clothing1m", WORDS, "--size 32")
    assert run(capsys, *words, '--options {"width":7}')[0] == 0
    status, _, err = run(capsys, *words)
    assert status == 1 and "w.safetensors must hold the weights of this network" in err


def test_broken_images(
    data: Path, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples.make("folder", tmp_path / "f", count=24, classes=4)
    noisy = Manifest.from_folder("f").split("train")
    for row in (3, 5, 9):
        Path(noisy.path(row)).write_bytes(b"")
    assert main(["scan", "f", "--ledger", "ledger.parquet"]) == 0
    Path(noisy.path(11)).write_text("<html>")
    Path(noisy.path(12)).write_text("<html>")
    capsys.readouterr()
    assert main(["predict", "f", "--ledger", "ledger.parquet", "--size", "32", *WORDS.split()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    start = lines.index("broken            5, their rows are NaN")
    assert lines[start + 1 : start + 3] == ["  in the ledger   3", "  not an image    2"]
    assert lines[start + 3].startswith(f"first             {noisy.path(11)}: not an image, ")
    assert lines[start + 4].startswith(f"                  {noisy.path(12)}: not an image, ")
    broken = np.isnan(np.load("q.npy")).all(axis=1)
    np.testing.assert_array_equal(np.flatnonzero(broken), [3, 5, 9, 11, 12])
    assert "given labels" in out and " of 19\n" in out


def test_a_stopped_job_goes_on(
    data: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unfinished, "MARK_SECONDS", 0)
    write = unfinished.Unfinished.write

    def interrupted(self: unfinished.Unfinished, batch: int, *rest: object) -> None:
        if batch == 2:
            raise KeyboardInterrupt
        write(self, batch, *rest)

    words = (data / "clothing1m", "--size 32 --batch-size 5", WORDS)
    with monkeypatch.context() as patch:
        patch.setattr(unfinished.Unfinished, "write", interrupted)
        assert run(capsys, *words)[0] == 130
    status, said, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert said["resumed"] == "10 images had been predicted before"
    assert ".q.npy.partial" not in os.listdir()


def test_under_torchrun(data: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(data / "clothing1m"), "--size", "32", "--batch-size", "5", *WORDS.split()]
    assert main(["predict", *words]) == 0
    alone = Path("q.npy").read_bytes()
    Path("q.npy").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "genkl_ext.cli.main", "predict", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("predicted") == 1 and "img/s, 2 processes" in done.stdout
    assert Path("q.npy").read_bytes() == alone


@pytest.mark.parametrize(
    ("words", "status", "line"),
    [
        ("", 2, "the following arguments are required: "),
        ("{data} {own} --transforms webvision --size 3", 2, "--transforms must be left out with "),
        ("{data} {own} --batch-size 0", 2, "--batch-size must be at least 1"),
        ("{data} {own} --threads 0", 2, "--threads must be at least 1"),
        ("{data} {own} --size 32 --resize 30", 1, "Transforms: resize must be an integer of at "),
        ("none {own}", 1, "none does not exist"),
        (
            "m.parquet {own} --split test",
            1,
            "split must be one that m.parquet has, train, got test",
        ),
        ("{data} -o q.npy --weights none.pth --network own:build", 1, "none.pth"),
        ("{data} -o q.npy --weights own.py --network own:build", 1, "own.py must be a checkpoint"),
        ("{data} -o q.npy --weights w.safetensors --network resnet18", 1, "must hold the weights"),
        ("{data} -o q.npy --weights w.safetensors --network resnet", 1, "did you mean "),
        ("{data} -o q.txt --weights w.safetensors --network own:build", 1, "out must be an .npy"),
        ("{data} {own} --ledger own.py", 1, "own.py"),
        ("{data} {own} --accelerator gpu", 1, "needs a GPU for each process"),
    ],
)
def test_a_failure_is_one_line_and_leaves_nothing(
    data: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Manifest.from_clothing1m(data / "clothing1m").split("train").save("m.parquet")
    before = sorted(os.listdir())
    got = main(["predict", *words.format(data=data / "clothing1m", own=WORDS).split()])
    out, err = capsys.readouterr()
    assert (got, out) == (status, "")
    assert err.startswith("genkl predict: ") and line in err and err.count("\n") == 1
    assert sorted(name for name in os.listdir() if name != "__pycache__") == before
