import os
import pickle
import stat

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from genkl_ext.data.published import load_weights
from genkl_ext.training.checkpoints import (
    AtomicCheckpointIO,
    plain_names,
    read_checkpoint,
    save_weights,
)


class Code:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_weights_come_back(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    weights = net.state_dict()
    save_weights(tmp_path / "w.safetensors", weights)
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value)
        assert found[name].is_contiguous()


def test_shared_and_partial_memory(tmp_path):
    table = torch.arange(12.0).reshape(3, 4)
    weights = {"tied": table, "same": table, "row": table[1], "turned": table.t()}
    save_weights(tmp_path / "w.safetensors", weights)
    found = load_file(tmp_path / "w.safetensors")
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


def test_the_same_weights_are_the_same_bytes_that_all_may_read(tmp_path):
    net = nn.Linear(3, 4)
    for name in ("a", "b"):
        save_weights(tmp_path / f"{name}.safetensors", net.state_dict())
    a, b = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(a.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_not_written(tmp_path, prefix):
    weights = {prefix + "fc.weight": torch.ones(2), prefix + "module.bias": torch.zeros(2)}
    save_weights(tmp_path / "w.safetensors", weights)
    assert load_file(tmp_path / "w.safetensors").keys() == {"fc.weight", "module.bias"}


def test_names_of_the_network_itself_stay():
    one = torch.ones(1)
    assert plain_names({"module.a": one, "b": one}).keys() == {"module.a", "b"}
    assert plain_names({"network.a": one}).keys() == {"network.a"}
    assert plain_names({"network.a": one}, ["a"]).keys() == {"a"}
    assert plain_names({"network.a": one}, ["network.a"]).keys() == {"network.a"}
    assert plain_names({"network.module.a": one}, ["a"]).keys() == {"a"}
    assert plain_names({"network.a": one}, ["b"]).keys() == {"a"}
    assert plain_names({}) == {}


@pytest.mark.parametrize("what", ["weights", "checkpoint"])
def test_a_failure_leaves_the_file_before(tmp_path, monkeypatch, what):
    weights, path = {"a": torch.ones(2)}, tmp_path / "f.safetensors"

    def write():
        if what == "weights":
            save_weights(path, weights)
        else:
            AtomicCheckpointIO().save_checkpoint({"state_dict": weights}, path)

    write()
    before = path.read_bytes()

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", broken)
    weights["a"] = torch.zeros(2)
    with pytest.raises(OSError, match="no space"):
        write()
    assert [p.name for p in tmp_path.iterdir()] == ["f.safetensors"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("mmap", [False, True])
def test_a_checkpoint_comes_back(tmp_path, mmap):
    content = {"state_dict": {"a": torch.arange(3)}, "loops": {"n": 3, "done": True, "x": None}}
    AtomicCheckpointIO().save_checkpoint(content, tmp_path / "last.ckpt")
    found = read_checkpoint(tmp_path / "last.ckpt", mmap=mmap)
    assert torch.equal(found.pop("state_dict")["a"], torch.arange(3))
    assert found == {"loops": content["loops"]}


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "more": Code(tmp_path / "made")}, path)
    for read in (read_checkpoint, lambda p: AtomicCheckpointIO().load_checkpoint(p, None, False)):
        with pytest.raises(ValueError, match=r"last.ckpt must be a checkpoint, and is not"):
            read(path)
    path.write_bytes(pickle.dumps(Code(tmp_path / "made"), protocol=2))
    with pytest.raises(ValueError, match="must be a checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04broken"])
@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_no_checkpoint(tmp_path, content, mmap):
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="must be a checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt", mmap=mmap)


def test_what_is_another_file(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="must be the checkpoint of a training"):
        read_checkpoint(tmp_path / "w.pth")
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "absent.ckpt")


def test_a_checkpoint_holds_weights_for_load_weights(tmp_path):
    AtomicCheckpointIO().save_checkpoint(
        {"state_dict": {"network.a": torch.ones(1)}}, tmp_path / "last.ckpt"
    )
    assert load_weights(tmp_path / "last.ckpt").keys() == {"network.a"}
