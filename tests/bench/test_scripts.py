"""The benchmarks run, on sizes too small to tell anything, and what they write is well-formed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record
import scoring_files
import table

from genkl_ext.cli.bench import FOLDER, find_scripts

BENCH = Path(record.__file__).parent


def run_script(name: str, *options: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *options],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def result_of(name: str, folder: Path) -> dict[str, Any]:
    """What a script wrote, once it is known to be whole and to have all that a reader needs."""
    assert sorted(p.name for p in folder.iterdir()) == [f"{name}.json", f"{name}.md"]
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["benchmark"] == name
    assert result["format"] == record.FORMAT
    assert result["settings"]["quick"] is True
    assert result["cells"]
    machine = result["machine"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0
    assert machine["simd"] in ("avx512", "avx2", "portable")
    assert {"python", "numpy", "torch", "genkl-ext"} <= machine["versions"].keys()
    text = (folder / f"{name}.md").read_text()
    assert text == table.full_table(result)
    assert "Quick run" in text
    assert text.count("\n| ") >= len(result["cells"]) + 2
    return result


def assert_times(times: dict[str, float]) -> None:
    assert 0 < times["best_ms"] <= times["lower_ms"] <= times["median_ms"] <= times["upper_ms"]
    assert times["samples"] >= 2


def assert_scored(cell: dict[str, Any], ours: set[str], baselines: set[str]) -> None:
    assert cell["ours"].keys() == ours
    assert cell["mrow_s"].keys() == cell["times"].keys() == ours | baselines
    assert cell["agreement"].keys() == baselines
    assert cell["bound"] in ("memory", "arithmetic")
    for figures in cell["ours"].values():
        assert min(figures["gb_s"], figures["share_of_read"]) > 0
        assert figures["share_of_roofline"] >= figures["share_of_read"]
        assert figures["times_faster"].keys() == baselines
    for times in cell["times"].values():
        assert_times(times)
    for agreement in cell["agreement"].values():
        assert 0 <= agreement["differ"] <= agreement["rows"]


def test_scoring(tmp_path: Path) -> None:
    choice = ["--rule", "clothing1m", "--models", "1", "3", "--threads", "1"]
    run_script("scoring", "--quick", *choice, "--out", str(tmp_path))
    result = result_of("scoring", tmp_path)
    one, three = result["cells"]
    assert [(c["models"], c["kind"], c["threads"]) for c in (one, three)] == [
        (1, "peaked", 1),
        (3, "peaked", 1),
    ]
    ours = {"genkl_ext numpy", "genkl_ext torch"}
    numpy = {"researcher numpy", "chunked numpy", "chunked float32 numpy"}
    assert_scored(one, ours, numpy | {"torch eager", "torch.compile"})
    assert_scored(three, ours, set())
    assert three["bytes"] == 3 * 4 * 14 * three["rows"]
    assert result["settings"]["rules"]["clothing1m"]["alpha"] == 1.05


def test_scoring_cuda(device: str, tmp_path: Path) -> None:
    size = "--quick" if device == "cuda" else "--rehearse"
    choice = ["--rule", "food101n", "--models", "2"]
    run_script("scoring_cuda", size, *choice, "--out", str(tmp_path))
    result = result_of("scoring_cuda", tmp_path)
    assert result["settings"]["device"] == device
    (cell,) = result["cells"]
    assert_scored(cell, {"genkl_ext"}, {"torch eager", "torch.compile"})
    assert cell["read_gb_s"] == max(cell["readers_gb_s"].values())


def test_scoring_cuda_without_a_gpu(tmp_path: Path) -> None:
    said = run_script("scoring_cuda", "--out", str(tmp_path), CUDA_VISIBLE_DEVICES="")
    assert said == "no GPU here: nothing is timed, nothing is written\n"
    assert list(tmp_path.iterdir()) == []


def test_score_command(tmp_path: Path) -> None:
    run_script("score_command", "--quick", "--out", str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    result = result_of("score_command", tmp_path)
    assert {c["command"] for c in result["cells"]} >= {"genkl --help", "genkl score, to .parquet"}
    for cell in result["cells"]:
        assert_times(cell)


def test_ceilings(tmp_path: Path) -> None:
    run_script("ceilings", "--quick", "--out", str(tmp_path))
    result = result_of("ceilings", tmp_path)
    for cell in result["cells"]:
        assert_times(cell)
        assert cell["rate"] > 0
        assert cell["unit"] == ("Gfma/s" if cell["candidate"] == "multiply-add" else "GB/s")


def test_loading(tmp_path: Path) -> None:
    choice = ["--threads", "2", "--only", "genkl_ext", "DALI", "torchvision, uint8", "decode only"]
    run_script("loading", "--quick", *choice, "--out", str(tmp_path))
    result = result_of("loading", tmp_path)
    cells = {cell["candidate"]: cell for cell in result["cells"]}
    assert {"genkl_ext", "DALI pipeline", "decode only, simplejpeg"} <= cells.keys()
    for cell in cells.values():
        assert_times(cell)
        assert cell["images_per_second"] > 0
    assert cells["genkl_ext"]["max_levels"] == cells["genkl_ext, uint8"]["max_levels"] == 0
    assert cells["genkl_ext, fast"]["mean_levels"] < 3
    assert 0 < cells["DALI pipeline"]["mean_levels"] < 3


def test_identifiers(tmp_path: Path) -> None:
    run_script("identifiers", "--quick", "--out", str(tmp_path))
    result = result_of("identifiers", tmp_path)
    names = {c["identifier"] for c in result["cells"]}
    assert {"genkl", "entropy", "dsos", "energy", "mutual_information"} <= names
    assert len(result["cells"]) == len(names) * len({c["classes"] for c in result["cells"]})
    for cell in result["cells"]:
        assert_times(cell)
        assert cell["mrow_s"] > 0
        assert cell["ratio"] == 1 if cell["identifier"] == "genkl" else cell["ratio"] > 0


def test_scoring_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts = [
        "cache",
        "disk",
        "parquet",
        "memory",
        "scaling",
        "cleanlab",
        "workers",
        "where",
        "large",
    ]
    where = ["--folder", str(tmp_path), "--out", str(out)]
    said = run_script("scoring_files", "--quick", "--only", *parts, *where)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    result = result_of("scoring_files", out)
    left_out = result["settings"]["left_out"]
    assert {c["part"] for c in result["cells"]} == set(parts) - left_out.keys()
    assert all(f"{what} left out: {why}" in said for what, why in left_out.items())
    for cell in result["cells"]:
        if cell["part"] not in ("memory", "where"):
            assert_times(cell)
        if cell["part"] in ("cache", "disk", "parquet", "large"):
            assert min(cell["mrow_s"], cell["gb_s"], cell["share_of_read"]) > 0
    kinds = {
        (c["classes"], c["dtype"], c["models"]) for c in result["cells"] if c["part"] == "cache"
    }
    floats = {(k, "float32", 1) for k in (14, 101, 1000)}
    assert kinds == floats | {(14, "float16", 1), (101, "float32", 3)}
    for part in ("cache", "parquet"):
        cells = [c for c in result["cells"] if c["part"] == part]
        for what in {c["what"] for c in cells}:
            shares = {c["candidate"]: c["share_of_read"] for c in cells if c["what"] == what}
            assert max(shares[name] for name in shares if not name.startswith("to ")) == 1
            assert {"to memory", "to .npy", "to .parquet"} < shares.keys()
    for cell in result["cells"]:
        if cell["part"] == "memory":
            assert 10 < cell["mib"] < 1000
    light, heavy = (
        next(c for c in result["cells"] if c["candidate"] == f"{name}, genkl_ext: scores a batch")
        for name in ("numpy", "torch")
    )
    assert light["mib"] < heavy["mib"] / 2
    assert "| disk |" in table.readme_block([result])


def test_scoring_files_inside_engines(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="needs ray[data]")
    pytest.importorskip("pyspark", reason="needs pyspark, and a Java runtime")
    run_script("scoring_files", "--quick", "--only", "engines", "--out", str(tmp_path))
    result = result_of("scoring_files", tmp_path)
    assert result["settings"]["left_out"] == {}
    cells = {(c["what"], c["candidate"]): c for c in result["cells"]}
    for engine, batches in (("Ray Data", "pyarrow"), ("Spark", "Arrow")):
        assert cells[engine, "score_files, no engine"]["of_direct"] == 1
        assert cells[engine, "start-up, in no other time"]["start_s"] > 0
        ours = cells[f"{engine}, {batches} batches", "BatchScorer"]
        assert_times(ours)
        assert ours["x_numpy"] > 0


def test_scoring_files_says_which_engines_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ray", "ray.data", "ray.cloudpickle", "pyspark", "pyspark.cloudpickle"):
        monkeypatch.setitem(sys.modules, name, None)
    scoring_files.main(["--quick", "--only", "engines", "--out", str(tmp_path)])
    said = capsys.readouterr().out
    page = (tmp_path / "scoring_files.md").read_text()
    for engine in ("Ray Data", "Spark"):
        assert f"{engine} left out: " in said
        assert f"Left out: {engine} (" in page


def test_scoring_files_writes_what_it_has_and_fails_if_a_part_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: scoring_files.Bench) -> None:
        (bench.folder / "left").mkdir()
        raise RuntimeError("this one\nis broken")

    monkeypatch.setitem(scoring_files.PARTS, "engines", broken)
    out = tmp_path / "out"
    where = ["--folder", str(tmp_path), "--out", str(out)]
    with pytest.raises(SystemExit, match="^failed: engines$"):
        scoring_files.main(["--quick", "--only", "engines", "where", *where])
    assert list(tmp_path.iterdir()) == [out]
    result = json.loads((out / "scoring_files.json").read_text())
    assert result["settings"]["left_out"] == {"engines": "failed: this one"}
    assert {c["part"] for c in result["cells"]} == {"where"}


def test_scoring_files_finds_scores_that_are_not_those_of_the_rule() -> None:
    bench = scoring_files.Bench(Path(), quick=True)
    predictions = scoring_files.Predictions(bench, 14)
    rows = 2 * len(predictions.blocks[0]) + 5
    numbers = np.arange(rows)
    columns = {
        name: np.resize(getattr(predictions.scores, name), rows)
        for name in ("votes", "critical_alpha")
    }
    predictions.check(rows, [(numbers, columns)])
    with pytest.raises(RuntimeError, match=f"{rows} rows must be scored, got {rows - 1}"):
        predictions.check(rows, [(numbers[1:], {n: c[1:] for n, c in columns.items()})])
    columns["votes"][rows - 2] += 1
    with pytest.raises(RuntimeError, match=f"votes must equal .* at row {rows - 2}"):
        predictions.check(rows, [(numbers, columns)])


def test_training(tmp_path: Path) -> None:
    run_script("training", "--quick", "--out", str(tmp_path))
    result = result_of("training", tmp_path)
    cells = {(cell["section"], cell["candidate"]): cell for cell in result["cells"]}
    for section in ("step", "parts", "files"):
        for (part, _), cell in cells.items():
            if part == section:
                assert_times(cell)
    assert cells["step", "cross-entropy"]["ratio"] == 1
    assert cells["step", "GenKL"]["ratio"] > 0
    assert {name for part, name in cells if part == "parts"} == {
        "cross-entropy",
        "objective",
        "targets and mixup",
        "images mixed",
    }
    for name in ("DataLoader, cross-entropy", "genkl_ext, cross-entropy", "genkl_ext, GenKL"):
        assert cells["files", name]["images_per_second"] > 0
        assert 0 <= cells["files", name]["wait"] <= 1
    for name in ("DataLoader, cross-entropy", "genkl_ext, GenKL"):
        assert 50 < cells["memory", name]["mib"] < 10_000
    assert {name for part, name in cells if part == "engine"} == {
        "bare loop",
        "fit, cross-entropy",
        "fit, GenKL",
    }
    block = table.readme_block([result])
    assert "One step of the objective" in block
    assert "| small | 16 | 8 | GenKL |" in block


def test_beyond(tmp_path: Path) -> None:
    said = run_script("beyond", "--quick", "--out", str(tmp_path))
    assert "without --data only the digits" in said
    result = result_of("beyond", tmp_path)
    cells = {(c["view"], c["identifier"]): c for c in result["cells"]}
    entropy, combined = (cells["sampled", name] for name in ("entropy", "combined"))
    value, low, high = combined["gain"]
    assert value == pytest.approx(combined["auroc"][0] - entropy["auroc"][0])
    assert low < value < high
    assert entropy["gain"] == [0, 0, 0]
    for cell in (entropy, combined):
        for key in ("auroc", "average_precision", "recall", "right", "wrong", "wrong_right"):
            assert 0 < cell[key][0] < 1
    checked = cells["check", "sampled"]
    assert 0 < checked["least_nc_share"][0] < checked["nc_share"][0]


def test_a_quick_run_leaves_the_recorded_results_alone() -> None:
    before = {p: p.stat().st_mtime_ns for p in record.RESULTS.glob("*")}
    said = run_script("ceilings", "--quick")
    assert "wrote" not in said
    assert before == {p: p.stat().st_mtime_ns for p in record.RESULTS.glob("*")}


def test_genkl_bench_finds_the_scripts() -> None:
    if FOLDER != BENCH:
        pytest.skip("genkl_ext is installed from a wheel, which has no benchmarks")
    assert find_scripts(FOLDER).keys() == {
        "beyond",
        "ceilings",
        "choosing",
        "clothing",
        "identifiers",
        "loading",
        "score_command",
        "scoring",
        "scoring_cuda",
        "scoring_files",
        "table",
        "training",
    }
