"""Options of a command from the signature and the docstring of its function.

Types are checked, and ``--config FILE.yaml`` is read, by jsonargparse. This page decides how a
signature looks on a command line: ``num_classes`` is ``--num-classes``, a bool is a flag, a list
before ``*`` is positional, and so is what has no default there; ``Example:`` in the docstring ends
the help.
"""

from __future__ import annotations

import argparse
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser

from . import UsageError

_SHORT = {"out": "-o"}
_METAVARS = {"Path": "FILE", "int": "N", "float": "X"}


def parse(
    function: Callable[..., Any], program: str, words: Sequence[str]
) -> dict[str, Any] | None:
    """Keyword arguments for ``function`` from the words after the command's name.

    Returns:
        None if the words asked for help, which has been printed.

    Raises:
        UsageError: a word that is not understood, or one that is missing.
    """
    parser = build(function, program)
    try:
        values = parser.parse_args(list(words)).as_dict()
    except ArgumentError as error:
        raise UsageError(_readable(str(error))) from error
    except SystemExit as end:
        if end.code:
            raise
        return None
    return {name: values[name] for name in inspect.signature(function).parameters}


def build(function: Callable[..., Any], program: str) -> ArgumentParser:
    """The parser of one command."""
    doc = docstring_parser.google.parse(inspect.getdoc(function) or "")
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
    examples = [e.description for e in doc.examples if e.description]
    parser = ArgumentParser(
        prog=program,
        description="\n\n".join(filter(None, [doc.short_description, doc.long_description])),
        epilog="".join("example:\n" + _indent(e) for e in examples) or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
        print_config="--print-%s",
    )
    hints = get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        _add(parser, parameter, hints[parameter.name], texts.get(parameter.name, ""))
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file with options, named as above"
    )
    # For the help only: main() has acted on it and taken it out.
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error",
    )
    return parser


def _add(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    name, default = parameter.name, parameter.default
    required = default is inspect.Parameter.empty
    hint = _without_none(hint)
    is_list = get_origin(hint) is list
    one = get_args(hint)[0] if is_list else hint
    positional = parameter.kind is not parameter.KEYWORD_ONLY and (required or is_list)
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if hint is bool:
        options["action"] = "store_true"
        if default is not False:
            raise TypeError(f"{name}: a flag must be False by default, got {default!r}")
    elif get_origin(one) is Literal:
        options["choices"] = list(get_args(one))
        options["metavar"] = "|".join(map(str, get_args(one)))
    else:
        options["type"] = one
        word = name.upper().removesuffix("S" if is_list else "")
        options["metavar"] = _METAVARS.get(getattr(one, "__name__", ""), word)
    if is_list:
        options["nargs"] = "*" if positional and not required else "+"
    if not required:
        options["default"] = default
        if hint is not bool and default not in (None, [], ""):
            options["help"] += f" (default: {default})".replace("%", "%%")
    if positional:
        parser.add_argument(name, **options)
    else:
        options["required"] = required
        flags = [_SHORT[name]] if name in _SHORT else []
        parser.add_argument(*flags, "--" + name.replace("_", "-"), **options)


def _without_none(hint: Any) -> Any:
    """``int | None`` is ``int`` on a command line: None is said by leaving the option out."""
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arm for arm in get_args(hint) if arm is not type(None)]
        return rest[0] if len(rest) == 1 else Union[tuple(rest)]  # noqa: UP007 (built at run time)
    return hint


def _indent(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def _readable(message: str) -> str:
    """jsonargparse's message on one line, with the option's name as it was typed."""
    line = " ".join(message.split())
    if re.search(r"unrecognized arguments: [\w.]+=", line, re.IGNORECASE):
        line += "; settings come before the options"
    line = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", line)
    return re.sub(
        r'^Parser key "(\w+)"(?: element \d+)?: ',
        lambda m: "--" + m[1].replace("_", "-") + ": ",
        line,
    )
