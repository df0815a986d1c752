"""Find the images of a web-crawled training set that fit no class, or several, and train with them.

    rule.py        the GenKL rule and its score          reference.py  its definition in NumPy
    ops.py         the torch operators                   identifiers/  other ways to find them
    sweep.py       many rules in one read                calibration.py  a rule for so many errors
    evaluation.py  how good an identification is         relabel.py    targets for the next training
    objective.py   the three-term training objective     scoring/      files in, table out
    data/          manifests, decoding, batches          training/     the loop, by recipes/
    report/        one HTML page, figures                review.py     images for people to judge
    demo/          the whole loop on digits              cli/          the ``genkl`` command

    files.py, journal.py, unfinished.py   complete files or none, and work that goes on
    ranks.py                              the processes of one job

Importing this package loads neither torch nor DALI: names are resolved when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import calibration as calibration
    from . import evaluation as evaluation
    from . import identifiers as identifiers
    from . import objective as objective
    from . import ops as ops
    from . import reference as reference
    from . import relabel as relabel
    from . import report as report
    from . import review as review
    from . import sweep as sweep
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
_MODULES = (
    "calibration",
    "evaluation",
    "identifiers",
    "objective",
    "ops",
    "reference",
    "relabel",
    "report",
    "review",
    "rule",
    "scoring",
    "sweep",
)

__all__ = [
    "BatchScorer",
    "GenKL",
    "Manifest",
    "Scores",
    "calibration",
    "evaluation",
    "identifiers",
    "objective",
    "ops",
    "reference",
    "relabel",
    "report",
    "review",
    "run",
    "score_files",
    "sweep",
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
