"""Which backends there are, which can run where, and which one ``backend="auto"`` takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..stages import ops
from . import extension, reference
from . import triton as triton_kernels

ENVIRONMENT_VARIABLE = "PROAC_BACKEND"


class BackendStatus(NamedTuple):
    """Whether a backend can run on this machine."""

    can_run: bool
    reason: str  #: why not, and what to do; empty where it can


class Backend(NamedTuple):
    """One row of the registry.

    ``why_not(device)`` is the only judge of whether the backend can run on tensors of that device: it gives the reason
    against, or None. It decides the automatic choice and words the error where the backend was asked for by name.
    """

    name: str
    namespace: str  #: of its registered ops
    home: str  #: the device type it is made for
    why_not: Callable[[torch.device], str | None]


_REFERENCE = "proac_cuda_reference"
_reference = ops.define_stages(_REFERENCE)
ops.implement_stages(_reference, reference, "CompositeExplicitAutograd")


def _why_not_reference(device: torch.device) -> str | None:
    return None


def _why_not_cpp(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f'it takes CPU tensors, not {device.type}; use backend="auto"'
    return extension.why_not_cpu()


def _why_not_cuda(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f'it takes CUDA tensors, not {device.type}; use backend="auto", or move the tensors'
    return extension.why_not_cuda(device)


# Where Triton's interpreter runs the kernels, for tests, they take CPU tensors; "auto" does not choose them there.
_TRITON_HOME = "cpu" if triton_kernels.interpreted() else "cuda"

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend("cpp", extension.NAMESPACE, "cpu", _why_not_cpp),
        Backend("cuda", extension.NAMESPACE, "cuda", _why_not_cuda),
        Backend("triton", triton_kernels.NAMESPACE, _TRITON_HOME, triton_kernels.why_not),
        Backend("reference", _REFERENCE, "cpu", _why_not_reference),
    )
}

_PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpp", "reference")}


def check_name(name: str, source: str = "backend") -> None:
    """Raise ValueError for a name that is no backend's; ``source`` says where it comes from."""
    if name != "auto" and (not isinstance(name, str) or name not in BACKENDS):
        known = ", ".join(f'"{known}"' for known in BACKENDS)
        raise ValueError(f'{source}: expected "auto", {known}, got {name!r}')


def choose_backend(name: str, device: torch.device) -> Backend:
    """The backend for tensors of ``device``: the one asked for by name, or what "auto" means there.

    Raises:
        ValueError: unknown name, also one from the environment variable PROAC_BACKEND, which overrides "auto".
        RuntimeError: a backend asked for by name cannot run. Never another one silently.
    """
    source = "backend"
    if name == "auto" and os.environ.get(ENVIRONMENT_VARIABLE):
        name, source = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    check_name(name, source)
    if name == "auto":
        candidates = _PREFERENCE.get(device.type, ("reference",))
        return next(BACKENDS[candidate] for candidate in candidates if BACKENDS[candidate].why_not(device) is None)
    reason = BACKENDS[name].why_not(device)
    if reason is not None:
        remedy = "" if source == "backend" else f". The environment variable {source}={name} asks for it: unset it"
        raise RuntimeError(f'backend="{name}" cannot run here: {reason}{remedy}')
    return BACKENDS[name]


def stage_ops(backend: Backend) -> Any:
    """The registered ops of a backend."""
    return getattr(torch.ops, backend.namespace)


def available_backends() -> dict[str, BackendStatus]:
    """For each backend: can it run on this machine, on the device type that it is made for, and if not, why."""
    statuses = {}
    for backend in BACKENDS.values():
        reason = backend.why_not(torch.device(backend.home))
        statuses[backend.name] = BackendStatus(reason is None, reason or "")
    return statuses
