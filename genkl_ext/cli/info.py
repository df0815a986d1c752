"""``genkl info``: what is installed, what was built, what this machine has."""

from __future__ import annotations

import json as json_format
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Row of the table -> distributions that provide it, the usual one first.
_PACKAGES = {
    "numpy": ("numpy",),
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "dali": ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
    "lightning": ("lightning",),
    "pyarrow": ("pyarrow",),
    "scikit-learn": ("scikit-learn",),
}
# Extra -> the distribution it installs, what that is for.
_EXTRAS = {
    "clip": ("open_clip_torch", "CLIP features of images and class names"),
    "ray": ("ray", "scoring in Ray Data jobs"),
    "spark": ("pyspark", "scoring in Spark jobs"),
    "wandb": ("wandb", "training logs on Weights & Biases"),
}


def info(json: bool = False) -> None:
    """Show what is installed and built, and what is missing.

    Example: genkl info --json

    Args:
        json: print one JSON object instead of the table.
    """
    facts = collect()
    print(json_format.dumps(facts, indent=2) if json else _table(facts))


def collect() -> dict[str, Any]:
    """The facts behind ``genkl info``, ready for JSON.

    ``versions`` (None: not installed), ``native`` (what the build says of itself, or ``error``),
    ``operators`` (devices that have a torch operator library), ``threads`` (what scoring of NumPy
    arrays uses), ``cuda`` (``devices``, or ``error``) and ``extras``.
    """
    from .. import __version__
    from ..rule import num_threads

    package = Path(__file__).parents[1]
    versions: dict[str, str | None] = {
        "genkl_ext": __version__,
        "python": platform.python_version(),
    }
    versions.update({name: _version(*providers) for name, providers in _PACKAGES.items()})
    native = _native_facts()
    return {
        "versions": versions,
        "native": native,
        "operators": [
            device
            for device in ("cpu", "cuda")
            if (package / f"libgenkl_ops_{device}.so").is_file()
        ],
        "threads": num_threads(),
        "cuda": _cuda_facts(native.get("cuda_architectures", "")),
        "extras": {
            extra: {"package": name, "version": _version(name), "purpose": purpose}
            for extra, (name, purpose) in _EXTRAS.items()
        },
    }


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``architectures`` ("sm_80 sm_90a compute_120") runs on a device of
    this compute capability: machine code within its major version, PTX on everything newer, an
    architecture with a suffix on exactly that device."""
    for name in architectures.split():
        kind, _, number = name.partition("_")
        exact = not number.isdigit()
        if exact:
            number = number[:-1]
        built = (int(number[:-1]), int(number[-1]))
        if built == capability:
            return True
        if not exact and built < capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _native_facts() -> dict[str, Any]:
    try:
        from .. import _native
    except ImportError as error:
        return {"error": f"the native module is not built or does not load: {error}"}
    return dict(_native.build_info())


def _cuda_facts(architectures: str) -> dict[str, Any]:
    if find_spec("torch") is None:
        return {"error": "torch is not installed", "devices": []}
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's does not load
        return {"error": f"torch does not load: {error}", "devices": []}
    if not torch.cuda.is_available():
        built = torch.version.cuda
        reason = "no CUDA device found" if built else "torch is built without CUDA"
        return {"error": reason, "torch_cuda": built, "devices": []}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
                "kernels_run": runs_on(architectures, (properties.major, properties.minor)),
            }
        )
    return {"torch_cuda": torch.version.cuda, "devices": devices}


def _table(facts: dict[str, Any]) -> str:
    rows = [(name, value or "missing") for name, value in facts["versions"].items()]
    native = facts["native"]
    if "error" in native:
        rows.append(("native code", native["error"]))
    else:
        architectures = native["cuda_architectures"] or "none (built for the CPU only)"
        rows += [
            ("compiler", native["compiler"]),
            ("SIMD built", ", ".join(native["simd_built"])),
            ("SIMD used", native["simd"] or "none: GENKL_SIMD names none that runs here"),
            ("CUDA kernels", architectures),
        ]
    rows.append(("torch operators", ", ".join(facts["operators"]) or "not built"))
    rows.append(("CPU threads", str(facts["threads"])))
    cuda = facts["cuda"]
    if not cuda["devices"]:
        rows.append(("CUDA devices", cuda["error"]))
    for index, device in enumerate(cuda["devices"]):
        memory = device["memory_bytes"] / 2**30
        text = f"{device['name']}, sm_{device['capability'].replace('.', '')}, {memory:.0f} GiB"
        if not device["kernels_run"]:
            text += "; the kernels built do not run on it, rebuild with TORCH_CUDA_ARCH_LIST"
            text += f"={device['capability']}"
        rows.append((f"CUDA device {index}", text))
    for extra, what in facts["extras"].items():
        state = what["version"] or f"missing: pip install 'genkl-ext[{extra}]'"
        rows.append((f"extra {extra}", f"{what['purpose']}: {what['package']} {state}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
