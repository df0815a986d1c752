"""Find the command, run it, and turn what happens into an exit status and at most one line.

    0 success        1 failure       2 wrong usage
    130 interrupted  143 terminated  141 the reader of the output left

This page imports next to nothing: ``genkl --help`` answers before NumPy would be loaded.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from . import UsageError

# In the order of use. The function of "group name" is genkl_ext.cli.group:name, that of "name"
# genkl_ext.cli.name:name, with "_" for "-".
COMMANDS = {
    "demo": "the whole loop on bundled images: train, score, relabel, train again",
    "info": "what is installed and built, and what is missing",
    "data info": "what a folder, table or manifest of images holds, and what is odd in it",
    "data make-example": "a miniature of a data set, in its layout",
    "run": "the whole framework by a recipe: members, NC set, relabelling, training, again",
    "scan": "the broken images of a data set, and why they are",
    "predict": "softmax outputs of a trained network for all images of a data set",
    "calibrate": "alpha, and beta, for a share of verified clean predictions",
    "sweep": "what other alphas, betas, sigmas, vectors and seeds would flag",
    "score": "NC scores of prediction files",
    "evaluate-nc": "how well scores find the images that are known not to conform",
    "relabel": "targets of the next training, from scores and given labels",
    "train": "one training of a recipe: with the objective of GenKL, or on given labels",
    "finetune": "from trained weights, on the clean images",
    "report": "one HTML page about a run: what was found, and the images to look at",
    "plot": "a single figure of a run or of a table of scores",
    "review apply": "what people decided about single images, into a manifest",
    "bench": "the benchmarks that suit this machine",
}

_HELP = """\
usage: genkl {group}COMMAND [OPTIONS]

Find the images of a web-crawled training set that fit no class, or several.

commands:
{commands}

options:
  -h, --help   this help; genkl COMMAND --help for one command
  --version    the version of genkl_ext
  --debug      show the traceback of an error

example:
  {example}
"""
# The function that an error names first; the command, which says more to its user, stands there.
_LIBRARY = re.compile(
    r"\A(?:(?:apply|calibrate|demo|evaluate|find|finetune|info|make_example|plot|predict|relabel|"
    r"report|run|scan|score|sweep|train): )+"
)
_EXAMPLES = {
    "": "genkl score predictions.npy --preset clothing1m -o scores.parquet",
    "data": "genkl data info /data/clothing1m",
    "review": "genkl review apply review.csv --data manifest.parquet -o reviewed.parquet",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``genkl`` with these arguments (default: the command line's); return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = "genkl"
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    try:
        command, _ = _command(words)
        if command:
            name = f"genkl {command}"
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
        _say(f"{name}: {_LIBRARY.sub('', text)}")
        return 1


def _run(words: list[str]) -> int:
    command, rest = _command(words)
    known = [name for name in COMMANDS if not command or f"{name} ".startswith(f"{command} ")]
    if command not in COMMANDS:
        if not rest:
            raise UsageError(f"a command is needed: {', '.join(known)}")
        if rest[0] in ("-h", "--help"):
            print(_help(command, known), end="")
            return 0
        if rest[0] == "--version":
            from .. import __version__

            print(f"genkl {__version__}")
            return 0
        raise UsageError(_unknown(f"{command} {rest[0]}".strip(), known))
    from .parser import parse

    names = command.replace("-", "_").split()
    function = getattr(import_module(f".{names[0]}", __package__), names[-1])
    if "" not in sys.path:
        # A network of one's own is looked for in the current folder, as python -m would.
        sys.path.append("")
    values = parse(function, f"genkl {command}", rest)
    if values is None:  # --help and the like have been answered
        return 0
    return function(**values) or 0


def _command(words: list[str]) -> tuple[str, list[str]]:
    """The command, or the group, or "", that the words begin with, and the words after it."""
    for count in (2, 1):
        start = " ".join(words[:count])
        if start in COMMANDS or any(name.startswith(f"{start} ") for name in COMMANDS):
            return start, words[count:]
    return "", words


def _help(group: str, commands: list[str]) -> str:
    width = max(map(len, commands))
    lines = [f"  {name:{width}}   {COMMANDS[name]}" for name in commands]
    example = _EXAMPLES[group]
    return _HELP.format(group=f"{group} ".lstrip(), commands="\n".join(lines), example=example)


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


def _unknown(word: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
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
