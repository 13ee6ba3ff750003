"""Comparisons, and selection by them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .arithmetic import float_ops
from .numeric import DTYPE, UINT, flush
from .operands import reader, write
from .syntax import Instruction, Pair

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


BOOLEAN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def compare_function(name, is_float):
    base = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    plain = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    if not is_float:
        return plain[base]

    def nan(a, b):
        return np.isnan(a) | np.isnan(b)

    if base == "num":
        return lambda a, b: ~nan(a, b)
    if base == "nan":
        return nan
    if base == "ne":
        return lambda a, b: np.not_equal(a, b) & ~nan(a, b)
    if base in plain:
        return plain[base]
    f = plain[base[:2]]
    return lambda a, b: f(a, b) | nan(a, b)


def comparison(instruction: Instruction) -> Callable[[Run], Any]:
    """(function of the run giving the compared booleans) for setp/set; handles the narrow float types."""
    mods = instruction.mods
    type_ = mods[-1]
    narrow = type_ in ("bf16", "bf16x2", "f16x2", "f16")
    f = compare_function(mods[0], narrow or DTYPE[type_].kind == "f")
    a, b = reader(instruction.args[1], type_), reader(instruction.args[2], type_)
    unpack = float_ops(type_)[0]
    logic = next((m for m in mods[1:-1] if m in BOOLEAN), None)
    third = reader(instruction.args[3], "pred") if logic else None
    ftz = "ftz" in mods and type_ == "f32"

    def execute(run: Run) -> Any:
        x, y = a(run), b(run)
        if unpack:
            x, y = unpack(run, x), unpack(run, y)
        elif ftz:
            x, y = flush(x), flush(y)
        r = f(x, y)
        return r, (BOOLEAN[logic], third(run)) if logic else None

    return execute


def op_setp(instruction: Instruction) -> Step:
    test, dest = comparison(instruction), instruction.args[0]
    packed = instruction.mods[-1].endswith("x2")

    def execute(run: Run) -> None:
        r, logic = test(run)
        if packed:
            write(run, dest.first, np.ascontiguousarray(r[0::2]))
            write(run, dest.second, np.ascontiguousarray(r[1::2]))
            return
        if isinstance(dest, Pair):
            no = ~r
            write(run, dest.first, logic[0](r, logic[1]) if logic else r)
            write(run, dest.second, logic[0](no, logic[1]) if logic else no)
        else:
            write(run, dest, logic[0](r, logic[1]) if logic else r)

    return execute


def op_set(instruction: Instruction) -> Step:
    test, out = comparison(instruction), instruction.mods[-2]

    def execute(run: Run) -> None:
        r, logic = test(run)
        r = logic[0](r, logic[1]) if logic else r
        if out in ("f16x2", "bf16x2"):
            one = np.uint16(0x3C00 if out == "f16x2" else 0x3F80)
            write(run, instruction.args[0], np.where(r, one, np.uint16(0)).view(np.uint32))
        elif out == "f32":
            write(run, instruction.args[0], np.asarray(r).astype(np.float32))
        else:
            dt = DTYPE[out]
            write(
                run,
                instruction.args[0],
                np.where(
                    r, UINT[8 * dt.itemsize].type(~0 & ((1 << 8 * dt.itemsize) - 1)), UINT[8 * dt.itemsize].type(0)
                ),
            )

    return execute


def op_selp(instruction: Instruction) -> Step:
    a, b, p = (
        reader(instruction.args[1], instruction.mods[-1]),
        reader(instruction.args[2], instruction.mods[-1]),
        reader(instruction.args[3], "pred"),
    )
    return lambda run: write(run, instruction.args[0], np.where(p(run), a(run), b(run)))


def op_slct(instruction: Instruction) -> Step:
    a, b, c = (
        reader(instruction.args[1], instruction.mods[-2]),
        reader(instruction.args[2], instruction.mods[-2]),
        reader(instruction.args[3], instruction.mods[-1]),
    )
    return lambda run: write(run, instruction.args[0], np.where(c(run) >= 0, a(run), b(run)))
