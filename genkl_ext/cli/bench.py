"""``genkl bench``: run the scripts of ``bench/``, which come with the source tree only."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

from . import UsageError

FOLDER = Path(__file__).resolve().parents[2] / "bench"


def bench(names: list[str] = [], *, list_only: bool = False) -> int:  # noqa: B006 (never changed)
    """Run the benchmarks of the source tree one after another; each judges what suits this machine.

    A script's own options: python bench/NAME.py --help.

    Args:
        names: benchmarks to run; by default all
        list_only: show the names and what each one asks, and run nothing

    Example:
        genkl bench --list-only
        genkl bench nc_score
    """
    scripts = find_scripts(FOLDER)
    unknown = [name for name in names if name not in scripts]
    if unknown:
        raise UsageError(f"no benchmark {unknown[0]!r}; there are {', '.join(scripts)}")
    if list_only:
        width = max(map(len, scripts))
        for name, path in scripts.items():
            print(f"{name:{width}}  {_question(path)}")
        return 0
    failed = []
    for name in names or scripts:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(scripts[name])], check=False).returncode:
            failed.append(name)
    if failed:
        raise RuntimeError(f"failed: {', '.join(failed)}")
    return 0


def find_scripts(folder: Path) -> dict[str, Path]:
    """Name -> file of the benchmarks in ``folder``: the files in it that run as a program.

    Raises:
        FileNotFoundError: there is none, as in an installed package.
    """
    scripts = {
        path.stem: path
        for path in sorted(folder.glob("*.py"))
        if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8")
    }
    if not scripts:
        raise FileNotFoundError(
            f"the benchmarks come with the source tree, not with the installed package: "
            f"no scripts in {folder}; clone the repository and run genkl bench from there"
        )
    return scripts


def _question(path: Path) -> str:
    """The first line of a script's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return doc.partition("\n")[0]
