"""Compiling the Triton kernels for GPUs that are not there, exactly as the stages would launch them.

:class:`Compiler` stands in for ``proac_cuda.triton.launch.run``: the stage functions then run on CPU tensors, choose tiles and
arguments as on the architecture asked for, and each launch is compiled instead of started. What a launch specialises on
(strides of 1, sizes divisible by 16) is worked out by Triton's own binder, so the code is the code that ships.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from proac_cuda.triton import launch


class Launch(NamedTuple):
    """One launch of a stage, compiled."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]  #: by name, compile-time constants included
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]  #: by path of argument numbers
    compiled: Any  #: asm["ptx"], asm["cubin"], metadata.shared, ...


def target_of(architecture: str) -> GPUTarget:
    """ "sm_80" or "gfx942" as Triton names it."""
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], architecture: str) -> Launch:
    """Compile one launch for ``architecture``."""
    target = target_of(architecture)
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    known = {"debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(**arguments, **known)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**arguments, **known}, bound, specialization, options
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return Launch(kernel.__name__, grid, dict(bound), signature, constants, compiled)


class Compiler:
    """Launches are compiled for one architecture, and kept in ``launches``."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.launches: list[Launch] = []

    def run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """As ``launch.run``, but nothing is started."""
        self.launches.append(compile_launch(kernel, grid, arguments, self.architecture))


@contextlib.contextmanager
def instead_of_launching(compiler: Compiler) -> Iterator[Compiler]:
    """Inside, the stage functions of ``launch`` compile instead of launching."""
    saved = launch.run, launch.architecture
    launch.run, launch.architecture = compiler.run, lambda device: compiler.architecture
    try:
        yield compiler
    finally:
        launch.run, launch.architecture = saved
