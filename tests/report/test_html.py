"""The page of a run: its numbers are those of the run's files, and it needs nothing but itself."""

import base64
import csv
import html
import io
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic_run as synthetic
from PIL import Image

import genkl_ext as gk
from genkl_ext import review
from genkl_ext.data import Ledger
from genkl_ext.data.decode import Limits
from genkl_ext.data.ledger import SCHEMA
from genkl_ext.report import build, findings, plots, style

VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Elements and text; raises where an end tag is not that of the innermost element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of words: most of the time goes into figures."""
    for name in ("critical_alpha", "nc_share", "label_flow", "accuracy", "learning"):
        monkeypatch.setattr(plots, name, lambda *_, **__: None)
    monkeypatch.setattr(style, "svg", lambda *_: "<svg></svg>")


@pytest.fixture(scope="module")
def page(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(finished_run, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture(scope="module")
def parsed(page: Path) -> Page:
    return Page(page.read_text(encoding="utf-8"))


def cells(text: str) -> Iterator[list[str]]:
    """The rows of all tables, as text."""
    for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL):
        parts = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        yield [html.unescape(part).strip() for part in parts]


def columns(run: Path, t: int) -> dict[str, np.ndarray]:
    table = pq.read_table(run / f"iteration-{t}/scores.parquet")
    return {name: np.asarray(table[name]) for name in table.column_names}


def test_the_answer_is_that_of_the_tables(finished_run: Path, parsed: Page) -> None:
    scores = columns(finished_run, synthetic.LAST)
    labels = gk.Manifest.load(finished_run / "manifest.parquet").split("train").labels
    there = ~np.isnan(scores["critical_alpha"])
    nc = scores["critical_alpha"] >= np.float32(synthetic.RULE.alpha)
    others = there & ~nc & (labels >= 0)
    moved = int((others & (scores["top_class"] != labels)).sum())
    assert 0 < nc.sum() < there.sum() and 0 < moved < others.sum()
    assert there.sum() == 59 and others.sum() + nc.sum() in (58, 59)
    assert (
        f"Of {there.sum()} noisy images, {nc.sum()} ({100 * nc.sum() / there.sum():.1f} %) are "
        "found to fit no class, or several: their critical alpha is at least 0.9. "
        f"Of the {others.sum()} others that have a label, {moved} "
        f"({100 * moved / others.sum():.1f} %) have a most probable class that is not the given"
    ) in parsed.text
    assert "Noisy images without a prediction: 1." in parsed.text


def test_accuracies_are_those_of_the_predictions(finished_run: Path, page: Path) -> None:
    labels = gk.Manifest.load(finished_run / "manifest.parquet").split("test").labels

    def accuracy(names: list[str]) -> str:
        hits = [np.load(finished_run / n / "test.npy").argmax(1) == labels for n in names]
        percent = 100 * np.mean(hits, axis=1)
        return f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f}"

    rows = {row[0]: row for row in cells(page.read_text(encoding="utf-8")) if len(row) == 4}
    plain = accuracy([f"baselines/noisy/{seed}" for seed in synthetic.SEEDS])
    assert rows["plain training, noisy labels"][2:] == [plain, "2"]
    members = accuracy([f"iteration-0/members/{seed}" for seed in synthetic.SEEDS])
    assert rows["members: clean labels only"][2:] == [members, "2"]
    # Seed 1's fine-tuning was no better than its training, which counts.
    tuned = accuracy(["iteration-1/trial-0/finetune", "iteration-1/trial-1/train"])
    assert rows["GenKL, iteration 1, fine-tuned"][2:] == [tuned, "2"]
    assert len(rows) == 8
    text = Page(page.read_text(encoding="utf-8")).text
    assert f"Plain training, noisy labels: {plain} % test accuracy." in text

    def best(ours: bool) -> list[str]:
        """Validation, test of the row that is best on the validation images."""
        chosen = [row for row in rows.values() if row[0].startswith("GenKL") == ours]
        return max(reversed(chosen[not ours :]), key=lambda row: float(row[1].split()[0]))

    without, with_ours = best(False), best(True)
    assert f"The best training without GenKL ({without[0]}): {without[2]} %." in text
    assert f"{with_ours[0]}: {with_ours[2]} %," in text
    gain = float(with_ours[2].split()[0]) - float(without[2].split()[0])
    assert f"{abs(gain):.1f} points {'more' if gain >= 0 else 'less'} than that" in text
    assert "mean ± standard deviation of 2 seeds; 20 test images" in text


def test_iterations_are_compared(finished_run: Path, parsed: Page) -> None:
    before, now = (columns(finished_run, t)["nc"] for t in (0, 1))
    both, either = int((before & now).sum()), int((before | now).sum())
    assert (
        f"Jaccard index with the last non-conforming set: {both / either:.3f} ({both} in both, "
        f"{now.sum() - both} new, {before.sum() - both} gone)"
    ) in parsed.text


def test_the_galleries_show_the_worst(finished_run: Path, page: Path) -> None:
    scores = columns(finished_run, synthetic.LAST)
    manifest = gk.Manifest.load(finished_run / "manifest.parquet").split("train")
    q = sum(
        np.load(finished_run / f"iteration-1/predictions/{seed}.npy") for seed in synthetic.SEEDS
    ) / np.float32(2)
    labels = manifest.labels
    order = np.sort(q, axis=1)
    conforming = ~np.isnan(scores["critical_alpha"]) & ~scores["nc"]
    given = np.where(labels >= 0, q[np.arange(len(q)), labels], np.nan)
    moved = conforming & (labels >= 0) & (scores["top_class"] != labels)

    def worst(which: np.ndarray, score: np.ndarray) -> list[str]:
        rows = np.flatnonzero(which)
        keys = manifest.keys(rows[np.argsort(-score[rows], kind="stable")])
        return [" ".join(key.split()) for key in keys[:24]]

    text = page.read_text(encoding="utf-8")
    shown = [
        [html.unescape(key) for key in re.findall(r'<div class="key">(.*?)</div>', part)]
        for part in text.split("<h3>")[1:4]
    ]
    assert shown[0] == worst(scores["nc"], scores["critical_alpha"])
    assert shown[1] == worst(moved, order[:, -1] - given)
    assert shown[2] == worst(conforming, order[:, -2] - order[:, -1])
    assert all(shown)
    assert f"train-{synthetic.WITHOUT_PREDICTION}" not in {key for keys in shown for key in keys}
    # The first card in full: probabilities, label, score.
    row = manifest.keys().index(shown[1][0])
    card = re.sub(r"<[^>]*>", " ", text.split("<h3>")[2].split("<li>")[1])
    words = html.unescape(" ".join(card.split()))
    top = q[row].max()
    assert f"{top - given[row]:.3g} label: {manifest.class_names[labels[row]]}" in words
    assert f"{manifest.class_names[q[row].argmax()]} {100 * top:.1f} %" in words


def test_pictures_are_upright_and_a_missing_one_says_so(finished_run: Path, page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    shown = re.findall(r"<li>(.*?)</li>", text, re.DOTALL)
    cards = {html.unescape(re.search(r'class="key">(.*?)</div>', c)[1]): c for c in shown}
    sizes = {}
    for key, card in cards.items():
        found = re.search(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", card)
        if key == f"train-{synthetic.WITHOUT_FILE}":
            assert not found and "missing: there is no such file" in card
        elif key.startswith("train-"):
            sizes[int(key[6:]) % 2] = Image.open(io.BytesIO(base64.b64decode(found[1]))).size
    assert sizes == {0: (36, 24), 1: (24, 36)}  # (width, height): odd ones are turned by EXIF
    assert f"train-{synthetic.WITHOUT_FILE}" in cards


def test_needs_nothing_but_itself(page: Path, parsed: Page) -> None:
    for tag, attributes in parsed.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name == "src":
                assert value.startswith("data:image/jpeg;base64,")
            if name in ("href", "xlink:href"):
                assert value.startswith("#")
            if value and "url(" in value:
                assert re.fullmatch(r"url\(#[\w-]+\)", re.search(r"url\([^)]*\)", value)[0])
    text = page.read_text(encoding="utf-8")
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert len(re.findall("<style", text)) == 1 and "url(" not in styles and "@import" not in styles
    assert page.stat().st_size < 2e6


def test_ids_are_unique_and_references_lead_to_one(parsed: Page) -> None:
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for _, a in parsed.elements if "href" in a}
    for _, attributes in parsed.elements:
        for value in attributes.values():
            wanted.update(re.findall(r"url\(#([\w-]+)\)", value or ""))
    assert wanted and wanted <= set(ids)


def test_hostile_names_are_text(page: Path, parsed: Page) -> None:
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<img src=x" not in text
    assert synthetic.HOSTILE in parsed.text
    assert "<img src=x onerror=alert(1)>" in parsed.text


@pytest.mark.usefixtures("without_figures")
def test_control_characters_do_not_come_through(run: Path) -> None:
    path = run / "manifest.parquet"
    manifest = gk.Manifest.load(path)
    keys = [f"{key}\x00\x1b" for key in manifest.keys()]  # noqa: SIM118 (a method, not a dict)
    place = manifest.table.schema.get_field_index("key")
    table = manifest.table.set_column(place, manifest.table.schema.field("key"), [keys])
    names = ("a\x07\nb", *manifest.class_names[1:])
    gk.Manifest(table, names, "table\x01", manifest.root).save(path)
    text = build(run).read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text)
    assert "\N{REPLACEMENT CHARACTER}" in text


def test_the_same_run_gives_the_same_bytes(finished_run: Path, page: Path, tmp_path: Path) -> None:
    again = build(str(finished_run), str(tmp_path / "again.html"))
    assert again.read_bytes() == page.read_bytes()
    assert not list(finished_run.glob("*.html"))


@pytest.mark.usefixtures("without_figures")
def test_by_default_it_lies_in_the_runs_folder(run: Path) -> None:
    assert build(run, pictures=0) == run / "report.html"
    assert "<img" not in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    ("at", "rows", "said"),
    [
        ("baselines/noisy/0", 1, "The run has no scores yet."),
        ("iteration-0/members/1", 3, "The run has no scores yet."),
        ("iteration-0/trial-0/train", 4, "(Iteration 0"),
        ("iteration-1/predictions/0", 5, "This is iteration 0, the last one that has scores."),
        ("iteration-1/trial-1/finetune", 7, "This is iteration 1, the last one that has scores."),
    ],
)
def test_an_unfinished_run_gets_what_is_there(run: Path, at: str, rows: int, said: str) -> None:
    synthetic.stop(run, at)
    text = build(run).read_text(encoding="utf-8")
    words = Page(text).text
    assert "This run is not finished." in words
    assert f"Begun and not ended: {at}." in words
    assert said in words or said == "(Iteration 0"
    table = [row for row in cells(text) if len(row) == 4 and row[0] != "training"]
    assert len(table) == rows
    assert "The run ended" not in words
    if at == "iteration-1/trial-1/finetune":
        # Not yet in a summary: counted from the predictions of the test images.
        labels = gk.Manifest.load(run / "manifest.parquet").split("test").labels
        hits = [
            np.load(run / f"iteration-1/trial-{seed}/train/test.npy").argmax(1) == labels
            for seed in synthetic.SEEDS
        ]
        percent = 100 * np.mean(hits, axis=1)
        expected = f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f}"
        assert table[5][2] == expected
        assert table[6][3] == "1 of 2"


@pytest.mark.usefixtures("without_figures")
def test_predictions_that_are_gone_are_missed(run: Path) -> None:
    (run / "iteration-1/predictions/1.npy").unlink()
    words = Page(build(run).read_text(encoding="utf-8")).text
    assert "The predictions 1.npy that were scored are not there any more" in words
    assert "The most non-conforming" in words and "The most ambiguous" not in words


@pytest.mark.usefixtures("without_figures")
def test_predictions_of_another_model_are_not_shown(run: Path) -> None:
    path = run / "iteration-1/predictions/1.npy"
    np.save(path, np.load(path)[:, ::-1])
    words = Page(build(run).read_text(encoding="utf-8")).text
    assert "The predictions 1.npy that were scored are not there any more" in words


@pytest.mark.usefixtures("without_figures")
def test_images_that_have_moved_are_found_with_root(run: Path) -> None:
    data = run.parent / "data"
    data.rename(run.parent / "elsewhere")
    page = build(run)
    assert "are not where the manifest says" in Page(page.read_text(encoding="utf-8")).text
    assert "<img" not in page.read_text(encoding="utf-8")
    page = build(run, root=run.parent / "elsewhere")
    assert "are not where the manifest says" not in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("without_figures")
def test_broken_files_are_listed(run: Path) -> None:
    manifest = gk.Manifest.load(run / "manifest.parquet")
    reasons = ["truncated"] * 25 + ["missing"]
    rows = [
        {"row": i, "key": f"k{i}", "path": f"{i}<b>.jpg", "reason": reason, "detail": f"why {i}"}
        for i, reason in enumerate(reasons)
    ]
    table = pa.Table.from_pylist(rows, SCHEMA)
    Ledger(table, manifest.fingerprint, manifest.root, Limits(), 98, 12345).save(
        run / "ledger.parquet"
    )
    text = build(run).read_text(encoding="utf-8")
    assert "26 (26.5 %) of 98 files cannot be used" in Page(text).text
    table = list(cells(text))
    assert table.index(["truncated", "25"]) < table.index(["missing", "1"])
    assert ["0<b>.jpg", "truncated: why 0"] in table
    assert ["19<b>.jpg", "truncated: why 19"] in table and "why 20" not in text


@pytest.mark.usefixtures("without_figures")
def test_trials_of_their_own_are_told_apart(run: Path) -> None:
    scores = run / "iteration-1/scores.parquet"
    for seed in synthetic.SEEDS:
        shutil.copy(scores, run / f"iteration-1/trial-{seed}")
    scores.unlink()
    words = Page(build(run).read_text(encoding="utf-8")).text
    table = pq.read_table(run / "iteration-1/trial-0/scores.parquet")
    nc = int(np.asarray(table["nc"]).sum())
    assert f"trial-0 {nc} (alpha 0.9), trial-1 {nc} (alpha 0.9)." in words
    assert "the last one that has scores (trial-0)." in words


@pytest.mark.usefixtures("without_figures")
def test_an_iteration_that_was_removed_is_not_missed(run: Path) -> None:
    shutil.rmtree(run / "iteration-0")
    words = Page(build(run).read_text(encoding="utf-8")).text
    assert "This is iteration 1, the last one that has scores." in words
    assert "Iteration 0" not in words and "Jaccard" not in words


@pytest.mark.usefixtures("without_figures")
def test_many_classes_are_a_table_of_flows(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(40))
    synthetic_names, rule = synthetic.NAMES, synthetic.RULE
    try:
        synthetic.NAMES = names
        synthetic.RULE = gk.GenKL(num_classes=40, alpha=0.9, beta=0.01, sigma=0.01)
        run = synthetic.write(tmp_path, names=names, pictures=False)
    finally:
        synthetic.NAMES, synthetic.RULE = synthetic_names, rule
    text = build(run, pictures=2).read_text(encoding="utf-8")
    scores = columns(run, 1)
    labels = gk.Manifest.load(run / "manifest.parquet").split("train").labels
    rows = ~np.isnan(scores["critical_alpha"]) & ~scores["nc"] & (labels >= 0)
    flow = np.zeros((40, 40), int)
    np.add.at(flow, (labels[rows], scores["top_class"][rows]), 1)
    listed = [
        (int(row[0][6:]), int(row[1][6:]), int(row[2]))
        for row in cells(text.split("Iteration 1</h2>")[1])
        if len(row) == 4 and row[0].startswith("class ")
    ]
    assert len(listed) == min(30, (flow - np.diag(np.diag(flow)) > 0).sum())
    assert all(flow[given, top] == count and given != top for given, top, count in listed)


def test_what_is_no_run_is_refused(tmp_path: Path, finished_run: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        build(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must be the folder of a run, and has no recipe.yaml$"):
        build(tmp_path)
    with pytest.raises(ValueError, match=r"has no recipe.yaml; .*run is one$"):
        build(finished_run.parent)


@pytest.mark.usefixtures("without_figures")
def test_files_that_do_not_fit_are_refused(run: Path) -> None:
    shutil.copy(run / "manifest.parquet", run / "whole.parquet")
    manifest = gk.Manifest.load(run / "manifest.parquet")
    manifest.select(np.arange(1, len(manifest))).save(run / "manifest.parquet")
    with pytest.raises(ValueError, match=r"scores.parquet must have a row for each of 59 noisy"):
        build(run)
    (run / "records.json").write_text("[]")
    with pytest.raises(ValueError, match="records.json must hold an object, got list"):
        build(run)
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="recipe.yaml is no YAML"):
        build(run)
    (run / "recipe.yaml").write_text("a: 1")
    with pytest.raises(ValueError, match="must be that of a run"):
        build(run)
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("without_figures")
def test_an_output_that_cannot_be_written_is_known_at_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review, "find", lambda *_: pytest.fail("scores have been read"))
    with pytest.raises(FileNotFoundError, match="no/page.html"):
        build(run, tmp_path / "no" / "page.html")
    with pytest.raises(FileNotFoundError, match="no/list.csv"):
        build(run, csv=tmp_path / "no" / "list.csv")
    (tmp_path / "list.csv").write_text("key,decision\ntrain-9,nc\n")
    with pytest.raises(FileExistsError, match="list.csv: its column decision has 1 that"):
        build(run, csv=tmp_path / "list.csv")
    assert not (run / "report.html").exists()


@pytest.mark.usefixtures("without_figures")
def test_images_that_people_settled_are_not_shown_again(run: Path, tmp_path: Path) -> None:
    def shown() -> list[str]:
        text = build(run, pictures=60, csv=tmp_path / "list.csv").read_text(encoding="utf-8")
        return [html.unescape(k) for k in re.findall(r'<div class="key">(.*?)</div>', text)]

    before = shown()
    settled = [key for key in dict.fromkeys(before) if key.startswith("train-")][:3]
    table = tmp_path / "decided.csv"
    table.write_text("key,decision\n" + "".join(f"{key},nc\n" for key in settled))
    manifest = gk.Manifest.load(run / "manifest.parquet")
    review.apply(manifest, table).manifest.save(run / "manifest.parquet")
    after = shown()
    assert set(settled) <= set(before) and not set(settled) & set(after)
    assert f"train-{synthetic.WITHOUT_LABEL}" in after  # without a label, and nobody looked
    with (tmp_path / "list.csv").open(encoding="utf-8", newline="") as file:
        assert not set(settled) & {line["key"] for line in csv.DictReader(file)}
    words = Page((run / "report.html").read_text(encoding="utf-8")).text
    assert "3 noisy images that people decided to fit no class are left out here." in words


def test_another_alpha_is_not_rounded() -> None:
    alpha = 0.9  # float32 has 0.899999976 for it
    critical = np.float32([0.9, np.nextafter(np.float32(0.9), np.float32(1)), np.nan])
    nothing = np.zeros(3, np.int32)
    scores = findings.Scored(0.5, 4, [], critical, nothing > 0, nothing, critical)
    assert scores.at(alpha).nc.tolist() == [float(value) >= alpha for value in critical]
    assert scores.at(alpha).nc.tolist() == [False, True, False]


@pytest.mark.usefixtures("without_figures")
def test_a_word_in_the_metrics_is_named(run: Path) -> None:
    path = run / "iteration-1/trial-0/train/metrics.csv"
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace(",0.1,", ",abc,")
    path.write_text("\n".join(lines))
    opened = findings.open_run(run)
    training = next(t for g in opened.groups for t in g.trainings if t.metrics == path)
    with pytest.raises(ValueError, match=r"train/metrics.csv, line 3: lr must be a .* got 'abc'$"):
        opened.metrics(training)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(page: Path, tmp_path: Path, width: int) -> None:
    text = page.read_text(encoding="utf-8")
    # The policy of the page lets no script run, the one that measures neither.
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    # A frame has the width asked for, which the window of a browser may not.
    inner = tmp_path / "inner.html"
    inner.write_text(
        text.replace(
            "</body>",
            "<script>parent.postMessage([innerWidth, document.documentElement.scrollWidth,"
            " Math.max(...[...document.querySelectorAll('body *')].map("
            "e => Math.ceil(e.getBoundingClientRect().right)))], '*')</script></body>",
        ),
        encoding="utf-8",
    )
    outer = tmp_path / "outer.html"
    outer.write_text(
        "<!DOCTYPE html><body><p id=found></p><script>onmessage = e => {"
        "document.getElementById('found').textContent = e.data.join(' ')}</script>"
        f'<iframe src="inner.html" width="{width}" height="900" style="border:0"></iframe>'
    )
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000",
            "--dump-dom", outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )  # fmt: skip
    found = re.search(r'<p id="found">(\d+) (\d+) (\d+)</p>', done.stdout)
    assert found, done.stdout[-2000:]
    inner_width, scroll_width, furthest = map(int, found.groups())
    assert inner_width == width
    assert scroll_width <= width
    assert furthest <= width
