"""``Ledger``: the images of a manifest that cannot be used, and why.

ledger = Ledger.load("ledger.parquet")     # what ``genkl scan`` wrote
ledger.counts()                            # {"truncated": 12, "not an image": 3}
ledger.rows_in(manifest)                   # rows to leave out

row      int64                of the manifest that was scanned
key      string
path     string               as that manifest has it
reason   dictionary<string>   one of ``decode.Reason``
detail   string               what exactly, for people
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..files import atomic_write, settings_of
from .decode import Limits
from .manifest import Manifest, PathLike

SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("reason", pa.dictionary(pa.int8(), pa.string()), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
METADATA_KEY = b"genkl_ext.ledger"
FORMAT = 1
_EXAMPLES = 5


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ledger:
    """The broken images of one scan, by row. Never changes."""

    table: pa.Table  #: columns as in ``SCHEMA`` (``ledger.py`` describes them)
    manifest: str  #: fingerprint of the manifest that was scanned
    root: str  #: where its relative paths started from
    limits: Limits
    scanned: int  #: images that were checked
    bytes_read: int  #: of all files together

    @classmethod
    def load(cls, path: PathLike) -> Ledger:
        """A ledger that was saved.

        Raises:
            OSError: the file cannot be read. ValueError: it is not a ledger.
        """
        wanted = "a ledger that genkl scan wrote"
        about = settings_of(path, METADATA_KEY, "ledger", wanted)
        table = pq.read_table(path).replace_schema_metadata()
        if about.pop("format") != FORMAT or not table.schema.equals(SCHEMA):
            raise ValueError(
                f"ledger: {os.fspath(path)} was written by another version of genkl_ext; scan again"
            )
        return cls(table, limits=Limits(**about.pop("limits")), **about)

    def save(self, path: PathLike) -> None:
        """Write a Parquet file that :meth:`load` reads, complete or not at all.

        Raises:
            OSError: it cannot be written.
        """
        about = {
            "format": FORMAT,
            "manifest": self.manifest,
            "root": self.root,
            "limits": dataclasses.asdict(self.limits),
            "scanned": self.scanned,
            "bytes_read": self.bytes_read,
        }
        metadata = {METADATA_KEY: json.dumps(about).encode()}
        with atomic_write(path) as temporary:
            pq.write_table(self.table.replace_schema_metadata(metadata), temporary)

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        return f"Ledger({len(self):,} broken images of {self.scanned:,}; root {self.root!r})"

    def counts(self) -> dict[str, int]:
        """Number of images of each reason, the most frequent first."""
        return dict(Counter(self.table["reason"].to_pylist()).most_common())

    def rows_in(self, manifest: Manifest) -> NDArray[np.int64]:
        """Rows of a manifest whose image is listed, ascending.

        The manifest may be another one than was scanned: a split or a selection of it, in another
        order, or with the data set moved. Paths below the root are compared; where one root is a
        folder inside the other, full paths.
        """
        listed = self.table["path"].to_pylist()
        ours, theirs = _slashed(self.root), _slashed(manifest.root)
        if ours != theirs and (ours.startswith(theirs) or theirs.startswith(ours)):
            full = [path if _is_full(path) else ours + path for path in listed]
            listed = full + [path.removeprefix(theirs) for path in full]
        found = pc.is_in(manifest.table["path"], value_set=pa.array(listed, pa.string()))
        return np.flatnonzero(np.asarray(found))

    def describe(self) -> dict[str, Any]:
        """The facts for a screen or JSON: sizes, reasons, the first broken images, limits."""
        return {
            "scanned": self.scanned,
            "healthy": self.scanned - len(self),
            "broken": len(self),
            "reasons": self.counts(),
            "first": self.table.slice(0, _EXAMPLES).to_pylist(),
            "bytes_read": self.bytes_read,
            "limits": dataclasses.asdict(self.limits),
            "root": self.root,
            "manifest": self.manifest,
        }


def _slashed(root: str) -> str:
    """A root so that path follows on it, written the same way for the same folder."""
    return (root if _is_full(root) else os.path.abspath(root)).rstrip("/") + "/"


def _is_full(path: str) -> bool:
    return path.startswith("/") or "://" in path
