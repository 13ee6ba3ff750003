"""The compiled extension: where it is, what it was built for, and why it is missing."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from pathlib import Path

import torch

from ..stages import autograd, ops
from ..stages.tracing import constant_while_tracing

NAMESPACE = "proac_cuda"  #: of its ops

_PACKAGE = Path(__file__).parents[1]
_INSTALL = "reinstall with a C++ compiler on the path and PROAC_NO_EXT unset: pip install --no-build-isolation ."


def _load() -> str:
    """Load the library, which registers its kernels with PyTorch; the reason where that failed, else ''."""
    libraries = sorted(_PACKAGE.glob("_C*.so")) + sorted(_PACKAGE.glob("_C*.pyd"))
    if not libraries:
        shadowed = _shadowed_build()
        if shadowed:
            reason = (
                f"proac_cuda was imported from the source folder {_PACKAGE}, which has no compiled extension and "
                f"hides the installed one in {shadowed}; run Python from another folder, or build this one: "
                "pip install --no-build-isolation --editable ."
            )
            warnings.warn(reason, RuntimeWarning, stacklevel=2)
            return reason
        return f"the compiled extension is not installed (a reference-only build); {_INSTALL}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the compiled extension {libraries[0].name} does not load ({error}); {_INSTALL}"
    return ""


def is_shadowed() -> bool:
    """Whether this package, without a compiled extension, hides an installed one that has it."""
    return bool(_load_error) and _shadowed_build() is not None


def _shadowed_build() -> Path | None:
    """The folder of a compiled build that is installed elsewhere, which this one, found first, hides."""
    for distribution in importlib.metadata.distributions(name="proac_cuda"):
        folder = Path(str(distribution.locate_file("proac_cuda")))
        if any(folder.glob("_C*.so")) and folder.resolve() != _PACKAGE.resolve():
            return folder
    return None


_load_error = _load()
_library = ops.define_stages(NAMESPACE)
autograd.HAVE_FORWARD.add((NAMESPACE, "cuda"))  # csrc/cuda/ops.cpp


def build_info() -> dict[str, str]:
    """What the extension was built for, and meets here. Empty without it.

    ``cpu``, the instruction set in use; with CUDA kernels ``cuda``, their architectures, ``runtime``, the CUDA version that is
    linked in, and ``driver``, the newest that the driver here supports (0.0: there is none).
    """
    if _load_error:
        return {}
    pairs = (pair.split("=", 1) for pair in torch.ops.proac_cuda.build_info().split(";"))
    return {key: value for key, value in pairs if value}


def why_not_cpu() -> str | None:
    """Why the compiled CPU kernels cannot run, or None."""
    return _load_error or None


def why_not_cuda(device: torch.device) -> str | None:
    """Why the compiled CUDA kernels cannot run on ``device``, or None."""
    if _load_error:
        return _load_error
    return _why_not_device(device.index)


@constant_while_tracing  # the op that tells what was built returns no tensor
def _why_not_device(index: int | None) -> str | None:
    built = build_info()
    if "cuda" not in built:
        return "the extension was built without CUDA kernels"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    driver, runtime, capability = built["driver"], built["runtime"], torch.cuda.get_device_capability(index)
    return (
        why_not_driver(driver, runtime)
        or why_not_capability(capability, built["cuda"])
        or why_not_ptx(capability, built["cuda"], driver, runtime)
    )


def why_not_driver(driver: str, runtime: str) -> str | None:
    """Why a library with that CUDA runtime in it does not run on a driver that supports CUDA up to ``driver``, or None.

    A runtime needs a driver of its own major version, or of a later one.
    """
    if int(driver.split(".")[0]) >= int(runtime.split(".")[0]):
        return None
    return (
        f"the extension holds the CUDA runtime {runtime}, and the driver here supports CUDA {driver} at most; install a newer "
        f"driver, or build the extension with the CUDA {driver.split('.')[0]} toolkit"
    )


def why_not_capability(capability: tuple[int, int], built: str) -> str | None:
    """Why the code in the library does not run on a GPU of that compute capability, or None.

    ``built`` lists machine code, sm_XY, which runs on its own major version from its minor one on, and PTX, compute_XY,
    which the driver compiles for every later GPU.
    """
    major, minor = capability
    if capability < (8, 0):
        return f"its kernels need a GPU of compute capability 8.0 or higher, not {major}.{minor}"
    if _has_machine_code(capability, built) or any(ptx <= capability for ptx in _entries("compute", built)):
        return None
    return (
        f"the extension was built for {built}, and this GPU has compute capability {major}.{minor}; "
        f"build it with PROAC_CUDA_ARCHITECTURES={major}{minor}, or without that variable"
    )


def why_not_ptx(capability: tuple[int, int], built: str, driver: str, runtime: str) -> str | None:
    """Why a GPU that only PTX of the library serves is not served on a driver that supports CUDA up to ``driver``, or None.

    A driver compiles no PTX of a CUDA version after its own, of the same major version or not.
    """
    if _has_machine_code(capability, built) or _version(driver) >= _version(runtime):
        return None
    major, minor = capability
    return (
        f"for compute capability {major}.{minor} the extension has PTX of CUDA {runtime} alone, which a driver of CUDA {driver}"
        f" does not compile; install a newer driver, or build with PROAC_CUDA_ARCHITECTURES={major}{minor}"
    )


def _entries(kind: str, built: str) -> list[tuple[int, int]]:
    """The compute capabilities of the library's machine code ("sm"), or of its PTX ("compute")."""
    return [divmod(int(number), 10) for number in re.findall(rf"\b{kind}_(\d+)", built)]


def _has_machine_code(capability: tuple[int, int], built: str) -> bool:
    return any(x == capability[0] and y <= capability[1] for x, y in _entries("sm", built))


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))
