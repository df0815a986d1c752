"""One quick run of the demo that the tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from genkl_ext.data import Manifest
from genkl_ext.data.manifest import SPLITS
from genkl_ext.demo import digits, layout, workers


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from more, and lose much beside other work."""
    with workers.one_thread():
        yield


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of seed 0."""
    root = tmp_path_factory.mktemp("digits") / "data"
    digits.write(root, 0)
    return root


@pytest.fixture(scope="session")
def splits(digits_folder: Path) -> dict[str, layout.Split]:
    manifest = Manifest.from_clothing1m(digits_folder)
    return {name: layout.read_split(manifest, name) for name in SPLITS}
