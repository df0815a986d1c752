"""``genkl info``: true, complete, and at ease with whatever is missing."""

import json
from importlib.metadata import version

import pytest

from genkl_ext import _native
from genkl_ext.cli import info as command


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("sm_80 sm_90", (8, 0), True),
        ("sm_80 sm_90", (8, 6), True),  # machine code runs within its major version
        ("sm_86", (8, 0), False),
        ("sm_80 sm_90", (10, 0), False),
        ("sm_80 compute_80", (10, 0), True),  # PTX is compiled for what came later
        ("compute_90", (8, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a compute_100a", (10, 3), False),  # a suffix: this device and no other
        ("sm_120", (12, 1), True),
        ("", (9, 0), False),
    ],
)
def test_runs_on(architectures: str, capability: tuple[int, int], runs: bool) -> None:
    assert command.runs_on(architectures, capability) is runs


def test_json_holds_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    command.info(json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["numpy"] == version("numpy")
    assert facts["versions"]["torch"] == version("torch")
    assert facts["native"] == _native.build_info()
    assert facts["operators"][0] == "cpu"
    assert facts["threads"] >= 1
    assert set(facts["extras"]) == {"clip", "ray", "spark", "wandb"}


def test_table_names_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command._PACKAGES, "torchvision", ("no-such-distribution",))
    monkeypatch.setitem(command._EXTRAS, "clip", ("no-such-distribution", "CLIP features"))
    command.info()
    table = capsys.readouterr().out
    assert "torchvision      missing" in table
    assert "pip install 'genkl-ext[clip]'" in table
    assert _native.build_info()["compiler"] in table
    assert version("torch") in table


def test_table_without_torch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    command.info()
    assert "torch is not installed" in capsys.readouterr().out


def test_table_of_a_gpu_that_the_kernels_do_not_cover() -> None:
    facts = command.collect()
    facts["cuda"] = {
        "devices": [
            {
                "name": "Some GPU",
                "capability": "7.0",
                "memory_bytes": 16 * 2**30,
                "kernels_run": False,
            }
        ]
    }
    table = command._table(facts)
    assert "Some GPU, sm_70, 16 GiB" in table
    assert "TORCH_CUDA_ARCH_LIST=7.0" in table
