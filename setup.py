"""Hands the native build to CMake and Ninja; everything else is in pyproject.toml.

Environment: GENKL_CUDA (AUTO, ON, OFF), TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"), MAX_JOBS.
The build folder, build/<Python's ABI tag>, is kept: a second build compiles what has changed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds every library of CMakeLists.txt into the package folder."""

    def run(self) -> None:
        # An editable install keeps the libraries beside the sources, a wheel in its build folder.
        base = ROOT if self.inplace else Path(self.build_lib).resolve()
        build = ROOT / "build" / sysconfig.get_config_var("SOABI")
        cmake = _tool("cmake")
        settings = {
            **_facts_of_python_and_torch(),
            "GENKL_CUDA": os.environ.get("GENKL_CUDA", "AUTO"),
            "GENKL_PACKAGE_VERSION": self.distribution.get_version(),
            "CMAKE_MAKE_PROGRAM": _tool("ninja"),
            "CMAKE_INSTALL_PREFIX": str(base / "genkl_ext"),
        }
        definitions = [f"-D{name}={value}" for name, value in settings.items()]
        where = ["-S", ROOT, "-B", build, "-G", "Ninja", "--no-warn-unused-cli"]
        subprocess.run([cmake, *where, *definitions], check=True)
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        subprocess.run([cmake, "--build", build, *jobs], check=True)
        subprocess.run([cmake, "--install", build], check=True)
        _remove_others(base / "genkl_ext", (build / "install_manifest.txt").read_text())

    # A wheel takes its build folder whole, and an editable install has nothing to copy.
    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _tool(name: str) -> str:
    """Path of cmake or ninja: beside this Python (a virtual environment), or on PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    path = shutil.which(name, path=places)
    if path is None:
        raise FileNotFoundError(f"building genkl_ext needs {name}: pip install {name}")
    return path


def _facts_of_python_and_torch() -> dict[str, str]:
    """What CMakeLists.txt has to know of this Python and the packages in it."""
    import pybind11
    import torch

    # Answers without a GPU too; absent in a torch built without CUDA.
    architectures = getattr(torch._C, "_cuda_getArchFlags", lambda: None)()
    return {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "GENKL_TORCH": str(Path(torch.__file__).parent),
        "GENKL_TORCH_VERSION": torch.__version__,
        "GENKL_TORCH_CUDA": torch.version.cuda or "",
        "GENKL_TORCH_ARCH_LIST": architectures or "",
    }


def _remove_others(package: Path, manifest: str) -> None:
    """Remove operator libraries of an earlier build that this one did not make."""
    made = {Path(line).name for line in manifest.splitlines()}
    for library in package.glob("libgenkl_ops_*.so"):
        if library.name not in made:
            library.unlink()


setup(
    ext_modules=[Extension("genkl_ext._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
