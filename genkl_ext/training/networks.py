"""Networks by name, with k logits, and weights into them.

network = build(settings.Network("resnet50", pretrained="IMAGENET1K_V2"), 14, seed=0)
load_into(network, "best.safetensors")
"""

from __future__ import annotations

import difflib
import importlib
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.published import load_weights
from .checkpoints import plain_names
from .settings import Network

_SHOWN = 3  # names in a message


def build(network: Network, num_classes: int, seed: int) -> nn.Module:
    """A new network, on the CPU and in training mode, that gives ``num_classes`` logits.

    The name says where it is from:

        resnet50                   torchvision's classifiers; their last linear layer is replaced
        timm/resnet50.a1_in1k      timm, where it is installed
        package.module:function    a call of the function, with ``num_classes`` and the options

    ``pretrained`` is a file, or what torchvision calls the weights of that network ("DEFAULT" are
    its best); timm has "DEFAULT" only. A file must hold every weight and no other. One exception:
    where its last linear layer is for another number of classes, that layer stays as initialised.

    Args:
        network: name, weights, options of the constructor, memory format, torch.compile.
        num_classes: k.
        seed: of the first weights. torch's own generator is left as it was.

    Raises:
        ValueError: an unknown name, options that the constructor does not take, a network without
            linear layer, weights of another network. ImportError: what should make the network
            cannot be imported. OSError: the weights can be neither fetched nor read.
    """
    name, pretrained = network.name, network.pretrained
    is_file = pretrained is not None and Path(pretrained).is_file()
    weights_name = None if is_file else pretrained
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would change GPUs' as well
        if ":" in name:
            module = _from_function(name, num_classes, weights_name, network.options)
        elif name.startswith("timm/"):
            module = _from_timm(name, num_classes, weights_name, network.options)
        else:
            module = _from_torchvision(name, num_classes, weights_name, network.options)
    if is_file:
        assert pretrained is not None
        weights = plain_names(load_weights(pretrained), module.state_dict())
        _load("build", module, weights, pretrained, _other_classes(module, weights))
    if network.channels_last:
        module = module.to(memory_format=torch.channels_last)
    if network.compile:
        module.compile()  # in place: the names of the weights stay what they are
    return module


def load_into(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the weights of a file, every one and no other.

    Args:
        module: the network; after an error some of its weights may be loaded.
        path: ``.safetensors``, bare weights of torch.save, a dictionary with ``state_dict``, or our
            ``last.ckpt``; with or without the prefixes of wrappers.

    Raises:
        ValueError: it holds no weights, or those of another network. OSError: it cannot be read.
    """
    _load("load_into", module, plain_names(load_weights(path), module.state_dict()), path)


def _from_torchvision(
    name: str, num_classes: int, weights: str | None, options: Mapping[str, Any]
) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"build: name must be a classifier of torchvision, 'timm/NAME' or "
            f"'package.module:function', got {name!r}{_did_you_mean(name, known)}"
        )
    chosen = None
    if weights is not None:
        kinds = models.get_model_weights(name)
        if weights not in kinds.__members__:
            raise ValueError(
                f"build: pretrained must be a file or one of {', '.join(kinds.__members__)} for "
                f"{name}, got {weights!r}{_did_you_mean(weights, kinds.__members__)}"
            )
        chosen = kinds[weights]
    with _complaints(name, options), _only_weights():
        try:
            module: nn.Module = models.get_model(name, weights=chosen, **options)
        except OSError as error:
            assert chosen is not None
            raise OSError(
                f"build: cannot fetch {chosen.url} ({error}); fetch it on another machine and "
                f"give the file's path as pretrained, or put it into {torch.hub.get_dir()}/"
                "checkpoints"
            ) from error
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(
                f"build: the file of {chosen} in {torch.hub.get_dir()}/checkpoints must hold plain "
                "weights, and does not; remove it to fetch it again"
            ) from error
    if getattr(module, "aux_logits", False):
        raise ValueError(
            f"build: {name} must be without its second classifier; give options aux_logits=False"
        )
    _replace_last_layer(name, module, num_classes)
    return module


def _from_timm(
    name: str, num_classes: int, weights: str | None, options: Mapping[str, Any]
) -> nn.Module:
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError(f"build: {name} needs the package timm: pip install timm") from error
    timm_name = name.removeprefix("timm/")
    if not timm.is_model(timm_name):
        raise ValueError(
            f"build: name must be a network of timm after 'timm/', got {timm_name!r}"
            f"{_did_you_mean(timm_name, timm.list_models())}"
        )
    if weights not in (None, "DEFAULT"):
        raise ValueError(
            f"build: pretrained must be a file or DEFAULT for {name}, got {weights!r}; timm has "
            "the kind of weights in the name, as in resnet50.a1_in1k"
        )
    with _complaints(name, options), _only_weights():
        try:
            module: nn.Module = timm.create_model(
                timm_name, pretrained=weights is not None, num_classes=num_classes, **options
            )
        except (OSError, RuntimeError) as error:
            if weights is None:
                raise
            raise OSError(
                f"build: cannot fetch the weights of {name} ({error}); fetch them on another "
                "machine and give the file's path as pretrained"
            ) from error
    return module


def _from_function(
    name: str, num_classes: int, weights: str | None, options: Mapping[str, Any]
) -> nn.Module:
    if weights is not None:
        raise ValueError(f"build: pretrained must be a file for {name}, got {weights!r}")
    place, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(place), function_name)
    except ImportError as error:
        raise ImportError(f"build: cannot import {place} for {name}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"build: {place} must have a function {function_name!r}") from error
    with _complaints(name, options):
        module = function(num_classes=num_classes, **options)
    if not isinstance(module, nn.Module):
        raise ValueError(f"build: {name} must give a torch.nn.Module, got {type(module).__name__}")
    return module


def _last_layer(module: nn.Module) -> tuple[str, nn.Linear] | None:
    """The linear layer that is defined last, and its name."""
    layers = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    return layers[-1] if layers else None


def _replace_last_layer(name: str, module: nn.Module, num_classes: int) -> None:
    """Give the network ``num_classes`` logits; it keeps a layer that gives as many."""
    last = _last_layer(module)
    if last is None:
        raise ValueError(f"build: {name} must end in a linear layer, and has none")
    path, old = last
    if old.out_features != num_classes:
        parent, _, attribute = path.rpartition(".")
        new = nn.Linear(old.in_features, num_classes, bias=old.bias is not None)
        setattr(module.get_submodule(parent), attribute, new)


def _other_classes(module: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the last layer's weights, if those given are for another number of classes."""
    last = _last_layer(module)
    if last is None:
        return []
    path, layer = last
    given = weights.get(f"{path}.weight")
    if given is None or given.ndim != 2 or len(given) == layer.out_features:
        return []
    return [name for name in (f"{path}.weight", f"{path}.bias") if name in weights]


def _load(
    where: str,
    module: nn.Module,
    weights: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    leave: Iterable[str] = (),
) -> None:
    """Load all weights but those to leave.

    Not torch's own strict mode: its message has a line for each weight, without the file.
    """
    left = set(leave)
    try:
        found = module.load_state_dict(
            {name: value for name, value in weights.items() if name not in left}, strict=False
        )
    except RuntimeError as error:  # shapes
        raise ValueError(
            f"{where}: {os.fspath(path)} must hold the weights of this network, got "
            f"{str(error).splitlines()[1].strip()}"
        ) from error
    missing = [name for name in found.missing_keys if name not in left]
    if missing or found.unexpected_keys:
        raise ValueError(
            f"{where}: {os.fspath(path)} must hold the weights of this network, and lacks "
            f"{_some(missing)}; it has besides {_some(found.unexpected_keys)}"
        )


@contextmanager
def _complaints(name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Says that it may be the options which a constructor does not like."""
    try:
        yield
    except TypeError as error:
        raise ValueError(
            f"build: options must be arguments of {name}, got {dict(options)}: {error}"
        ) from error


@contextmanager
def _only_weights() -> Iterator[None]:
    """torch.load runs no code of a file, also where its caller would let it."""
    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _some(names: list[str]) -> str:
    """ "4 (a, b, c, ...)"."""
    if not names:
        return "none"
    shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    return f"{len(names)} ({shown})"


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
