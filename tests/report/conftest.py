import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import synthetic_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; not to be changed."""
    return synthetic_run.write(tmp_path_factory.mktemp("synthetic"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder of its own, to change."""
    return synthetic_run.write(tmp_path)
