"""Find the images of a web-crawled training set that fit no class, or several, and train with them.

    rule.py        the GenKL rule and its score          reference.py  its definition in NumPy
    ops.py         the torch operators                   relabel.py    targets for the next training
    objective.py   the three-term training objective     scoring/      files in, table out
    data/          manifests, decoding, batches          training/     the loop, by recipes/
    demo/          the whole loop on digits              cli/          the ``genkl`` command
    files.py       complete files or none                journal.py, unfinished.py   work that goes on
    ranks.py       the processes of one job

Importing this package loads neither torch nor DALI: names are resolved when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import objective as objective
    from . import ops as ops
    from . import reference as reference
    from . import relabel as relabel
    from .data import Manifest as Manifest
    from .rule import GenKL as GenKL
    from .rule import Scores as Scores
    from .scoring import BatchScorer as BatchScorer
    from .scoring import score_files as score_files
    from .training.loop import run as run

    __version__: str

_HOME = {
    "BatchScorer": ".scoring",
    "GenKL": ".rule",
    "Manifest": ".data",
    "Scores": ".rule",
    "run": ".training.loop",
    "score_files": ".scoring",
}
_MODULES = ("objective", "ops", "reference", "relabel", "rule", "scoring")

__all__ = [
    "BatchScorer",
    "GenKL",
    "Manifest",
    "Scores",
    "objective",
    "ops",
    "reference",
    "relabel",
    "run",
    "score_files",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name == "__version__":
        from importlib.metadata import version  # slow to import

        return version("genkl-ext")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
