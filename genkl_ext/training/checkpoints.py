"""Weights and the state of a training on disk.

    *.safetensors   weights of a network, under the network's own names
    last.ckpt       a checkpoint of Lightning: weights, optimiser, loops, what ``engine.py`` adds

Both are written whole or not at all, and no code in a file is ever run.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..files import atomic_write

_WRAPPERS = ("module.", "_orig_mod.")  # torch's multi-GPU wrappers, torch.compile
_IN_CHECKPOINT = "network."  # before the names of the weights in last.ckpt


def save_weights(path: str | os.PathLike[str], weights: Mapping[str, Tensor]) -> None:
    """Write named weights as safetensors, in place of what is there.

    Args:
        path: the file; ``.safetensors``.
        weights: ``network.state_dict()``, on any device. Prefixes of wrappers are taken away, and
            weights that share memory are written as often as they have names.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors.torch import save

    named: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, value in plain_names(weights).items():
        plain = value.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in written:
            plain = plain.clone()
        written.add(plain.untyped_storage().data_ptr())
        named[name] = plain
    with atomic_write(path) as temporary:
        # Not safetensors' save_file: it makes a file of its own, which only its owner can read.
        temporary.write_bytes(save(named, metadata={"format": "pt"}))


def plain_names(weights: Mapping[str, Tensor], own: Collection[str] = ()) -> dict[str, Tensor]:
    """The weights without what wrappers put before all their names.

    Args:
        weights: by name.
        own: the names in the network that they are for. Nothing is taken away from weights of
            which one has such a name; from others, what our last.ckpt puts before them as well.
    """
    prefixes = (*_WRAPPERS, _IN_CHECKPOINT) if own else _WRAPPERS
    named = dict(weights)
    while named and not any(name in own for name in named):
        common = [p for p in prefixes if all(name.startswith(p) for name in named)]
        if not common:
            break
        named = {name.removeprefix(common[0]): value for name, value in named.items()}
    return named


class AtomicCheckpointIO(TorchCheckpointIO):
    """How Lightning writes and reads ``last.ckpt``: whole or not at all, and without code."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | Path,
        storage_options: Any = None,
    ) -> None:
        """Write it in place of the one before, which stays until then."""
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read it onto the CPU, plain values and tensors only, whatever Lightning asks for."""
        return read_checkpoint(path)


def read_checkpoint(path: str | os.PathLike[str], *, mmap: bool = False) -> dict[str, Any]:
    """The content of a ``last.ckpt``, on the CPU.

    Args:
        path: the file.
        mmap: map it into memory: what is not looked at is not read.

    Raises:
        ValueError: it is no checkpoint. OSError: it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{os.fspath(path)} must be a checkpoint, and is not") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise ValueError(f"{os.fspath(path)} must be the checkpoint of a training, and is not")
    return content
