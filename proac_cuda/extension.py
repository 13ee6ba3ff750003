"""The compiled extension: where it is, what it was built for, and why it is missing."""

from __future__ import annotations

from pathlib import Path

import torch

_INSTALL = "reinstall with a C++ compiler on the path and PROAC_NO_EXT unset: pip install --no-build-isolation ."


def _load() -> str:
    """Load the library, which registers its kernels with PyTorch; the reason where that failed, else ''."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so")) + sorted(Path(__file__).parent.glob("_C*.pyd"))
    if not libraries:
        return f"the compiled extension is not installed (a reference-only build); {_INSTALL}"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:
        return f"the compiled extension {libraries[0].name} does not load ({error}); {_INSTALL}"
    return ""


_load_error = _load()


def build_info() -> dict[str, str]:
    """What the extension was built for: ``cpu``, the instruction set in use; ``cuda``, architectures. Empty without it."""
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
    if "cuda" not in build_info():
        return "the extension was built without CUDA kernels"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if not _is_supported(device.index):
        return "its kernels need a GPU of compute capability 8.0 or higher"
    return None


@torch.compiler.assume_constant_result
def _is_supported(index: int | None) -> bool:
    """Whether there is code for a device: the library has PTX of 8.0, which every later GPU takes."""
    return torch.cuda.get_device_capability(index) >= (8, 0)
