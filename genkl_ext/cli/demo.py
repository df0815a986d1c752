"""``genkl demo``: the whole loop on bundled images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from . import UsageError

_MOST_SEEDS = 64  # members that one score can average


def demo(
    *,
    out: Path = Path("runs/demo"),
    seeds: int = 3,
    seed: int = 0,
    flips: Literal["lookalike", "random"] = "lookalike",
    quick: bool = False,
) -> None:
    """Run the whole GenKL loop on 1,797 scanned digits, on the CPU.

    Digits 0 to 7 are the classes; 8s and 9s are crawled images that fit none. Clean-subset models
    are trained, their predictions scored, the images relabelled, new networks trained with the
    objective of GenKL and fine-tuned, and all of it once more, beside plain training. Ends with
    a table of accuracies and of how well the images that fit no class were found, and two
    pictures. Started again with the same folder, it goes on where it was stopped.

    Args:
        out: folder for everything the run makes
        seeds: networks of each kind to train and to average
        seed: the first seed, of the data too
        flips: wrong labels are of the class that looks most alike, or of any other class, which
            harms plain training less
        quick: a few steps each, to see that everything works; the numbers mean nothing

    Example:
        genkl demo
        genkl demo --out runs/random --flips random --seeds 5
    """
    if not 1 <= seeds <= _MOST_SEEDS:
        raise UsageError(f"--seeds must be from 1 to {_MOST_SEEDS}, got {seeds}")
    if seed < 0:
        raise UsageError(f"--seed must not be negative, got {seed}")

    import time

    from rich.console import Console

    from ..demo import figures, results, run
    from ..report import build
    from .run import Bars

    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {line}", flush=True)

    bars = Bars()
    summary = run.run(out, list(range(seed, seed + seeds)), flips, quick, say, bars.begin)
    bars.close()
    judged = results.judge(out, summary)
    pages = [*figures.draw(out, judged), build(out / "run", out / "report.html")]
    seconds = time.perf_counter() - start
    results.save(out, judged, seconds)

    console = Console()
    for table in results.tables(judged):
        console.print()
        console.print(table)
    for note in judged.notes:
        console.print(f"[dim]- {note}[/dim]", highlight=False)
    console.print(f"\n{seconds:.0f} s. In {out}: results.md, results.json", highlight=False)
    for page in pages:
        console.print(f"  {page}", highlight=False)
