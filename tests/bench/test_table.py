from pathlib import Path
from typing import Any

import pytest
import table

MACHINE = {
    "cpu": "A CPU",
    "cores": 2,
    "simd": "avx2",
    "memory_gib": 4.0,
    "gpus": [],
    "os": "An OS",
    "versions": {"python": "3.11.7", "numpy": None},
    "commit": "abc",
}


def cell(rule: str, models: int, kind: str, threads: int, share: float) -> dict[str, Any]:
    baselines = {"researcher numpy": 500.0, "chunked numpy": 10.0} if models != 3 else {}
    times = {"rows": 1000, "median_ms": 1.0, "lower_ms": 0.5, "upper_ms": 2.0}
    figures = {
        "gb_s": 12.3456,
        "share_of_read": share,
        "share_of_roofline": share,
        "times_faster": baselines,
    }
    ours = ("genkl_ext numpy", "genkl_ext torch")
    return {
        "rule": rule,
        "classes": 14,
        "models": models,
        "kind": kind,
        "threads": threads,
        "dominant": 2.5,
        "read_gb_s": 20.0,
        "bound": "memory",
        "mrow_s": {**dict.fromkeys(ours, 1.0), **dict.fromkeys(baselines, 0.1)},
        "times": dict.fromkeys(ours, times),
        "ours": dict.fromkeys(ours, figures),
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "benchmark": "scoring",
        "format": 1,
        "recorded": "2026-01-31T12:00Z",
        "machine": MACHINE,
        "settings": {"quick": False, "all_threads": 2},
        "cells": [
            cell("clothing1m", 1, "peaked", 1, 0.2),
            cell("clothing1m", 1, "peaked", 2, 0.7),
            cell("clothing1m", 3, "peaked", 2, 0.6),
            cell("clothing1m", 1, "flat", 2, 0.1),
        ],
    }


def lines_of(text: str, start: str) -> list[list[str]]:
    """The entries of the table rows that begin with ``start``."""
    return [
        [entry.strip() for entry in line.strip("| ").split("|")]
        for line in text.splitlines()
        if line.startswith(f"| {start} ")
    ]


def test_page_has_every_cell_and_says_where_the_goals_are_missed(result: dict[str, Any]) -> None:
    page = table.full_table(result)
    cells, goals = page.split("## Goals")
    assert [line[:4] for line in lines_of(cells, "clothing1m")] == [
        ["clothing1m", "14", "1", "peaked"],
        ["clothing1m", "14", "1", "peaked"],
        ["clothing1m", "14", "3", "peaked"],
        ["clothing1m", "14", "1", "flat"],
    ]
    assert "## one thread" in cells
    assert "## 2 threads" in cells
    assert "0.50 to 2.00" in cells  # quartiles of Mrow/s from those of milliseconds
    assert [line[1:] for line in lines_of(goals, "clothing1m")] == [
        ["1", "peaked", "share of reading", "0.35", "0.70", "above", "2.00"],
        ["3", "peaked", "share of reading", "0.71", "0.60", "below", "0.85"],
        ["1", "flat", "share of reading", "0.27", "0.10", "below", "0.37"],
        ["1", "peaked", "x researcher's NumPy", "404", "500", "above", "1.24"],
        ["1", "peaked", "x chunked NumPy", "51.0", "10.0", "below", "0.20"],
    ]


def test_cuda_page_judges_peaked_rows_by_reading_and_flat_rows_by_the_roofline(
    result: dict[str, Any],
) -> None:
    cells = [
        cell("webvision", 1, kind, 1, share) for kind, share in [("peaked", 0.8), ("flat", 0.9)]
    ]
    for c in cells:
        c["ours"] = {"genkl_ext": c["ours"]["genkl_ext numpy"]}
        c["times"] = {"genkl_ext": c["times"]["genkl_ext numpy"]}
        c["mrow_s"]["genkl_ext"] = c["mrow_s"].pop("genkl_ext numpy")
    page = table.full_table({**result, "benchmark": "scoring_cuda", "cells": cells})
    assert [line[2:] for line in lines_of(page.split("## Goals")[1], "webvision")] == [
        ["peaked", "share of reading", "0.90", "0.80", "below", "0.89"],
        ["flat", "share of roofline", "0.75", "0.90", "above", "1.20"],
    ]


def test_command_page_has_the_goals(result: dict[str, Any]) -> None:
    times = {"median_ms": 250.0, "lower_ms": 240.0, "upper_ms": 260.0}
    cells = [{"command": name, **times} for name in ("import numpy", "genkl --help")]
    page = table.full_table({**result, "benchmark": "score_command", "cells": cells})
    assert lines_of(page, "`import numpy`") == [["`import numpy`", "0.25", "0.24 to 0.26", "-"]]
    assert lines_of(page, "`genkl --help`") == [["`genkl --help`", "0.25", "0.24 to 0.26", "0.30"]]


def test_choosing_page_has_a_table_for_each_data_set(result: dict[str, Any]) -> None:
    def line(data: str, rule: str, betas: list[float]) -> dict[str, Any]:
        figures = ("alpha", "clean", "false_positives", "recall", "precision", "f1", "auroc")
        shares = {key: [0.25, 0.5] for key in figures}
        return {"data": data, "rule": rule, "rows": 1234, "positives": 5, "beta": betas, **shares}

    cells = [line("one", "published", [0.03, 0.03]), line("two", "calibrated", [0.03, 0.05])]
    page = table.full_table({**result, "benchmark": "choosing", "cells": cells})
    share = "37.5 ± 17.7"
    assert lines_of(page, "published") == [["published", "0.03", "0.25 0.5", *[share] * 6]]
    assert lines_of(page, "calibrated")[0][1] == "0.03 0.05"
    assert page.index("## one") < page.index("| published") < page.index("## two")
    assert "1,234 rows judged, 5 of them to be found" in page


def test_scoring_files_page_has_a_table_for_each_part(result: dict[str, Any]) -> None:
    def cell(part: str, candidate: str, **figures: Any) -> dict[str, Any]:
        return {"part": part, "what": "k = 14", "candidate": candidate, **figures}

    kind = {"dtype": "float32", "models": 1}
    rates = {**kind, "mrow_s": 10.0, "gb_s": 0.5, "median_ms": 123.4, "share_of_read": 0.95}
    cells = [
        cell("cache", "to .parquet", **rates),
        cell("cache", "to .npy", **{**rates, "share_of_read": 0.5}),
        cell("disk", "to .parquet", **{**rates, "dtype": "float16"}),
        cell("memory", "to .npy", rows=1000, mib=100.0, mib_more=101.0, growth=1.01),
    ]
    settings = {
        "quick": False,
        "left_out": {"Spark": "no Java"},
        "file_system": "ext4",
        "versions": {"ray": "2.60.0", "pyspark": None},
    }
    files = {**result, "benchmark": "scoring_files", "settings": settings, "cells": cells}
    page = table.full_table(files)
    assert "Files on ext4, ray 2.60.0." in page
    assert "Left out: Spark (no Java)." in page
    passes, peaks = page.split("## Peak memory")
    assert [line[1:6] for line in lines_of(passes, "k = 14")] == [
        ["to .parquet", "10.0", "0.50", "0.95", "123"],
        ["to .npy", "10.0", "0.50", "0.50", "123"],
        ["to .parquet", "10.0", "0.50", "0.95", "123"],
    ]
    assert lines_of(peaks, "k = 14")[0][1:] == ["to .npy", "1,000", "100", "101", "1.01"]
    assert "Large" not in page
    block = table.readme_block([files])
    assert lines_of(block, "page cache") == [["page cache", "k = 14", "10.0", "0.50", "0.95"]]
    assert lines_of(block, "disk") == []


def test_block_has_peaked_rows_with_all_threads(result: dict[str, Any]) -> None:
    block = table.readme_block([result])
    (line,) = lines_of(block, "clothing1m")
    assert line == ["clothing1m", "14", "1", "1.00", "12.3", "0.70", "0.70", "500", "10.0"]
    assert "A CPU, 2 cores, avx2, 4.0 GiB; An OS; python 3.11.7; commit abc; 2026-01-31." in block


def test_nothing_recorded(tmp_path: Path) -> None:
    assert table.load(tmp_path) == []
    assert "genkl bench" in table.readme_block([])


def test_refresh_replaces_what_is_between_the_marks(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        table.refresh(readme, "new\n")
        assert readme.read_text() == "before\n<!-- bench -->\nnew\n<!-- /bench -->\nafter\n"


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        "<!-- bench --> opened only",
        "<!-- /bench --> <!-- bench -->",
        "<!-- bench --> <!-- /bench --> <!-- bench --> <!-- /bench -->",
        "<!-- bench --> <!-- bench --> <!-- /bench -->",
        "<!-- bench --> <!-- /bench --> <!-- /bench -->",
    ],
)
def test_refresh_needs_the_marks_once_each(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each"):
        table.refresh(readme, "new\n")
    assert readme.read_text() == text
