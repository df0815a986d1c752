"""``genkl report``, ``genkl review apply`` and ``genkl plot`` on a run's folder."""

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import genkl_ext as gk
from genkl_ext import review
from genkl_ext.cli.main import main
from genkl_ext.report import build, plots, style

_RUNS = Path(__file__).parents[1] / "report" / "synthetic_run.py"


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; not to be changed."""
    spec = importlib.util.spec_from_file_location("synthetic_run", _RUNS)
    synthetic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(synthetic)
    return synthetic.write(tmp_path_factory.mktemp("synthetic"))


def test_writes_the_page_and_the_list(finished_run: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "genkl_ext.cli.main", "report", finished_run, "-o", "page.html",
            "--csv", "list.csv", "--csv-rows", "4", "--pictures", "2",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    size = (tmp_path / "page.html").stat().st_size
    assert done.stdout == f"page      page.html ({size / 1e6:.1f} MB)\nto review list.csv\n"
    same = build(
        finished_run, tmp_path / "same.html", csv=tmp_path / "same.csv", csv_rows=4, pictures=2
    )
    assert same.read_bytes() == (tmp_path / "page.html").read_bytes()
    assert (tmp_path / "same.csv").read_bytes() == (tmp_path / "list.csv").read_bytes()
    with (tmp_path / "list.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    reasons = [line["reason"] for line in lines]
    assert reasons[:2] == ["nc", "mislabelled"] and 4 <= len(lines) <= 12
    assert max(map(reasons.count, review.REASONS)) <= 4


def test_decisions_go_all_the_way(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, out = tmp_path / "list.csv", tmp_path / "reviewed.parquet"
    page = tmp_path / "page.html"
    words = ["report", str(finished_run), "-o", str(page), "--csv", str(table), "--csv-rows", "2"]
    assert main([*words, "--pictures", "0"]) == 0
    with table.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    answers = dict(zip((line["key"] for line in lines), ("nc", "ok", "dress", ""), strict=False))
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0])
        writer.writeheader()
        writer.writerows({**line, "decision": answers.get(line["key"], "")} for line in lines)
    data = str(finished_run / "manifest.parquet")
    capsys.readouterr()
    assert main(["review", "apply", str(table), "--data", data, "-o", str(out)]) == 0
    said = dict(
        line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if line[0] != " "
    )
    before, after = gk.Manifest.load(data), gk.Manifest.load(out)
    keys = list(answers)
    rows = before.lookup([key.removeprefix("'") for key in keys], split="train")
    assert after.labels[rows[0]] == -1 and after.labels[rows[1]] == before.labels[rows[1]]
    assert after.labels[rows[2]] == 0
    splits = np.array(after.table["split"].to_pylist())[rows[:3]].tolist()
    assert splits == ["train", "clean", "clean"]
    assert after.split_sizes()["clean"] == before.split_sizes()["clean"] + 2
    assert said["fit no class"].strip().startswith("1 images")
    assert said["clean"].strip().startswith(f"{after.split_sizes()['clean']:,} verified images")


def test_says_which_classes_are_not_verified_yet(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = gk.Manifest.load(finished_run / "manifest.parquet").split("train")
    manifest.save(tmp_path / "noisy.parquet")
    key = manifest.keys([10])[0]
    (tmp_path / "a.csv").write_text(f"key,decision\n{key},dress\n")
    words = ["review", "apply", str(tmp_path / "a.csv"), "--data", str(tmp_path / "noisy.parquet")]
    assert main([*words, "-o", str(tmp_path / "out.parquet")]) == 0
    out = capsys.readouterr().out
    assert "3 classes have none yet (=hat, " in out and "relabel.ratio_splits=[train]" in out


def test_a_wrong_decision_is_one_line_and_writes_nothing(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("key,decision\ntrain-9,dres\n")
    out = tmp_path / "out.parquet"
    data = str(finished_run / "manifest.parquet")
    assert main(["review", "apply", str(tmp_path / "a.csv"), "--data", data, "-o", str(out)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"genkl review apply: {tmp_path}") and err.count("\n") == 1
    assert "a.csv: line 2, key 'train-9': decision must be" in err and not out.exists()


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err == f"genkl report: {tmp_path} must be the folder of a run, and has no recipe.yaml\n"
    assert main(["report", str(tmp_path), "--pictures", "-1"]) == 2


@pytest.mark.parametrize("kind", ["alpha", "classes", "flow", "accuracy", "learning"])
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_every_figure_of_a_run(finished_run: Path, tmp_path: Path, kind: str, suffix: str) -> None:
    out = tmp_path / f"a.{suffix}"
    assert main(["plot", kind, str(finished_run), "-o", str(out)]) == 0
    first = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(first)


def test_figures_of_a_table_of_scores(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = {}
    for name in ("critical_alpha", "nc_share", "label_flow"):
        whole = getattr(plots, name)

        def note(*given, name=name, whole=whole, **options):
            drawn[name] = (given, options)
            return whole(*given, **options)

        monkeypatch.setattr(plots, name, note)
    table, data = finished_run / "iteration-0/scores.parquet", finished_run / "manifest.parquet"
    scores = gk.scoring.read_settings(table)
    words = [str(table), "-o", str(tmp_path / "a.svg")]
    assert main(["plot", "alpha", *words]) == 0
    (values, alpha), options = drawn["critical_alpha"]
    assert alpha == scores["rule"]["alpha"] and options["title"] == "scores.parquet"
    assert main(["plot", "classes", *words, "--alpha", "1.1"]) == 0
    (classes, nc, names), options = drawn["nc_share"]
    assert options["by"] == "most probable class" and list(names) == ["0", "1", "2", "3"]
    np.testing.assert_array_equal(nc, values.astype(np.float64) >= 1.1)
    assert main(["plot", "classes", *words, "--data", str(data)]) == 0
    manifest = gk.Manifest.load(data).split("train")
    (classes, _, names), _ = drawn["nc_share"]
    np.testing.assert_array_equal(classes, np.where(np.isnan(values), -1, manifest.labels))
    assert main(["plot", "flow", *words, "--data", str(data)]) == 0
    (flow, _), _ = drawn["label_flow"]
    conforming = (values < np.float32(alpha)) & (manifest.labels >= 0)
    assert flow.sum() == conforming.sum()
    assert main(["plot", "flow", *words, "--data", str(finished_run)]) == 0  # the run's manifest
    np.testing.assert_array_equal(drawn["label_flow"][0][0], flow)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ("alpha RUN -o a.gif", 2, "--out must end in .png, .svg or .pdf, got a.gif"),
        ("alpha RUN -o a.png --data x", 2, "--data goes with a table of scores"),
        ("accuracy TABLE -o a.png", 2, "accuracy needs the folder of a run"),
        ("alpha TABLE -o a.png --iteration 1", 2, "--iteration goes with the folder of a run"),
        ("flow TABLE -o a.png", 2, "flow needs --data"),
        ("alpha RUN -o a.png --iteration 2", 1, "must have scores of iteration 2, it has: 0, 1"),
        ("learning RUN -o a.png --iteration 9", 1, "have trainings of iteration 9, it has: 0, 1"),
        ("learning RUN -o a.png --iteration -1", 1, "have trainings of iteration -1, it has: 0, 1"),
        ("learning RUN -o a.png --alpha 1", 2, "--alpha does not go with learning"),
        ("accuracy RUN -o a.png --alpha 1", 2, "--alpha does not go with accuracy"),
        ("accuracy RUN -o a.png --iteration 0", 2, "--iteration does not go with accuracy"),
        ("alpha RUN -o a.png --alpha -1", 2, "--alpha must not be negative, got -1"),
        ("alpha TABLE -o a.png --data MANIFEST", 2, "--data does not go with alpha"),
        ("alpha nowhere.parquet -o a.png", 1, "nowhere.parquet"),
        ("alpha KEYS -o a.png", 1, "keys.txt is not a Parquet file"),
        ("alpha MANIFEST -o a.png", 1, "is not a table of genkl scores"),
        ("flow TABLE -o a.png --data FEW", 1, "a row for each of 1 noisy images"),
        ("other RUN -o a.png", 2, "invalid choice: 'other'"),
    ],
)
def test_what_cannot_be_drawn_is_said(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    status: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    gk.Manifest.load(finished_run / "manifest.parquet").select([0]).save("few.parquet")
    places = {
        "RUN": finished_run,
        "TABLE": finished_run / "iteration-0/scores.parquet",
        "KEYS": finished_run / "keys.txt",
        "MANIFEST": finished_run / "manifest.parquet",
        "FEW": "few.parquet",
    }
    assert main(["plot", *(str(places.get(word, word)) for word in words.split())]) == status
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not Path("a.png").exists()


def test_an_unfinished_run_has_its_figures(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    shutil.rmtree(run / "iteration-1")
    (run / "summary.json").unlink()
    assert main(["plot", "learning", str(run), "-o", str(tmp_path / "a.svg")]) == 0
    assert main(["plot", "accuracy", str(run), "-o", str(tmp_path / "b.svg")]) == 0


def test_learning_is_of_the_last_iteration_with_a_training(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    records = json.loads((run / "records.json").read_text())
    trials = re.compile("iteration-1/trial-")
    kept = {name: stage for name, stage in records.items() if not trials.match(name)}
    (run / "records.json").write_text(json.dumps(kept))
    titles = []
    monkeypatch.setattr(
        plots, "learning", lambda *_, title, **__: titles.append(title) or style.figure(1, 1)
    )
    words = ["plot", "learning", str(run), "-o", str(tmp_path / "a.svg")]
    assert main(words) == 0 and titles == ["Iteration 0"]
    assert main([*words, "--iteration", "1"]) == 1


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_runs_folder_is_data_and_is_not_written_over(
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    as_folder: bool,
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("manifest.parquet", "recipe.yaml"):
        shutil.copy(finished_run / name, run)
    manifest = run / "manifest.parquet"
    table, out = tmp_path / "a.csv", tmp_path / "out.parquet"
    table.write_text("key,decision\ntrain-9,dress\n")
    data = str(run if as_folder else manifest)
    words = ["review", "apply", str(table), "--data", data, "-o"]
    assert main([*words, str(out)]) == 0
    whole, changed = gk.Manifest.load(manifest), gk.Manifest.load(out)
    row = whole.lookup(["train-9"])
    assert len(changed) == len(whole) and changed.labels[row] == 0
    capsys.readouterr()

    (tmp_path / "link.parquet").symlink_to(manifest)
    before = {path: path.read_bytes() for path in (manifest, table)}
    for output in (manifest, tmp_path / "link.parquet"):
        assert main([*words, str(output)]) == 2
        err = capsys.readouterr().err
        assert "--out must be another file than" in err and err.count("\n") == 1
    for output in (table, tmp_path / "x.csv"):
        assert main([*words, str(output)]) == 2
        assert "--out must end in .parquet, got" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in before}
    assert not (tmp_path / "x.csv").exists()
    assert main(["review", "apply", str(out), "--data", data, "-o", str(out)]) == 2


def test_the_list_is_no_input_and_not_the_page(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    decided = tmp_path / "mine.csv"
    decided.write_text("key,decision\ntrain-9,dress\ntrain-8,nc\ntrain-7,\n")
    metrics = tmp_path / "metrics.csv"
    shutil.copy(finished_run / "baselines/noisy/0/metrics.csv", metrics)
    before = {path: path.read_bytes() for path in (decided, metrics)}
    page = tmp_path / "page.html"
    for out, table, message in (
        (page, decided, "mine.csv: its column decision has 2 that a new list would lose; give"),
        (page, metrics, "metrics.csv: it exists and is no list of images to review; give another"),
        (page, page, "csv must be another file than the page"),
        (tmp_path / "same.x", tmp_path / "same.x", "out must end in .html or .htm, got"),
        (decided, tmp_path / "b.csv", "out must end in .html or .htm, got"),
    ):
        assert main(["report", str(finished_run), "-o", str(out), "--csv", str(table)]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in before}
    assert set(tmp_path.iterdir()) == set(before)


def test_says_that_the_list_has_nonconforming_images_only(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = tmp_path / "run", tmp_path / "list.csv"
    shutil.copytree(finished_run, run)
    (run / "iteration-1/predictions/1.npy").unlink()
    assert main(["report", str(run), "--csv", str(table), "--pictures", "0"]) == 0
    assert capsys.readouterr().err == (
        f"genkl report: warning: {table} has non-conforming images only: "
        "the predictions 1.npy that were scored are not there any more\n"
    )
    with table.open(encoding="utf-8", newline="") as file:
        assert {line["reason"] for line in csv.DictReader(file)} == {"nc"}
