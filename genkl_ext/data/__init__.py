"""A data set as one table, and how its images become batches.

    manifest.py    Manifest: one row per image, with key, path, given label, split
    layouts/       folders as they are published or kept -> Manifest
    folders.py     what is odd in people's folders
    published.py   the side files of the published programs: NC lists, class ratios, weights
    examples.py    miniatures of the data sets, in their layouts
    transforms.py  Transforms: from a picture to the input of a network, said once
    decode.py      from bytes to pixels, with a reason for every picture that has none
    order.py       which images make up which batch of which rank
    loader.py      make_loader: the batches         cpu.py, dali.py   what makes them
    scan.py        every file checked once          ledger.py         what was found broken
    check.py       how one file is checked

Names are resolved when first used: reading a manifest needs pyarrow, and neither torch nor DALI.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import BrokenImage as BrokenImage
    from .decode import Limits as Limits
    from .ledger import Ledger as Ledger
    from .loader import ImageError as ImageError
    from .loader import Loader as Loader
    from .loader import make_loader as make_loader
    from .manifest import Manifest as Manifest
    from .manifest import Problem as Problem
    from .transforms import Transforms as Transforms

_HOME = {
    "BrokenImage": ".decode",
    "ImageError": ".loader",
    "Ledger": ".ledger",
    "Limits": ".decode",
    "Loader": ".loader",
    "Manifest": ".manifest",
    "Problem": ".manifest",
    "Transforms": ".transforms",
    "make_loader": ".loader",
}

__all__ = [
    "BrokenImage",
    "ImageError",
    "Ledger",
    "Limits",
    "Loader",
    "Manifest",
    "Problem",
    "Transforms",
    "make_loader",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
