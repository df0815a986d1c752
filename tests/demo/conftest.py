"""The data of the demo, which its tests share."""

from pathlib import Path

import pytest

from genkl_ext.demo import digits


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of seed 0."""
    root = tmp_path_factory.mktemp("digits") / "data"
    digits.write(root, 0)
    return root
