"""The backend "triton": the stages as Triton kernels, compiled on first use for the GPU at hand.

Importing this package needs no Triton: the ops are registered here with their fakes, and the kernels are imported at the
first call. Triton decides at that import, by the environment variable TRITON_INTERPRET, whether its interpreter runs them
(on CPU tensors, for tests) or its compiler.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from ...stages import ops

NAMESPACE = "proac_cuda_triton"

#: which run the kernels, for `python -m proac_cuda info`
GPUS = "NVIDIA, compute capability 7.5 and up (7.5, T4 and RTX 20: without tensor cores), and AMD under ROCm"

_FOUND = importlib.util.find_spec("triton") is not None
_KERNELS = f"{__name__}.launch"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, or will once they are imported."""
    if _KERNELS in sys.modules:
        return bool(sys.modules[_KERNELS].INTERPRETED)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on tensors of ``device``, or None."""
    if not _FOUND:
        return "Triton is not installed; pip install triton"
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "its kernels are compiled for GPUs: move the tensors to one, or set the environment variable "
            "TRITON_INTERPRET=1 before Python starts to run them, slowly, in Triton's interpreter"
        )
    if device.type != "cuda":
        return f'it takes CUDA tensors, not {device.type}; use backend="auto", or move the tensors'
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return None if torch.version.hip else why_not_capability(torch.cuda.get_device_capability(device))


def why_not_capability(capability: tuple[int, int]) -> str | None:
    """Why no GPU of that compute capability runs the Triton kernels, or None."""
    if capability >= (7, 5):
        return None
    return f'it needs a GPU of compute capability 7.5 or higher, not {capability[0]}.{capability[1]}; use backend="reference"'


def _imported_when_called(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from . import launch

        if not launch.INTERPRETED and arguments[0].device.type == "cpu":
            raise RuntimeError(f'backend="triton" cannot run here: {why_not(arguments[0].device)}')
        return getattr(launch, name)(*arguments)

    return call


_stages = SimpleNamespace(**{name: _imported_when_called(name) for name in ops.SCHEMAS})
_library = ops.define_stages(NAMESPACE)
for _key in ("CUDA", "CPU"):
    ops.implement_stages(_library, _stages, _key)
    ops.implement_forward(_library, _imported_when_called("loss_forward"), _key)
