"""Find the command, run it, and turn what happens into an exit status and at most one line.

    0 success        1 failure       2 wrong usage
    130 interrupted  143 terminated  141 the reader of the output left

This page imports next to nothing: ``genkl --help`` answers before NumPy would be loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from . import UsageError

# In the order of use. The function is genkl_ext.cli.NAME:NAME, with "_" for "-".
COMMANDS = {
    "demo": "the whole loop on bundled images: train, score, relabel, train again",
    "info": "what is installed and built, and what is missing",
    "score": "NC scores of prediction files",
    "bench": "the benchmarks that suit this machine",
}

_HELP = """\
usage: genkl COMMAND [OPTIONS]

Find the images of a web-crawled training set that fit no class, or several.

commands:
{commands}

options:
  -h, --help   this help; genkl COMMAND --help for one command
  --version    the version of genkl_ext
  --debug      show the traceback of an error

example:
  genkl score predictions.npy --preset clothing1m -o scores.parquet
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``genkl`` with these arguments (default: the command line's); return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = "genkl"
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        if words and words[0] in COMMANDS:
            name = f"genkl {words[0]}"
        with warnings.catch_warnings(), _terminated_like_interrupted():
            warnings.showwarning = _warn_in_one_line(name)
            status = _run(words)
        sys.stdout.flush()  # a closed pipe shows here, not at exit
        return status
    except UsageError as error:
        _say(f"{name}: {error} (see {name} --help)")
        return 2
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit and would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        return 130
    except Exception as error:
        if debug:
            raise
        text = _describe(error)
        _say(f"{name}: {text.removeprefix(name.removeprefix('genkl ') + ': ')}")
        return 1


def _run(words: list[str]) -> int:
    if not words:
        raise UsageError(f"a command is needed: {', '.join(COMMANDS)}")
    word, *rest = words
    if word in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = (f"  {name:{width}}   {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)), end="")
        return 0
    if word == "--version":
        from .. import __version__

        print(f"genkl {__version__}")
        return 0
    if word not in COMMANDS:
        raise UsageError(_unknown(word))
    from .parser import parse

    function_name = word.replace("-", "_")
    function = getattr(import_module(f".{function_name}", __package__), function_name)
    values = parse(function, f"genkl {word}", rest)
    if values is None:  # --help and the like have been answered
        return 0
    return function(**values) or 0


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems send, ends the program by an exception: what was begun is
    cleaned up. Python allows this in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _unknown(word: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"no command {word!r}; {hint}"


def _describe(error: Exception) -> str:
    """One line. An error that was not written for a reader is named and says where to look."""
    text = " ".join(str(error).split())
    if isinstance(error, (OSError, TypeError, ValueError)) and text:
        return text
    return f"{type(error).__name__}{': ' if text else ''}{text} (--debug shows the traceback)"


def _warn_in_one_line(name: str) -> Any:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _say(f"{name}: warning: {' '.join(str(message).split())}")

    return show


def _say(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
