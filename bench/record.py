"""What every benchmark shares beside the clock: its options, the machine's facts, its files."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from genkl_ext.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

_LOAD_BEFORE = os.getloadavg()  # of other programs: taken before the benchmark adds its own

FORMAT = 1  # of the JSON files; raised when a reader of older files would misread newer ones


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes; the description is the script's docstring."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--quick", action="store_true", help="tiny sizes: shows that it runs, not how fast"
    )
    options.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for NAME.json and NAME.md; by default bench/results after a full run, and "
        "nothing is written after a quick or partial one",
    )
    return options


def write(
    name: str, settings: dict[str, Any], cells: list[dict[str, Any]], folder: Path | None
) -> None:
    """Write NAME.json, and NAME.md made from it, to ``folder``; nothing if it is None.

    Each file is complete or absent.
    """
    if folder is None:
        return
    from table import full_table  # knows every benchmark's table, and reads what is written here

    result = {
        "benchmark": name,
        "format": FORMAT,
        "recorded": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine(),
        "settings": settings,
        "cells": cells,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, text in (
        (".json", json.dumps(result, indent=1) + "\n"),
        (".md", full_table(result)),
    ):
        path = folder / (name + suffix)
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, memory, versions, the state of the source tree."""
    from genkl_ext import _native

    build = _native.build_info()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "simd": build["simd"],
        "gpus": _gpus(),
        "os": _os(),
        "compiler": build["compiler"],
        "cuda_architectures": build["cuda_architectures"],
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("genkl-ext", "numpy", "torch", "scikit-learn")},
        },
        "commit": _commit(),
        "load_average_before": [round(load, 2) for load in _LOAD_BEFORE],
    }


def _cpu() -> str:
    """ "AMD EPYC (family 25, model 1)": hypervisors often show no more of the name."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    name = facts.get("model name", platform.machine())
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _os() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit, "+changes" if the sources differ from it; None outside a git checkout."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git(
            "status", "--porcelain", "--", "genkl_ext", "csrc", "CMakeLists.txt", "bench/*.py"
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")
