"""A pytest plugin for runs under TRITON_INTERPRET=1: takes half the interpreter's time away.

Each call of one jitted function by another, ``tl.sum`` included, patches triton.language anew, although the launch has
patched it already. Here a language module is patched once per launch.

It also raises where a mask is anything but booleans, as Triton 3.9's interpreter does; earlier ones took integers.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

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
