"""Fixtures that the tests share.

GENKL_REQUIRE_CUDA=1   a machine that promised a GPU: tests on "cuda" fail where they would skip
GENKL_SHARED_DATA      folder of the real pictures and softmax files; default ../shared/data
HYPOTHESIS_PROFILE     "ci" (default; the same examples every time) or "search" (new ones, more)
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parents[1]

settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,  # no test judges time
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "search", parent=settings.get_profile("ci"), derandomize=False, max_examples=2000
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _missing_cuda() -> str:
    """Why tests on "cuda" cannot run here; empty when they can."""
    import torch

    return "" if torch.cuda.is_available() else "no CUDA device"


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each torch device: "cpu" always, "cuda" where there is one."""
    if request.param == "cuda" and (reason := _missing_cuda()):
        if os.environ.get("GENKL_REQUIRE_CUDA") == "1":
            pytest.fail(f"GENKL_REQUIRE_CUDA=1, but: {reason}")
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real pictures and softmax files that is laid beside a checkout, not inside it."""
    folder = Path(os.environ.get("GENKL_SHARED_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is no folder (GENKL_SHARED_DATA names another)")
    return folder
