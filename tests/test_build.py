"""What the build promises: one list of sources, layers that know only those below, honest facts."""

import itertools
import json
import platform
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

import genkl_ext
from genkl_ext import _native

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(genkl_ext.__file__).parent
OPERATORS_CPU = PACKAGE / "libgenkl_ops_cpu.so"
OPERATORS_CUDA = PACKAGE / "libgenkl_ops_cuda.so"
SIMD_LEVELS = (
    ["avx512", "avx2", "portable"] if platform.machine() in ("x86_64", "AMD64") else ["portable"]
)
KERNELS = {"nc_score.cpp": "kNcKernel", "resample.cpp": "kResampleKernel"}  # source -> its table


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def linked_libraries(library: Path) -> set[str]:
    """Names of the shared libraries that the dynamic loader needs for ``library``."""
    output = subprocess.run(
        ["readelf", "--dynamic", library], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output))


@pytest.mark.parametrize(
    "use",
    [
        "import genkl_ext",
        "import genkl_ext; genkl_ext.GenKL.preset('clothing1m').vectors",
        "import genkl_ext, numpy; genkl_ext.GenKL(2, 1.0, 0.1, 0.0).score(numpy.full((3, 2), 0.5))",
        "import genkl_ext.cli.main",
    ],
)
def test_torch_and_dali_are_loaded_only_when_used(use: str) -> None:
    loaded = json.loads(
        run_python(f"{use}; import json, sys; print(json.dumps(list(sys.modules)))")
    )
    assert "genkl_ext" in loaded
    heavy = [name for name in loaded if re.match(r"(torch|torchvision|lightning|nvidia)\b", name)]
    assert heavy == []


def test_one_version() -> None:
    (declared,) = re.findall(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())
    built = _native.build_info()["version"]
    assert genkl_ext.__version__ == version("genkl-ext") == built == declared


def test_cmake_lists_every_native_source_and_no_other() -> None:
    listed = set(re.findall(r"csrc/\S+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    present = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu", ".cc", ".cxx")
    }
    assert listed == present


def test_kernels_know_no_framework() -> None:
    for path in sorted((ROOT / "csrc" / "kernels").iterdir()):
        includes = re.findall(r'(?m)^\s*#\s*include\s*[<"](.+)[>"]', path.read_text())
        above = [
            name
            for name in includes
            if re.match(r"(torch|ATen|c10|Python\.h|pybind11|numpy)", name) or "bindings" in name
        ]
        assert above == [], f"{path.name} includes {above}"


def test_build_info_agrees_with_what_is_there() -> None:
    facts = _native.build_info()
    assert facts["simd_built"] == SIMD_LEVELS
    assert facts["simd"] in facts["simd_built"]
    assert "portable" in facts["simd_supported"]
    assert OPERATORS_CPU.is_file()
    assert OPERATORS_CUDA.is_file() == bool(facts["cuda_architectures"])
    assert OPERATORS_CUDA.is_file() == ("nvcc" in facts["compiler"])


def test_libraries_link_no_more_than_they_promise() -> None:
    native = linked_libraries(Path(_native.__file__))
    assert not any("torch" in name or "cuda" in name for name in native)
    operators = linked_libraries(OPERATORS_CPU)
    assert "libtorch_cpu.so" in operators
    assert not any("cuda" in name or "c10" in name for name in operators)
    if OPERATORS_CUDA.is_file():
        cuda = linked_libraries(OPERATORS_CUDA)
        assert "libtorch_cuda.so" in cuda
        assert not any("cudart" in name for name in cuda)  # the runtime is linked statically


def test_each_instruction_set_keeps_to_itself() -> None:
    # An inline function that leaves an object under a shared name may be picked by the linker for
    # all: AVX-512 code would then run on a processor without it.
    build = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))
    if PACKAGE != ROOT / "genkl_ext":
        pytest.skip("genkl_ext is installed from a wheel, its object files are elsewhere")
    for level, (source, kernel) in itertools.product(SIMD_LEVELS, KERNELS.items()):
        (compiled,) = (build / "CMakeFiles" / f"kernels_{level}.dir").rglob(f"{source}.o")
        symbols = subprocess.run(
            ["nm", "--demangle", "--defined-only", "--extern-only", compiled],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        names = [line.split(maxsplit=2)[2] for line in symbols.splitlines()]
        assert names == [f"genkl::{kernel}{level.capitalize()}"]


def test_no_path_of_the_building_machine_is_built_in() -> None:
    for library in (Path(_native.__file__), OPERATORS_CPU, OPERATORS_CUDA):
        if library.is_file():
            content = library.read_bytes()
            assert str(ROOT).encode() not in content
            assert b"site-packages" not in content
