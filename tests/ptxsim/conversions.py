"""Moves, packing and unpacking, conversions between types and address spaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .numeric import (
    DTYPE,
    UINT,
    bf16_to_f32,
    f32_to_bf16,
    f32_to_f16,
    f32_to_tf32,
    f64_to_f32,
    float_to_int,
    flush,
    round_int,
)
from .operands import F32, F64, SHARED_WINDOW, reader, register_bits, space_of, spread, write
from .syntax import Fault, Instruction, Sink, Vec

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def op_mov(instruction: Instruction) -> Step:
    type_, dest, src = instruction.mods[-1], instruction.args[0], instruction.args[1]
    if isinstance(src, Vec):
        n = len(src.items)
        bits = register_bits(type_)
        if bits == 128:
            parts = [reader(x, f"b{bits // n}") for x in src.items]

            def pack128(run):
                m = np.stack([spread(run, p(run)) for p in parts], 1)
                write(run, dest, np.ascontiguousarray(m).view(np.complex128).reshape(-1))

            return pack128
        parts, dt = [reader(x, f"b{bits // n}") for x in src.items], UINT[bits]

        def pack(run):
            r = parts[0](run).astype(dt)
            for j in range(1, n):
                r = r | (parts[j](run).astype(dt) << dt.type(j * (bits // n)))
            write(run, dest, r)

        return pack
    if isinstance(dest, Vec):
        n = len(dest.items)
        bits = register_bits(type_)
        if bits == 128:
            get128 = reader(src, "b128")

            def unpack128(run):
                m = np.ascontiguousarray(spread(run, get128(run))).view(UINT[128 // n]).reshape(-1, n)
                for j, d in enumerate(dest.items):
                    write(run, d, np.ascontiguousarray(m[:, j]))

            return unpack128
        get, dt, small = reader(src, f"b{bits}"), UINT[bits], UINT[bits // n]

        def unpack(run):
            v = get(run)
            for j, d in enumerate(dest.items):
                if not isinstance(d, Sink):
                    write(run, d, (v >> dt.type(j * (bits // n))).astype(small))

        return unpack
    get = reader(src, type_)
    return lambda run: write(run, dest, get(run))


def op_cvta(instruction: Instruction) -> Step:
    get = reader(instruction.args[1], "u" + instruction.mods[-1][1:])
    shared = space_of(instruction.mods) == "shared"
    sign = -1 if "to" in instruction.mods else 1

    def execute(run: Run) -> None:
        v = get(run)
        if shared:
            v = v.astype(np.uint64)
            v = v + np.uint64(SHARED_WINDOW) if sign > 0 else v - np.uint64(SHARED_WINDOW)
        write(run, instruction.args[0], v)

    return execute


def op_isspacep(instruction: Instruction) -> Step:
    get, space = reader(instruction.args[1], "u64"), space_of(instruction.mods)
    return lambda run: write(run, instruction.args[0], (get(run) >= np.uint64(SHARED_WINDOW)) == (space == "shared"))


def narrow_from_f32(type_, mode, relu):
    """float32 -> the 16 bits of f16 or bf16."""

    def narrow(x):
        if relu:
            x = np.where(np.isnan(x), x, np.maximum(x, 0)).astype(np.float32)
        return f32_to_bf16(x, mode) if type_.startswith("bf16") else np.asarray(f32_to_f16(x, mode)).view(np.uint16)

    return narrow


def op_cvt(instruction: Instruction) -> Step:
    mods = instruction.mods
    to, frm = mods[-2], mods[-1]
    flags = mods[:-2]
    dest = instruction.args[0]
    if mods[0] == "pack":
        raise Fault("cvt.pack is not supported")
    rnd = next((m for m in flags if m in ("rn", "rz", "rm", "rp", "rna")), "rn")
    rint = next((m for m in flags if m in ("rni", "rzi", "rmi", "rpi")), None)
    relu, sat, ftz = "relu" in flags, "sat" in flags, "ftz" in flags
    if to in ("bf16x2", "f16x2") and frm == "f32":
        hi, lo, f = (
            reader(instruction.args[1], "f32"),
            reader(instruction.args[2], "f32"),
            narrow_from_f32(to, rnd, relu),
        )
        sh = np.uint32(16)
        return lambda run: write(run, dest, (f(hi(run)).astype(np.uint32) << sh) | f(lo(run)).astype(np.uint32))
    if to == "tf32":
        get = reader(instruction.args[1], "f32")
        return lambda run: write(run, dest, f32_to_tf32(get(run), rnd))
    get = reader(instruction.args[1], frm)
    if any(x.startswith(("e4m3", "e5m2", "e2m", "ue8")) for x in (to, frm)):
        raise Fault("8-bit floating point is not supported")
    out = DTYPE[to]
    src_float = frm in ("f16", "bf16", "f32", "f64")
    dst_float = to in ("f16", "bf16", "f32", "f64")

    def execute(run: Run) -> None:
        v = get(run)
        if frm == "bf16":
            v = bf16_to_f32(v)
        if ftz and v.dtype == F32:
            v = flush(v)
        if src_float and not dst_float:
            r = float_to_int(v, out, rint or "rzi")
        elif src_float:
            if rint:
                v = round_int(v, rint).astype(v.dtype)
            if sat:
                v = np.where(np.isnan(v), 0, np.clip(v, 0, 1)).astype(v.dtype)
            if relu:
                v = np.where(np.isnan(v), v, np.maximum(v, 0)).astype(v.dtype)
            if to == "bf16":
                r = f32_to_bf16(v.astype(np.float32), rnd)
            elif to == "f16":
                r = np.asarray(f32_to_f16(v, rnd))
            elif to == "f32" and v.dtype == F64:
                r = f64_to_f32(v, rnd)
            else:
                r = v.astype(out)
            if ftz and to == "f32":
                r = flush(r)
        elif dst_float:
            if to == "f32":
                r = v.astype(np.float32) if rnd == "rn" else f64_to_f32(v.astype(np.float64), rnd)
            elif to == "bf16":
                r = f32_to_bf16(v.astype(np.float32), rnd)
            else:
                r = v.astype(out)
        elif sat:
            i = np.iinfo(out)
            lo, hi = max(int(np.iinfo(v.dtype).min), int(i.min)), min(int(np.iinfo(v.dtype).max), int(i.max))
            r = np.clip(v, v.dtype.type(lo), v.dtype.type(hi)).astype(out)
        else:
            r = v.astype(out)
        write(run, dest, np.asarray(r))

    return execute
