"""A pytest plugin for runs under TRITON_INTERPRET=1: takes two thirds of the interpreter's time away.

Each call of one jitted function by another, ``tl.sum`` included, patches triton.language anew, although the launch has
patched it already. Here a language module is patched once per launch. NumPy's name of a type is looked up once a type, not once
an operation. Whether an integer overflows is asked, at four operations for one, where sizes are near a limit (``OVERFLOWS``),
not on the small cases of the other files.

It also raises where a mask is anything but booleans, as Triton 3.9's interpreter does; earlier ones took integers.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter

OVERFLOWS = {"test_triton_interpreter.py", "test_triton_bounds.py"}  #: files whose launches are watched for overflow

_patch_lang = interpreter._patch_lang
_call = interpreter.GridExecutor.__call__
_patched: set[str] | None = None


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    global _patched
    _patched = set()
    try:
        return _call(self, *args, **kwargs)
    finally:
        _patched = None


def _patch_once(function: Any) -> Any:
    names = {name for name in ("tl", "core") if name in function.__globals__}
    if _patched is None or not names <= _patched:
        if _patched is not None:
            _patched.update(names)
        return _patch_lang(function)
    return interpreter._LangPatchScope()


interpreter.GridExecutor.__call__ = _launch
interpreter._patch_lang = _patch_once


_of_scalar = functools.cache(interpreter._get_np_dtype)


def _np_dtype(type_: Any) -> np.dtype[Any]:
    return np.dtype(np.uint64) if type_.scalar.is_ptr() else _of_scalar(type_.scalar)


interpreter._get_np_dtype = _np_dtype


def pytest_runtest_setup(item: pytest.Item) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=item.path.name in OVERFLOWS)


_builder = interpreter.InterpreterBuilder


def _strict(name: str, place: int) -> None:
    function = getattr(_builder, name)

    def call(self: Any, *args: Any) -> Any:
        if args[place].data.dtype != bool:
            raise TypeError(f"{name}: the mask is {args[place].data.dtype}")
        return function(self, *args)

    setattr(_builder, name, call)


_strict("create_masked_load", 1)
_strict("create_masked_store", 2)
_strict("create_atomic_rmw", 3)
