"""``genkl run``: the whole framework by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import UsageError
from .progress import Progress


def run(
    recipe: list[str] = [],  # noqa: B006 (never changed)
    *,
    out: Path = Path("runs/run"),
    data_root: str | None = None,
    dry_run: bool = False,
    list_recipes: bool = False,
) -> int:
    """Run the iterative framework: members, predictions, NC set, relabelling, training, again.

    A recipe says everything; --list-recipes names those that come with the package, and a file of
    your own can extend one of them. Started again, the command goes on where it was stopped, and
    runs again what depends on settings that have changed. Under torchrun or SLURM it uses all
    processes.

    Args:
        recipe: name of a recipe or a YAML file, then settings to replace, as training.epochs=5;
            before the options
        out: folder of the run
        data_root: the data set: a folder, table or manifest; the recipe's data.root
        dry_run: print what would be done, and an estimate of time and disk; write nothing
        list_recipes: print the recipes that come with the package

    Example:
        genkl run clothing1m --data-root /data/clothing1m --out runs/clothing1m
        genkl run folder training.epochs=10 network.name=resnet18 --data-root photos/ -o runs/photos
        torchrun --nproc-per-node 8 -m genkl_ext.cli.main run clothing1m --data-root /data/c1m
    """
    from ..training import recipe as recipes

    if list_recipes:
        for known, line in recipes.names().items():
            print(f"{known:24}{line}")
        return 0
    if not recipe or "=" in recipe[0]:
        got = f", got {recipe[0]}" if recipe else ""
        raise UsageError(f"a recipe must come first{got}; --list-recipes names those there are")
    name, *overrides = recipe

    from ..training import loop

    bar = Bars()
    summary = loop.run(
        name,
        out=out,
        data_root=data_root,
        overrides=overrides,
        say=say,
        progress=bar.begin,
        dry_run=dry_run,
    )
    bar.close()
    if dry_run:
        from ..ranks import join
        from ..training import plan

        ranks = join()
        if ranks.first:
            cost = plan.measure(summary.recipe, summary.classes, ranks)
            print("\n".join(plan.describe(summary, cost, ranks)))
        return 0
    show(summary)
    return 0


def say(line: str) -> None:
    """A line of the log."""
    print(line, flush=True)


class Bars:
    """One progress bar after another."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def begin(self, what: str) -> Any:
        """What is called with (done, all); the bar goes when all is done."""
        self.close()
        bar = self._bar = Progress(what, "images").__enter__()

        def show(done: int, all_: int) -> None:
            bar(done, all_)
            if done >= all_:
                self.close()

        return show

    def close(self) -> None:
        """End the bar that is shown, if there is one."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


def show(summary: Any) -> None:
    """The table of accuracies and NC counts."""
    from rich.console import Console
    from rich.table import Table

    from ..ranks import join

    if not join().first:
        return
    console = Console()
    console.print()
    for table in tables(summary, Table):
        console.print(table)
        console.print()
    console.print(f"{summary.stopped}. In {summary.out}: summary.json", highlight=False)


def tables(summary: Any, table: Any) -> list[Any]:
    """Accuracies by training, and NC images by iteration."""
    from ..training.loop import Spread, chosen

    accuracy = table(title="Accuracy in %, mean and standard deviation over seeds",
                     title_justify="left", title_style="bold")  # fmt: skip
    for name in ("training", "validation", "test", "seeds"):
        accuracy.add_column(name, justify="left" if name == "training" else "right")

    def row(name: str, fitted: list[Any], tested: list[Any]) -> None:
        validation = Spread.of([facts.get("best_accuracy") for facts in fitted])
        test = Spread.of([facts and facts["top1"] for facts in tested])
        accuracy.add_row(name, str(validation or "-"), str(test or "-"), str(len(fitted)))

    names = {"members": "members", "noisy": "plain, noisy labels", "both": "plain, all labels"}
    for name, facts in summary.baselines.items():
        row(names[name], facts, [f["test"] for f in facts])
    found = table(title="Images that fit no class, or several", title_justify="left",
                  title_style="bold")  # fmt: skip
    for name in ("iteration", "NC", "of", "alpha", "Jaccard with last"):
        found.add_column(name, justify="right")
    for facts in summary.iterations:
        t, trials = facts["iteration"], facts["trials"]
        trained = [trial["train"] for trial in trials]
        row(f"GenKL iteration {t}", trained, [f["test"] for f in trained])
        if any(trial["finetune"] for trial in trials):
            tuned = [chosen(trial) for trial in trials]
            row(f"GenKL iteration {t}, fine-tuned", tuned, [f["test"] for f in tuned])
        for scored in facts["nonconforming"]:
            similar = facts["jaccard"]
            found.add_row(
                str(t),
                f"{scored['nc']:,}",
                f"{scored['rows']:,}",
                f"{scored['alpha']:.4g}",
                "" if similar is None else f"{similar:.3f}",
            )
            if all(other == scored for other in facts["nonconforming"]):
                break
    return [accuracy, found]
