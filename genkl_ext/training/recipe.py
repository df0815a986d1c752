"""Recipes: the settings of a run, read from YAML and written to it.

    recipe = load("clothing1m", ["data.root=/data/clothing1m", "training.epochs=5"])
    check(recipe)                        # checks.py: what cannot work, before anything starts
    check_against(recipe, manifest)      #            what cannot work with these images
    Path("recipe.yaml").write_text(to_yaml(recipe))

A recipe is a mapping of the parts in ``settings.py``. What it leaves out keeps its default, or
with ``extends: NAME`` the value of that other recipe: a file, seen from the folder of this one, or
one that comes with the package.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import os
import re
import types
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from .checks import check as check
from .checks import check_against as check_against
from .settings import Recipe

_BUNDLED = Path(__file__).parents[1] / "recipes"
_EXTENDS = "extends"
_DEFAULT = "default"
_WORDS = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class _Given(NamedTuple):
    """A value, and the file, name or override that it was read from."""

    value: Any
    origin: str


# ---- reading and writing -------------------------------------------------------------------------


def names() -> dict[str, str]:
    """The recipes that come with the package: name -> the first line of its comment."""
    paths = {
        path.relative_to(_BUNDLED).with_suffix("").as_posix(): path
        for path in _BUNDLED.rglob("*.yaml")
    }
    return {
        name: paths[name].read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        for name in sorted(paths, key=lambda name: ("/" in name, name))
    }


def load(source: str | os.PathLike[str] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """The settings of a run, every one of them known and of its type.

    Args:
        source: a YAML file; the name of a recipe of :func:`names`, with or without ".yaml"; or
            settings made in Python.
        overrides: "training.omega_nnc=16" and the like, values in YAML; the last one counts. A
            part takes a mapping: "training.optimizer={name: adamw, lr: 0.001}".

    Raises:
        ValueError: no such recipe, no YAML, a key that is unknown or there twice, a value of
            another type or outside what it can be; one line with the file, the key, what was
            wanted and what came. OSError: the file cannot be read.
    """
    given = _flatten(dataclasses.asdict(Recipe()), _DEFAULT)
    if isinstance(source, Recipe):
        given |= _flatten(dataclasses.asdict(source), "recipe")
    else:
        for origin, document in _with_bases(_find(source, Path(), "recipe")):
            given |= _flatten(document, origin)
    for override in overrides:
        given |= _read_override(override)
    recipe: Recipe = _built(Recipe, given)
    return recipe


def to_yaml(recipe: Recipe) -> str:
    """All settings as YAML, in the order of ``settings.py``; :func:`load` reads the same recipe.

    Raises:
        ValueError: an option of the network that YAML has no plain form for.
    """
    try:
        return yaml.dump(
            dataclasses.asdict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True
        )
    except yaml.YAMLError as error:
        raise ValueError(
            f"recipe: network.options must be numbers, text, lists and mappings, "
            f"got {recipe.network.options!r}"
        ) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which takes 5e-7 for a number and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused below
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Its counterpart; lists stay on one line."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )
for _sequence in (list, tuple):
    _Dumper.add_representer(
        _sequence,
        lambda dumper, value: dumper.represent_sequence(
            "tag:yaml.org,2002:seq", value, flow_style=True
        ),
    )


def _find(source: str | os.PathLike[str], folder: Path, what: str) -> Path:
    """The file of a recipe: a path from ``folder``, or a bundled name."""
    path = folder / source
    if path.is_file():
        return path
    known = names()
    name = os.fspath(source).removesuffix(".yaml")
    if name in known:
        return _BUNDLED / f"{name}.yaml"
    raise ValueError(
        f"{what} must be a YAML file or one of {', '.join(known)}, got {os.fspath(source)!r}"
        + _did_you_mean(difflib.get_close_matches(name, known, n=1))
    )


def _with_bases(path: Path) -> list[tuple[str, dict[Any, Any]]]:
    """What a recipe says, behind what those say that it extends; each with what to call it."""
    seen: list[Path] = []
    documents: list[tuple[str, dict[Any, Any]]] = []
    while True:
        origin, document = _origin(path), _read(path)
        base = document.pop(_EXTENDS, None)
        seen.append(path.resolve())
        documents.insert(0, (origin, document))
        if base is None:
            return documents
        if not isinstance(base, str):
            raise ValueError(f"{origin}: {_EXTENDS} must be the name of a recipe, got {base!r}")
        path = _find(base, path.parent, f"{origin}: {_EXTENDS}")
        if path.resolve() in seen:
            raise ValueError(f"{origin}: {_EXTENDS} must not lead back to itself, got {base!r}")


def _read(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file."""
    origin = _origin(path)
    try:
        document = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} must be a text file in UTF-8: {error.reason}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{origin}{_yaml_problem(error)}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError(f"{origin} must be a mapping of the parts of a recipe, got {document!r}")
    return document


def _read_override(text: str) -> dict[str, _Given]:
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"recipe: an override must be KEY=VALUE, got {text!r}")
    try:
        value = yaml.load(value_text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        if _leaves().get(key) is not str:
            raise ValueError(f"{text}{_yaml_problem(error)}") from error
        value = None
    if _leaves().get(key) is str and not isinstance(value, str):
        value = value_text  # a folder may be called 2024, or @home
    for part in reversed(key.split(".")):
        value = {part: value}
    return _flatten(value, text)


def _yaml_problem(error: Exception) -> str:
    """ ", line 3: what is wrong", on one line."""
    mark = getattr(error, "problem_mark", None)
    line = "" if mark is None else f", line {mark.line + 1}"
    problem = getattr(error, "problem", None) or str(error)
    return f"{line}: {' '.join(problem.split())}"


def _origin(path: Path) -> str:
    """What to call a recipe's file in a message."""
    if path.is_relative_to(_BUNDLED):
        return f"recipe {path.relative_to(_BUNDLED).with_suffix('').as_posix()}"
    return str(path)


# ---- keys and types ------------------------------------------------------------------------------


@functools.cache
def _leaves() -> dict[str, Any]:
    """Dotted key -> type of every setting, in order."""
    return _settings_of(Recipe)


def _settings_of(part: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    hints = get_type_hints(part)
    for field in dataclasses.fields(part):
        hint, key = hints[field.name], prefix + field.name
        found |= _settings_of(hint, key + ".") if dataclasses.is_dataclass(hint) else {key: hint}
    return found


@functools.cache
def _sections() -> set[str]:
    """Dotted keys of the parts and their parts."""
    return {key[: dot.start()] for key in _leaves() for dot in re.finditer(r"\.", key)}


def _flatten(document: Mapping[Any, Any], origin: str, prefix: str = "") -> dict[str, _Given]:
    """Dotted key -> value of all that a recipe says.

    Raises:
        ValueError: a key that there is not, or a part that is no mapping.
    """
    found: dict[str, _Given] = {}
    for name, value in document.items():
        key = f"{prefix}{name}"
        if key in _leaves():
            found[key] = _Given(value, origin)
        elif key in _sections():
            if isinstance(value, Mapping):
                found |= _flatten(value, origin, key + ".")
            elif value is not None:  # nothing but comments in it
                raise ValueError(f"{origin}: {key} must be a mapping of settings, got {value!r}")
        else:
            raise ValueError(f"{origin}: unknown setting {key}{_did_you_mean(_like(key))}")
    return found


def _like(key: str) -> list[str]:
    """Settings and parts that somebody who wrote ``key`` may have meant."""
    known = [*_leaves(), *sorted(_sections())]
    prefix, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == prefix}
    if near := difflib.get_close_matches(name, siblings, n=1):
        return [siblings[near[0]]]
    elsewhere = [k for k in known if k.rpartition(".")[2] == name]
    below = [k for k in elsewhere if k.startswith(f"{prefix}.")]
    return below or elsewhere[:3]


def _did_you_mean(near: Sequence[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _built(part: Any, given: Mapping[str, _Given], prefix: str = "") -> Any:
    """A part, or the recipe, of the values of all its settings.

    Raises:
        ValueError: a value of another type, or values that the part refuses.
    """
    values = {}
    hints = get_type_hints(part)
    for field in dataclasses.fields(part):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            values[field.name] = _built(hint, given, f"{key}.")
            continue
        value, origin = given[key]
        try:
            values[field.name] = _as(value, hint)
        except TypeError:
            raise ValueError(f"{origin}: {key} must be {_words(hint)}, got {value!r}") from None
    try:
        return part(**values)
    except ValueError as error:
        origins = {item.origin: None for key, item in given.items() if key.startswith(prefix)}
        origins.pop(_DEFAULT, None)
        message = str(error).replace(f"{part.__name__}: ", prefix, 1)
        raise ValueError(f"{', '.join(origins)}: {message}") from error


def _as(value: Any, hint: Any) -> Any:
    """A value from YAML as one of this type; numbers and true are no text, and text none of them.

    Raises:
        TypeError: it is of another type.
    """
    kind, arms = get_origin(hint), get_args(hint)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Any or type(value) is hint or (kind is Literal and value in arms):
        return value
    if kind is list and isinstance(value, list):
        return [_as(item, arms[0]) for item in value]
    if kind is tuple and isinstance(value, (list, tuple)) and len(value) == len(arms):
        return tuple(map(_as, value, arms))
    if kind is dict and isinstance(value, dict):
        return {_as(key, arms[0]): _as(item, arms[1]) for key, item in value.items()}
    if kind is types.UnionType:
        for arm in arms:
            with contextlib.suppress(TypeError):
                return _as(value, arm)
    raise TypeError


def _words(hint: Any) -> str:
    """A type for people."""
    kind, arms = get_origin(hint), get_args(hint)
    if kind is Literal:
        return "one of " + ", ".join(map(str, arms))
    if kind is types.UnionType:
        return " or ".join(map(_words, arms))
    if kind is list:
        return f"a list, each item {_words(arms[0])}"
    if kind is tuple:
        return f"a list of {len(arms)} numbers"
    if kind is dict:
        return "a mapping" if arms[1] is Any else f"a mapping of integers to {_words(arms[1])}"
    return _WORDS[hint]
