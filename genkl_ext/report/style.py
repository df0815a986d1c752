"""How every figure of the package looks, and how it is written.

The colours are those of Okabe and Ito, told apart with any kind of colour vision; ``ALL`` gives
them in the order in which lines of a plot take them. In a page (:func:`svg`) each of them is a CSS
variable, so that the page can have others on a dark ground.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00",
)  # fmt: skip
INK, GREY = "#333333", "#8c8c8c"
ALL = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, GREY)
FORMATS = (".png", ".svg", ".pdf")

# What a page calls them. Black is what matplotlib draws axes in.
_VARIABLES = {
    BLUE: "var(--blue)",
    ORANGE: "var(--orange)",
    GREEN: "var(--green)",
    PURPLE: "var(--purple)",
    SKY: "var(--sky)",
    RED: "var(--red)",
    GREY: "var(--muted)",
    INK: "currentColor",
    "#000000": "currentColor",
}
_SALT: dict[Any, Any] = {"svg.hashsalt": "genkl", "svg.fonttype": "none"}


def figure(width: float = 6.4, height: float = 3.6) -> Figure:
    """An empty figure of so many inches, independent of pyplot and of its global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Title at the left, names of the axes with their units, no frame above and at the right."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)


def named_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of rows at the left axis, as they are (no mathematics in them), the first on top.

    The title moves above the names, which may be long.
    """
    axes.set_yticks(range(len(names)), list(names), parse_math=False, fontsize=9)
    axes.set_ylim(len(names) - 0.4, -0.6)
    title = axes.get_title(loc="left")
    axes.set_title("", loc="left")
    axes.figure.suptitle(
        title, x=0.01, horizontalalignment="left", fontweight="bold", fontsize="large"
    )


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG, SVG or PDF, by the suffix of its path; the same bytes every time.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ValueError(f"{path}: a figure must end in {', '.join(FORMATS)}, got {suffix!r}")
    # Without the date that these formats write by default.
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    import matplotlib

    with matplotlib.rc_context(_SALT), atomic_write(path) as temporary:
        figure.savefig(
            temporary, format=suffix[1:], dpi=150, facecolor="white", metadata=metadata.get(suffix)
        )
    return path


def svg(figure: Figure, name: str) -> str:
    """A figure as an ``<svg>`` element to put into a page; the same text every time.

    It has no size of its own, no ground, no font and no link; its colours are variables of the
    page (``--blue`` ... ``--red``, ``--muted``) and the colour of the text around it.

    Args:
        name: goes before the ids in it, which are unique in a page only so.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(_SALT), warnings.catch_warnings():
        # The browser draws the text, and has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    body = text[text.index("</metadata>") + len("</metadata>") :]
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)  # it is for the whole page
    body = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", body.replace("xlink:href", "href"))
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, variable)
    assert box is not None  # matplotlib always writes it
    return f'<svg role="img" {box[0]}>{body}'
