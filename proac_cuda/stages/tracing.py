"""What is not part of a traced program.

torch.compile is told so without importing it: that takes nearly as long as PyTorch itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _disable_current_modes

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which sets the same attribute: called while a graph is traced, never by it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Operations on tensors with values, which neither ``make_fx`` nor ``torch.jit.trace`` is to record."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with _disable_current_modes():
            yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]
