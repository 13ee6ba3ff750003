"""Compiling the Triton kernels for GPUs that are not there, exactly as the stages would launch them.

:class:`Compiler` stands in for ``proac_cuda.backends.triton.launch.run``: the stage functions then run on CPU tensors,
choose tiles and arguments as on the architecture asked for, and each launch is compiled instead of started. What a launch
specialises on (strides of 1, sizes divisible by 16) is worked out by Triton's own binder, so the code is the code that ships.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from proac_cuda.backends.triton import launch


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


def bind(kernel: Any, arguments: dict[str, Any], backend: Any) -> tuple[dict[str, Any], list[Any], dict[str, Any]]:
    """(arguments by name, what Triton specialises the kernel on, options), as Triton's own launch has them."""
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, options = binder(**arguments)
    return bound, specialized, options


def specialization(kernel: Any, arguments: dict[str, Any], backend: Any) -> str:
    """What tells this launch's compiled code from that of others of the kernel."""
    return str(bind(kernel, arguments, backend)[1:])


def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], architecture: str) -> Launch:
    """Compile one launch for ``architecture``."""
    target = target_of(architecture)
    backend = make_backend(target)
    known = {"debug": False, "instrumentation_mode": "", **launch.OPTIONS}
    bound, specialized, options = bind(kernel, {**arguments, **known}, backend)
    options, signature, constants, attributes = kernel._pack_args(
        backend, {**arguments, **known}, bound, specialized, options
    )
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return Launch(kernel.__name__, grid, dict(bound), signature, constants, compiled)


class Compiler:
    """Launches are compiled for one architecture, and kept in ``launches``: all, or the first that is ``wanted``."""

    def __init__(self, architecture: str, wanted: tuple[str, str] | None = None) -> None:
        self.architecture = architecture
        self.wanted = wanted  #: (name, what it is specialised on)
        self.launches: list[Launch] = []

    def run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """As ``launch.run``, but nothing is started."""
        if self.wanted is not None:
            if self.launches or kernel.__name__ != self.wanted[0]:
                return
            if specialization(kernel, arguments, make_backend(target_of(self.architecture))) != self.wanted[1]:
                return
        self.launches.append(compile_launch(kernel, grid, arguments, self.architecture))


class Variants:
    """Launches are only looked at: ``found`` has the distinct things that each kernel would be compiled for."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture
        self.backend = make_backend(target_of(architecture))
        self.found: dict[str, set[str]] = {}

    def run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """As ``launch.run``, but nothing is started."""
        self.found.setdefault(kernel.__name__, set()).add(specialization(kernel, arguments, self.backend))


@contextlib.contextmanager
def instead_of_launching(compiler: Any) -> Iterator[Any]:
    """Inside, the stage functions of ``launch`` go to ``compiler.run`` instead of the GPU."""
    saved = launch.run, launch.architecture
    launch.run, launch.architecture = compiler.run, lambda device: compiler.architecture
    try:
        yield compiler
    finally:
        launch.run, launch.architecture = saved
