"""What a run found, to look at: one HTML page, and figures.

build(run)     the page of a run                    html.py, templates/
findings.py    what a run's folder holds            pictures.py    thumbnails
plots.py       the figures of a run                 curves.py      of an evaluation
sweeps.py      of a sweep                           style.py       colours, how figures are written
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .html import build as build

__all__ = ["build"]


def __getattr__(name: str) -> Any:
    if name == "build":
        from .html import build  # reads tables and templates; those who only draw need neither

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
