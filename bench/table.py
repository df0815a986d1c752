"""Show the recorded results as Markdown; with --readme, refresh the block in a README.

The block lies between the lines <!-- bench --> and <!-- /bench -->.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import record

from genkl_ext.files import atomic_write

OPENING, CLOSING = "<!-- bench -->", "<!-- /bench -->"

Result = dict[str, Any]

# What scoring on the CPU sets out to reach with all threads: what a first study of such kernels
# reached with two threads on a Zen 5 with AVX-512 (its baselines were its own). Shares are of the
# measured rate of reading. Flat rows: 12 and 9 GB/s where reading reached 44.6.
_SHARES = {
    ("clothing1m", 1, "peaked"): 0.35,
    ("webvision", 1, "peaked"): 0.37,
    ("food101n-spread", 1, "peaked"): 0.42,
    ("thousand", 1, "peaked"): 0.66,
    ("food101n", 1, "peaked"): 0.91,
    ("clothing1m", 3, "peaked"): 0.71,
    ("webvision", 3, "peaked"): 0.72,
    ("food101n-spread", 3, "peaked"): 0.54,
    ("thousand", 3, "peaked"): 0.88,
    ("webvision", 1, "confident"): 0.44,
    ("food101n-spread", 1, "confident"): 0.55,
    ("thousand", 1, "confident"): 0.72,
    ("clothing1m", 1, "flat"): 0.27,
    ("webvision", 1, "flat"): 0.27,
    ("food101n-spread", 1, "flat"): 0.27,
    ("thousand", 1, "flat"): 0.20,
}
_MULTIPLES: dict[str, dict[str, float]] = {  # M = 1, peaked
    "clothing1m": {"researcher numpy": 404, "chunked numpy": 51, "torch.compile": 21},
    "webvision": {"researcher numpy": 271, "chunked numpy": 25, "torch.compile": 10.5},
    "food101n-spread": {"researcher numpy": 387, "chunked numpy": 23, "torch.compile": 11.4},
    "thousand": {"researcher numpy": 648, "chunked numpy": 23, "torch.compile": 16.5},
}

_CUDA_SHARES = {  # kind of rows -> figure, its name, goal
    "peaked": ("share_of_read", "share of reading", 0.90),
    "flat": ("share_of_roofline", "share of roofline", 0.75),
}
_COMMAND_SECONDS = {
    "genkl --help": 0.3,
    "genkl score, to .npy": 0.5,
    "genkl score, to .csv": 0.5,
    "genkl score, to .parquet": 0.5,
}

_BASELINES = {  # candidate -> column
    "researcher numpy": "x researcher's NumPy",
    "chunked numpy": "x chunked NumPy",
    "chunked float32 numpy": "x float32 NumPy",
    "torch eager": "x torch",
    "torch.compile": "x torch.compile",
}


def full_table(result: Result) -> str:
    """Everything a benchmark recorded, as a Markdown page."""
    body = _PAGES[result["benchmark"]](result)
    quick = "\nQuick run: the sizes are tiny, the figures say nothing.\n" if _quick(result) else ""
    return f"# {result['benchmark']}\n\n{_machine(result)}\n{quick}\n{body}"


def readme_block(results: Iterable[Result]) -> str:
    """The figures for a README: what most readers want to know, from all recorded results."""
    blocks = [_BLOCKS[r["benchmark"]](r) for r in results if r["benchmark"] in _BLOCKS]
    return "\n".join(blocks) or "No results recorded yet: run `genkl bench`.\n"


def load(folder: Path) -> list[Result]:
    """The recorded results, in the order of their names."""
    results = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    ]
    return [r for r in results if r.get("benchmark") in _PAGES and r["format"] == record.FORMAT]


def refresh(readme: Path, block: str) -> None:
    """Put ``block`` between the two marks in ``readme``.

    Raises:
        ValueError: the marks are not there, once each and in order.
    """
    text = readme.read_text(encoding="utf-8")
    head, opening, rest = text.partition(OPENING)
    _, closing, tail = rest.partition(CLOSING)
    if not (opening and closing) or OPENING in rest or CLOSING in tail:
        raise ValueError(f"table: {readme} must have {OPENING} and then {CLOSING} once each")
    with atomic_write(readme) as temporary:
        temporary.write_text(f"{head}{OPENING}\n{block}{CLOSING}{tail}", encoding="utf-8")


# ---- pages ---------------------------------------------------------------------------------------


def _scoring_page(result: Result) -> str:
    cells = result["cells"]
    parts = []
    for threads in sorted({c["threads"] for c in cells}):
        some = [c for c in cells if c["threads"] == threads]
        parts += [f"## {_threads(threads)}\n", _cells(some, "genkl_ext numpy")]
    parts += ["## Goals\n", _goals(result)]
    return "\n".join(parts)


def _scoring_cuda_page(result: Result) -> str:
    lines: list[list[Any]] = []
    for c in result["cells"]:
        if c["kind"] in _CUDA_SHARES:
            key, what, goal = _CUDA_SHARES[c["kind"]]
            here = c["ours"]["genkl_ext"][key]
            lines.append([c["rule"], c["models"], c["kind"], what, goal, here])
    return f"{_cells(result['cells'], 'genkl_ext')}\n## Goals\n\n{_goal_table(lines)}"


def _cells(cells: list[dict[str, Any]], ours: str) -> str:
    """One line for each cell; the figures of ``ours``, the rate of its other entry beside it."""
    others = [name for name in cells[0]["ours"] if name != ours]
    baselines = [b for b in _BASELINES if any(b in c["mrow_s"] for c in cells)]
    header = ["rule", "k", "M", "rows", "dominant", "read GB/s", "Mrow/s", "quartiles", "GB/s"]
    header += ["of reading", "of roofline", "bound", *(f"{name}, Mrow/s" for name in others)]
    lines = []
    for c in cells:
        figures, t = c["ours"][ours], c["times"][ours]
        quartiles = (t["rows"] / t[edge] / 1e3 for edge in ("upper_ms", "lower_ms"))
        lines.append(
            [
                c["rule"], c["classes"], c["models"], c["kind"], _n(c["dominant"]),
                _n(c["read_gb_s"]), _n(c["mrow_s"][ours]), " to ".join(map(_n, quartiles)),
                _n(figures["gb_s"]), _n(figures["share_of_read"]), _n(figures["share_of_roofline"]),
                c["bound"], *(_n(c["mrow_s"][name]) for name in others),
                *(_n(figures["times_faster"].get(b)) for b in baselines),
            ]
        )  # fmt: skip
    return _table([*header, *(_BASELINES[b] for b in baselines)], lines)


def _goals(result: Result) -> str:
    every = result["settings"]["all_threads"]
    cells: dict[tuple[str, int, str], Any] = {
        (c["rule"], c["models"], c["kind"]): c["ours"]["genkl_ext numpy"]
        for c in result["cells"]
        if c["threads"] == every
    }
    lines: list[list[Any]] = []
    for key, goal in _SHARES.items():
        if key in cells:
            lines.append([*key, "share of reading", goal, cells[key]["share_of_read"]])
    for rule, goals in _MULTIPLES.items():
        for baseline, goal in goals.items():
            cell = cells.get((rule, 1, "peaked"))
            if cell and baseline in cell["times_faster"]:
                here = cell["times_faster"][baseline]
                lines.append([rule, 1, "peaked", _BASELINES[baseline], goal, here])
    note = (
        "What a first study of such kernels reached with two threads on a Zen 5 with AVX-512, "
        f"against what was reached here with {_threads(every)}.\n\n"
    )
    return note + _goal_table(lines)


def _goal_table(lines: list[list[Any]]) -> str:
    """Lines of rule, M, rows, what, the goal and what was reached."""
    judged = [
        [*cell, _n(goal), _n(here), "above" if here >= goal else "below", _n(here / goal)]
        for *cell, goal, here in lines
    ]
    return _table(["rule", "M", "rows", "what", "goal", "here", "", "here / goal"], judged)


def _ceilings_page(result: Result) -> str:
    header = ["candidate", "threads", "rate", "quartiles, ms"]
    return _table(
        header,
        [
            [
                c["candidate"],
                c["threads"],
                f"{_n(c['rate'])} {c['unit']}",
                f"{_n(c['lower_ms'])} to {_n(c['upper_ms'])}",
            ]
            for c in result["cells"]
        ],
    )


def _command_page(result: Result) -> str:
    header = ["command", "seconds", "quartiles", "goal: under"]
    lines = [
        [
            f"`{c['command']}`",
            _n(c["median_ms"] / 1e3),
            f"{_n(c['lower_ms'] / 1e3)} to {_n(c['upper_ms'] / 1e3)}",
            _n(_COMMAND_SECONDS.get(c["command"])),
        ]
        for c in result["cells"]
    ]
    return _table(header, lines)


def _loading_page(result: Result) -> str:
    workers = sorted({c["workers"] for c in result["cells"]})
    note = (
        "Error: mean and largest distance from torchvision's pixels, in grey levels (0 to 255), of "
        "the first batch. DALI's centre window may lie one pixel beside torchvision's.\n"
    )
    parts = [f"## {n} processor{'s' if n > 1 else ''}\n\n{_loading(result, n)}" for n in workers]
    return note + "\n" + "\n".join(parts)


def _loading(result: Result, workers: int) -> str:
    cells = [c for c in result["cells"] if c["workers"] == workers]
    ours = next(c["images_per_second"] for c in cells if c["candidate"] == "genkl_ext")
    header = ["candidate", "img/s", "per core", "ours / it", "mean error", "largest error"]
    lines = [
        [
            c["candidate"],
            f"{c['images_per_second']:,.0f}",
            f"{c['images_per_second'] / workers:,.0f}",
            _n(ours / c["images_per_second"]),
            c.get("mean_levels", "-"),
            c.get("max_levels", "-"),
        ]
        for c in cells
    ]
    return _table(header, lines)


def _training_page(result: Result) -> str:
    parts = [
        _training_part(result, section, title, columns)
        for section, (title, columns) in _TRAINING.items()
        if any(c["section"] == section for c in result["cells"])
    ]
    return "\n".join(parts)


_TRAINING: dict[str, tuple[str, dict[str, str]]] = {  # section -> title, cell -> column
    "step": ("One step", {"median_ms": "ms", "ratio": "x cross-entropy"}),
    "parts": ("Parts of a step", {"median_ms": "ms", "share": "of a plain step"}),
    "files": (
        "JPEG files to steps",
        {"images_per_second": "img/s", "wait": "share of the time waited"},
    ),
    "memory": ("Memory", {"mib": "MiB"}),
    "engine": (
        "engine.fit against a bare loop",
        {"step_ms": "ms a step", "once_ms": "ms once", "images_per_second": "img/s"},
    ),
}


def _training_part(result: Result, section: str, title: str, columns: dict[str, str]) -> str:
    lines = [
        [
            c["network"].rpartition(":")[2] + (", compiled" if c["compile"] else ""),
            c["size"],
            c["batch"],
            c["candidate"],
            *(_n(c[name]) for name in columns),
        ]
        for c in result["cells"]
        if c["section"] == section
    ]
    header = ["network", "pixels", "images", "candidate", *columns.values()]
    return f"## {title}\n\n{_table(header, lines)}"


def _clothing_page(result: Result) -> str:
    """Accuracies by training, and how well each iteration finds the pictures of no class."""
    images = ", ".join(f"{count:,} {what}" for what, count in result["settings"]["images"].items())
    header = ["training", "validation %", "test %", "seeds"]
    lines = [
        [c["training"], _percent(c["validation"]), _percent(c["test"]), len(c["test"])]
        for c in result["cells"]
    ]
    found = [c for c in result["cells"] if "auroc" in c]
    names = ["flagged", "recall", "precision", "auroc"]
    shares = [[c["training"], *(f"{100 * c[name]:.1f}" for name in names)] for c in found]
    return (
        f"Images: {images}.\n\n{_table(header, lines)}\n"
        "Pictures that fit no class, in %; AUROC of critical alpha:\n\n"
        f"{_table(['scores', 'flagged', 'recall', 'precision', 'AUROC'], shares)}"
    )


def _beyond_page(result: Result) -> str:
    """Identifiers of NC images and their combinations, by data and view."""
    cells = result["cells"]
    parts = []
    for data, view in dict.fromkeys((c["data"], c["view"]) for c in cells):
        some = [c for c in cells if (c["data"], c["view"]) == (data, view)]
        parts.append(f"## {data}: {view}\n\n{_beyond_part(some)}")
    images = ", ".join(f"{count:,} {kind}" for kind, count in result["settings"]["images"].items())
    note = (
        f"In %; mean ± standard deviation of {len(result['settings']['seeds'])} seeds. Gain: AUROC "
        "less that of entropy, with a 95 % interval from a bootstrap over senders. Recall at 5 % "
        "false positives. Unseen: AUROC among senders whose images had no say in the choice of the "
        "parts. Within: AUROC over pairs of one sender. NC / right, NC / wrong, wrong / right: "
        "AUROC of the former against the latter.\n"
    )
    return note + (f"\nCrawled photographs: {images}.\n\n" if images else "\n") + "\n".join(parts)


def _beyond_part(cells: list[dict[str, Any]]) -> str:
    if "flagged" in cells[0]:
        names = ["flagged", "false_positives", "recall_flagged", "precision_flagged"]
        header = ["identifier", "flagged", "false positives", "recall", "precision"]
        grouped: dict[str, list[dict[str, Any]]] = {}
        for c in cells:
            grouped.setdefault(c["identifier"], []).append(c)
        return _table(
            header,
            [
                [name, *(_percent([c[key] for c in some]) for key in names)]
                for name, some in grouped.items()
            ],
        )
    if "least_nc_share" in cells[0]:
        return _table(
            ["verified images", "least NC share", "true NC share"],
            [
                [c["identifier"], _percent(c["least_nc_share"]), _percent(c["nc_share"])]
                for c in cells
            ],
        )
    columns = {"auroc": "AUROC"}
    if "gain" in cells[0]:
        columns |= {"average_precision": "AP", "recall": "recall"}
    kinds = {key: key.removeprefix("kind ") for key in cells[0] if key.startswith("kind ")}
    more = {
        "unseen": "unseen", "within": "within", "right": "NC / right", "wrong": "NC / wrong",
        "wrong_right": "wrong / right",
    }  # fmt: skip
    header = ["identifier", *columns.values()]
    lines = [[c["identifier"], *(_percent(c[key]) for key in columns)] for c in cells]
    if "gain" not in cells[0]:
        return _table(header, lines)
    for line, c in zip(lines, cells, strict=True):
        value, low, high = (100 * figure for figure in c["gain"])
        line.insert(2, f"{value:+.1f} ({low:+.1f} to {high:+.1f})")
    header.insert(2, "gain")
    shown = {
        key: name
        for key, name in (kinds | more).items()
        if not any(math.isnan(figure) for figure in cells[0][key])
    }
    parted = [[c["identifier"], *(_percent(c[key]) for key in shown)] for c in cells]
    return f"{_table(header, lines)}\nAUROC by part:\n\n" + _table(
        ["identifier", *shown.values()], parted
    )


def _identifiers_page(result: Result) -> str:
    """Every identifier by what it costs, for each number of classes."""
    parts = []
    for k in sorted({c["classes"] for c in result["cells"]}):
        some = [c for c in result["cells"] if c["classes"] == k]
        lines = [
            [c["identifier"], _n(c["median_ms"]), _n(c["mrow_s"]), _n(c["ratio"])]
            for c in sorted(some, key=lambda c: c["ratio"])
        ]
        header = ["identifier", "ms", "Mrow/s", "x the time of genkl"]
        parts.append(f"## {k} classes, {some[0]['rows']:,} rows\n\n{_table(header, lines)}")
    members, threads = result["settings"]["members"], _threads(result["settings"]["threads"])
    note = (
        f"NumPy arrays, {threads}; mutual information and vote entropy read {members} members.\n\n"
    )
    return note + "\n".join(parts)


def _scoring_files_page(result: Result) -> str:
    """A table for each part that ran, and what could not be run."""
    settings = result["settings"]
    with_them = "".join(f", {name} {v}" for name, v in settings["versions"].items() if v)
    about = f"Files on {settings['file_system']}{with_them}.\n\n"
    for what, reason in settings["left_out"].items():
        about += f"Left out: {what} ({reason}).\n\n"
    parts = []
    for part, (title, note, columns) in _SCORING_FILES.items():
        cells = [c for c in result["cells"] if c["part"] == part]
        if cells:
            lines = [
                [c["what"], c["candidate"], *(_n(c.get(name)) for name in columns)] for c in cells
            ]
            table = _table(["what", "candidate", *columns.values()], lines)
            parts.append(f"## {title}\n\n{note}\n\n{table}")
    return about + "\n".join(parts)


_PASS = {
    "mrow_s": "Mrow/s", "gb_s": "GB/s", "share_of_read": "of reading", "median_ms": "ms",
    "lower_ms": "lower quartile", "upper_ms": "upper quartile",
}  # fmt: skip
_SCORING_FILES: dict[str, tuple[str, str, dict[str, str]]] = {  # part -> title, note, columns
    "cache": (
        "From the page cache",
        "Reading: into one buffer for each thread, over and over; the faster of the two is what "
        "scoring is held against. The goal is 0.90 of it. A table is on disk when its time ends.",
        _PASS,
    ),
    "disk": (
        "From disk",
        "The same, after the page cache was told to forget the inputs; a host below a virtual "
        "machine may still have them in memory. The goal is 0.90 of reading.",
        _PASS,
    ),
    "parquet": (
        "From Parquet files",
        "As pyarrow writes them by default, in the page cache. Reading: pyarrow reads the same "
        "columns, and nothing is done with them; GB/s are of float32 numbers.",
        _PASS,
    ),
    "memory": (
        "Peak memory of a process",
        "All of it, interpreter and libraries included. Scores that go nowhere but to memory are "
        "21 bytes a row.",
        {"rows": "rows", "mib": "MiB", "mib_more": "MiB, 4 x the rows", "growth": "x"},
    ),
    "scaling": (
        "The command on two processors",
        "Whole commands, from start to end; work: the pass over the rows and the end of the table, "
        "as the command says. Processes of one job are started as torchrun does, and load torch to "
        "meet; the first of them writes the table when all rows are scored.",
        {"median_ms": "ms", "speedup": "x", "work_s": "work, s", "work_speedup": "x, work"},
    ),
    "engines": (
        "Ray Data and Spark",
        "From Parquet shards to Parquet. BatchScorer writes the key and six columns; the "
        "researcher's NumPy the key and votes; key alone is what the engine takes for itself. "
        "score_files has its table on disk when its time ends, which engines do not wait for.",
        {
            "mrow_s": "Mrow/s",
            "of_direct": "of score_files",
            "x_numpy": "x researcher's NumPy",
            "median_ms": "ms",
            "start_s": "start-up, s",
        },
    ),
    "cleanlab": (
        "Beside cleanlab",
        "`find_label_issues_batched` on the same files, with labels. It answers another question "
        "(which labels are wrong): a measure of what is run on such files today.",
        {"mrow_s": "Mrow/s", "ours_over_it": "score_files, x rows/s", "median_ms": "ms"},
    ),
    "workers": (
        "A worker from start to end",
        "What is imported, and a batch of 1,000 rows.",
        {"median_ms": "ms", "mib": "MiB, peak"},
    ),
    "where": (
        "Where the processors' time goes",
        "Of all threads, from the page cache, one of them scoring. The rest: what a job takes "
        "beyond reading and scoring.",
        {"cpu_ns_row": "ns a row"},
    ),
    "large": (
        "Large jobs, from disk",
        "The whole command, start-up included; its peak memory.",
        {**_PASS, "mib": "MiB, peak"},
    ),
    "gpu": (
        "On a GPU",
        "Scored on the GPU unless it says otherwise. Copying: as many bytes of pinned memory, a "
        "chunk at a time, which is what PCIe allows.",
        {**_PASS, "share_of_copy": "of copying"},
    ),
}


def _choosing_page(result: Result) -> str:
    """What each rule finds, and at which price, by data set."""
    header = ["rule", "beta", "alpha", "clean flagged %", "false positives %", "recall %"]
    header += ["precision %", "F1 %", "AUROC %"]
    shares = ("clean", "false_positives", "recall", "precision", "f1", "auroc")
    parts = []
    for data in dict.fromkeys(c["data"] for c in result["cells"]):
        cells = [c for c in result["cells"] if c["data"] == data]
        lines = [
            [
                c["rule"],
                *(" ".join(dict.fromkeys(f"{v:.3g}" for v in c[n])) for n in ("beta", "alpha")),
                *(_percent(c[name]) for name in shares),
            ]
            for c in cells
        ]
        found = f"{cells[0]['rows']:,} rows judged, {cells[0]['positives']:,} of them to be found"
        parts.append(f"## {data}\n\n{found} (in the first split).\n\n{_table(header, lines)}")
    note = (
        "Clean flagged: of the rows that alpha was chosen on. All else is of the rows judged. Mean "
        "and standard deviation over the splits; beta and alpha of each split where they differ.\n"
    )
    return note + "\n" + "\n".join(parts)


def _percent(shares: Sequence[float]) -> str:
    """Mean and standard deviation of several seeds."""
    mean = f"{100 * statistics.mean(shares):.1f}"
    return f"{mean} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else mean


# ---- blocks of the README ------------------------------------------------------------------------


def _loading_block(result: Result) -> str:
    """With all processors, without what stops at the pixels."""
    every = max(c["workers"] for c in result["cells"])
    made = [c for c in result["cells"] if not c["candidate"].startswith("decode only")]
    title = (
        f"JPEG files to normalised 224 x 224 tensors, {every} processors, "
        f"{result['settings']['count']:,} files. {_machine(result)}\n\n"
    )
    return title + _loading({**result, "cells": made}, every)


def _training_block(result: Result) -> str:
    """What the objective costs in a step, by network."""
    steps = [c for c in result["cells"] if c["section"] == "step" and c["candidate"] == "GenKL"]
    some = {**result, "cells": steps}
    title = f"One step of the objective, against plain cross-entropy. {_machine(result)}\n\n"
    return title + _training_part(some, "step", "", _TRAINING["step"][1]).partition("\n\n")[2]


def _scoring_block(result: Result) -> str:
    every = result["settings"]["all_threads"]
    cells = [
        c
        for c in result["cells"]
        if c["threads"] == every and c["kind"] == "peaked" and c["models"] != 3
    ]
    title = f"Scoring NumPy arrays, {_threads(every)}, peaked rows. {_machine(result)}\n\n"
    return title + _summary(cells, "genkl_ext numpy")


def _scoring_cuda_block(result: Result) -> str:
    cells = [c for c in result["cells"] if c["kind"] == "peaked" and c["models"] != 3]
    title = f"Scoring CUDA tensors, peaked rows. {_machine(result)}\n\n"
    return title + _summary(cells, "genkl_ext")


def _scoring_files_block(result: Result) -> str:
    """Float32 files of one model to Parquet tables."""
    title = f"Scoring files to Parquet tables. {_machine(result)}\n\n"
    names = {"cache": "page cache", "disk": "disk", "large": "disk, large jobs"}
    lines = [
        [names[c["part"]], c["what"], _n(c["mrow_s"]), _n(c["gb_s"]), _n(c["share_of_read"])]
        for c in result["cells"]
        if c["part"] in names
        and c["candidate"].endswith("to .parquet")
        and (c["dtype"], c["models"]) == ("float32", 1)
    ]
    return title + _table(["from", "what", "Mrow/s", "GB/s", "of reading"], lines)


def _summary(cells: list[dict[str, Any]], ours: str) -> str:
    baselines = [b for b in _BASELINES if any(b in c["mrow_s"] for c in cells)]
    header = ["rule", "classes", "models", "Mrow/s", "GB/s", "of reading", "of roofline"]
    lines = []
    for c in cells:
        figures = c["ours"][ours]
        lines.append(
            [
                c["rule"], c["classes"], c["models"], _n(c["mrow_s"][ours]), _n(figures["gb_s"]),
                _n(figures["share_of_read"]), _n(figures["share_of_roofline"]),
                *(_n(figures["times_faster"].get(b)) for b in baselines),
            ]
        )  # fmt: skip
    return _table([*header, *(_BASELINES[b] for b in baselines)], lines)


def _command_block(result: Result) -> str:
    times = {c["command"]: c["median_ms"] / 1e3 for c in result["cells"]}
    return (
        f"Whole process: `genkl --help` {_n(times['genkl --help'])} s, `genkl score` of "
        f"{result['settings']['rows']:,} rows {_n(times['genkl score, to .npy'])} s to `.npy`, "
        f"{_n(times['genkl score, to .parquet'])} s to `.parquet`.\n"
    )


_PAGES = {
    "beyond": _beyond_page,
    "ceilings": _ceilings_page,
    "choosing": _choosing_page,
    "clothing": _clothing_page,
    "identifiers": _identifiers_page,
    "loading": _loading_page,
    "score_command": _command_page,
    "scoring": _scoring_page,
    "scoring_cuda": _scoring_cuda_page,
    "scoring_files": _scoring_files_page,
    "training": _training_page,
}
_BLOCKS = {
    "loading": _loading_block,
    "scoring": _scoring_block,
    "scoring_cuda": _scoring_cuda_block,
    "scoring_files": _scoring_files_block,
    "score_command": _command_block,
    "training": _training_block,
}


# ---- parts ---------------------------------------------------------------------------------------


def _machine(result: Result) -> str:
    m = result["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in m["versions"].items() if v)
    gpus = "".join(f", {name}" for name in m["gpus"])
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['simd']}, {m['memory_gib']} GiB{gpus}; {m['os']}; "
        f"{versions}; commit {m['commit']}; {result['recorded'][:10]}."
    )


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _quick(result: Result) -> bool:
    return bool(result["settings"].get("quick"))


def _n(value: float | None) -> str:
    """Three significant digits, no exponent; a dash for what was not measured."""
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return (
        f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2f}"
        if abs(value) >= 0.1
        else f"{value:.3f}"
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; columns are aligned to the right where all entries are figures."""
    rows = [[str(entry) for entry in line] for line in lines]
    figures = [
        all(row[i][:1].isdigit() or row[i] == "-" for row in rows) for i in range(len(header))
    ]
    rule = ["---:" if right else "---" for right in figures]
    return "".join("| " + " | ".join(row) + " |\n" for row in [list(header), rule, *rows])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="file to refresh")
    options = parser.parse_args(arguments)
    block = readme_block(load(options.results))
    if options.readme:
        refresh(options.readme, block)
        print(f"refreshed {options.readme}")
    else:
        print(block, end="")


if __name__ == "__main__":
    main()
