"""What torch.compile is told of a function, without importing it: that takes nearly as long as PyTorch itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def constant_while_tracing(function: Function) -> Function:
    """``torch.compiler.assume_constant_result``, which sets the same attribute: called while a graph is traced, never by it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
