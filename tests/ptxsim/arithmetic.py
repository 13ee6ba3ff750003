"""Arithmetic on integers and floats, in any of PTX's types."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .numeric import DTYPE, SINT, UINT, bf16_to_f32, f32_to_bf16, f64_to_f32, flush, mul_hi
from .operands import F64, reader, spread, write, write_register
from .syntax import Instruction, Reg

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def float_ops(type_):
    """(unpack, pack) between register images and the float arrays that arithmetic is done on."""
    if type_ == "f16":
        return lambda run, v: v.astype(np.float32), lambda x: x.astype(np.float16)
    if type_ == "bf16":
        return lambda run, v: bf16_to_f32(v), f32_to_bf16
    if type_ == "f16x2":
        return (
            lambda run, v: np.ascontiguousarray(spread(run, v)).view(np.float16).astype(np.float32),
            lambda x: x.astype(np.float16).view(np.uint32),
        )
    if type_ == "bf16x2":
        return lambda run, v: bf16_to_f32(np.ascontiguousarray(spread(run, v)).view(np.uint16)), lambda x: f32_to_bf16(
            x
        ).view(np.uint32)
    return None, None


def elementwise(instruction, func, nargs=None, type_=None):
    """dest = func(sources) in the instruction's type, with .ftz, .sat and the narrow float types."""
    type_ = type_ or next(m for m in reversed(instruction.mods) if m in DTYPE)
    dest, dt = instruction.args[0], DTYPE[type_]
    src = [reader(a, type_) for a in instruction.args[1 : (nargs + 1 if nargs else None)]]
    unpack, pack = float_ops(type_)
    ftz, sat = "ftz" in instruction.mods and type_ == "f32", "sat" in instruction.mods
    relu = "relu" in instruction.mods
    if unpack is None and not ftz and not sat:
        if len(src) == 2 and isinstance(dest, Reg):
            a, b = src
            k = dest.index

            def two(run):
                write_register(run, k, func(a(run), b(run)))

            return two

        def simple(run):
            write(run, dest, func(*[s(run) for s in src]))

        return simple

    def general(run):
        v = [s(run) for s in src]
        if unpack is not None:
            v = [unpack(run, x) for x in v]
        elif ftz:
            v = [flush(x) for x in v]
        r = func(*v)
        if sat and dt.kind == "f":
            r = np.where(np.isnan(r), dt.type(0), np.clip(r, 0, 1)).astype(r.dtype)
        elif sat and dt.kind == "i":
            wide = (
                (v[0].astype(np.int64) + v[1].astype(np.int64))
                if instruction.op == "add"
                else (v[0].astype(np.int64) - v[1].astype(np.int64))
            )
            r = np.clip(wide, np.iinfo(dt).min, np.iinfo(dt).max).astype(dt)
        if relu:
            r = np.maximum(r, 0).astype(r.dtype)
        write(run, dest, pack(r) if pack else flush(r) if ftz else r)

    return general


def fused(a, b, c):
    """a*b + c with one rounding as far as float64 can tell (float32 and narrower)."""
    if a.dtype == F64:
        return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float64)
    r = np.multiply(a, b, dtype=np.float64)
    r += c
    return r.astype(np.float32)


def directed(instruction, exact):
    """Wrap a float operation for .rz/.rm/.rp (float32 only, through float64)."""
    mode = next((m for m in instruction.mods if m in ("rz", "rm", "rp")), None)
    if mode is None or instruction.mods[-1] != "f32":
        return None
    return lambda *v: f64_to_f32(exact(*[x.astype(np.float64) for x in v]), mode)


def op_add(instruction: Instruction) -> Step:
    if "cc" in instruction.mods:
        return carry_op(instruction)
    return elementwise(instruction, directed(instruction, np.add) or np.add)


def op_sub(instruction: Instruction) -> Step:
    if "cc" in instruction.mods:
        return carry_op(instruction)
    return elementwise(instruction, directed(instruction, np.subtract) or np.subtract)


def carry_op(instruction: Instruction) -> Step:
    """add.cc, addc, sub.cc, subc, and mad.lo.cc/madc for 32 and 64 bits."""
    type_ = instruction.mods[-1]
    unsigned = "u" + type_[1:]
    src = [reader(a, unsigned) for a in instruction.args[1:]]
    use, sub, mad = instruction.op.endswith("c"), instruction.op.startswith("sub"), instruction.op.startswith("mad")
    one = DTYPE[unsigned].type(1)

    def execute(run: Run) -> None:
        v = [s(run) for s in src]
        if mad:
            v = [mul_hi(v[0], v[1]) if "hi" in instruction.mods else v[0] * v[1], v[2]]
        a, b = v
        c = (np.asarray(run.carry) * one).astype(DTYPE[unsigned]) if use else one * DTYPE[unsigned].type(0)
        if sub:
            r = a - b - c
            over = (a < b) | ((a == b) & (c != 0))
        else:
            r = a + b + c
            over = (r < a) | ((r == a) & (c != 0) & (b != 0))
        write(run, instruction.args[0], np.asarray(r))
        if "cc" in instruction.mods:
            run.carry = np.where(run.group.mask, over, run.carry)

    return execute


op_addc = op_subc = op_madc = carry_op


def op_mul(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    dt = DTYPE[type_]
    if dt.kind == "f" or type_ in ("bf16", "bf16x2", "f16x2"):
        return elementwise(instruction, directed(instruction, np.multiply) or np.multiply)
    return elementwise(instruction, product(instruction))


def product(instruction):
    dt = DTYPE[instruction.mods[-1]]
    if "wide" in instruction.mods:
        wide = (SINT if dt.kind == "i" else UINT)[dt.itemsize * 16]
        return lambda a, b: np.multiply(a, b, dtype=wide)
    if "hi" in instruction.mods:
        return mul_hi
    return np.multiply


def op_mad(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    if "cc" in instruction.mods:
        return carry_op(instruction)
    if DTYPE[type_].kind == "f":
        return op_fma(instruction)
    mult = product(instruction)
    dt = DTYPE[type_]
    third = reader(instruction.args[3], type_[0] + str(dt.itemsize * 16) if "wide" in instruction.mods else type_)
    a, b = reader(instruction.args[1], type_), reader(instruction.args[2], type_)
    return lambda run: write(run, instruction.args[0], np.asarray(mult(a(run), b(run)) + third(run)))


def op_mul24(instruction: Instruction) -> Step:
    return elementwise(
        instruction, lambda a, b: ((a.astype(np.int64) & 0xFFFFFF) * (b.astype(np.int64) & 0xFFFFFF)).astype(np.uint32)
    )


def op_fma(instruction: Instruction) -> Step:
    return elementwise(instruction, directed(instruction, lambda a, b, c: a * b + c) or fused)


def int_divide(a, b):
    if a.dtype.kind == "u":
        return np.floor_divide(a, b)
    q = np.floor_divide(a, b)
    return q + ((q * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def op_div(instruction: Instruction) -> Step:
    if DTYPE[instruction.mods[-1]].kind == "f":
        return elementwise(instruction, directed(instruction, np.divide) or np.divide)
    return elementwise(instruction, int_divide)


def op_rem(instruction: Instruction) -> Step:
    return elementwise(instruction, np.fmod)


def op_sad(instruction: Instruction) -> Step:
    return elementwise(instruction, lambda a, b, c: np.where(a > b, a - b, b - a) + c)


def op_min(instruction: Instruction) -> Step:
    return elementwise(instruction, three(np.minimum if "NaN" in instruction.mods else np.fmin, instruction))


def op_max(instruction: Instruction) -> Step:
    return elementwise(instruction, three(np.maximum if "NaN" in instruction.mods else np.fmax, instruction))


def three(f, instruction):
    if "abs" in instruction.mods:
        return lambda a, b: np.copysign(f(np.abs(a), np.abs(b)), a * b)
    return (lambda a, b, c: f(f(a, b), c)) if len(instruction.args) == 4 else f


def op_neg(instruction: Instruction) -> Step:
    return elementwise(instruction, np.negative)


def op_abs(instruction: Instruction) -> Step:
    return elementwise(instruction, np.abs)


def op_copysign(instruction: Instruction) -> Step:
    return elementwise(instruction, lambda a, b: np.copysign(b, a))


def op_testp(instruction: Instruction) -> Step:
    kind = instruction.mods[0]
    f = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "notanumber": np.isnan,
        "number": lambda x: ~np.isnan(x),
        "normal": lambda x: np.isfinite(x) & (np.abs(x) >= np.finfo(x.dtype).tiny),
        "subnormal": lambda x: (np.abs(x) < np.finfo(x.dtype).tiny) & (x != 0),
    }[kind]
    return elementwise(instruction, f)


def unary(f, f64=None):
    return lambda instruction: elementwise(instruction, f)


op_ex2, op_lg2, op_tanh, op_sin, op_cos = (unary(f) for f in (np.exp2, np.log2, np.tanh, np.sin, np.cos))


op_rcp = unary(lambda x: x.dtype.type(1) / x)


op_sqrt = unary(np.sqrt)


op_rsqrt = unary(lambda x: (1.0 / np.sqrt(x.astype(np.float64))).astype(x.dtype))
