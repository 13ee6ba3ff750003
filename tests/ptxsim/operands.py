"""Operands: reading them as arrays over the threads of a run, and writing registers."""

from __future__ import annotations

import re
import time

import numpy as np

from .numeric import DTYPE, SINT, UINT
from .syntax import Fault, Imm, Mem, Minus, Not, Pair, Reg, Sink, Special, Symbol

SHARED_WINDOW = 1 << 36  # generic addresses from here on are shared memory
U32, U64, F32, F64 = UINT[32], UINT[64], DTYPE["f32"], DTYPE["f64"]


def register_bits(type_):
    m = re.search(r"\d+", type_)
    if type_.endswith("x2"):
        return 32
    return int(m.group()) if m else 8


def vector_length(mods):
    return next((int(m[1]) for m in mods if m in ("v2", "v4", "v8")), 1)


def immediate(text, dtype):
    head = text[:2].lower()
    if head == "0f":
        v = np.uint32(int(text[2:], 16)).view(np.float32)
        if dtype == F32:
            return v
        return v.astype(dtype) if dtype.kind == "f" else v.view(np.uint32).astype(dtype)
    if head == "0d":
        v = np.uint64(int(text[2:], 16)).view(np.float64)
        return v if dtype == F64 else v.view(np.uint64) if dtype == U64 else v.astype(dtype)
    if dtype.kind == "f" and re.search(r"[.eE]", text) and head != "0x":
        return dtype.type(float(text))
    v = int(text.rstrip("Uu"), 0) if not re.match(r"-?0\d+$", text) else int(text, 8)
    if dtype.kind == "b":
        return np.bool_(v)
    w = dtype.itemsize * 8
    return np.array(v & ((1 << w) - 1), UINT[w]).view(dtype)[()]


def convert_width(v, dtype):
    """The low bits of v (or v zero-extended) as dtype."""
    if v.dtype == dtype:
        return v
    if v.dtype.kind == "b":
        return v.astype(dtype)
    if v.dtype.itemsize == dtype.itemsize:
        return v.view(dtype)
    if v.dtype.itemsize == 16 or dtype.itemsize == 16:
        raise Fault("128-bit value where a smaller one is expected")
    return v.view(UINT[v.dtype.itemsize * 8]).astype(UINT[dtype.itemsize * 8]).view(dtype)


def reader(o, type_):
    """Operand -> function of the Run giving an array over all threads, or a numpy scalar when uniform."""
    dt = DTYPE[type_]
    if isinstance(o, Reg):
        k = o.index

        def from_register(run):
            v = run.registers[k]
            return v if v.dtype == dt else convert_width(v, dt)

        return from_register
    if isinstance(o, Imm):
        v = immediate(o.text, dt)
        return lambda run: v
    if isinstance(o, Special):
        name = o.name
        if name.startswith(("%clock", "%globaltimer")):

            def timer(run):
                now = run.counters.thread_instructions if name.startswith("%clock") else time.time_ns()
                if name.endswith("_hi"):
                    now >>= 32
                elif dt.itemsize == 4:
                    now &= 0xFFFFFFFF
                return convert_width(np.uint64(now), dt)

            return timer

        def special(run):
            v = run.special.get(name)
            if v is None:
                raise Fault(f"special register {name} is not supported")
            return v.astype(dt) if v.dtype.kind == "b" or dt.kind == "b" else convert_width(v, dt)

        return special
    if isinstance(o, Symbol):
        return lambda run: symbol_address(run, o.name, dt)
    if isinstance(o, Mem):
        base = reader(o.base, type_)
        return lambda run: base(run) + dt.type(o.offset)
    if isinstance(o, Not):
        inner = reader(o.item, type_)
        return lambda run: ~inner(run)
    if isinstance(o, Minus):
        inner = reader(o.item, type_)
        return lambda run: -inner(run)
    if isinstance(o, Sink):
        return lambda run: dt.type(0)
    raise Fault(f"operand {o} is not supported here")


def symbol_address(run, name, dt):
    if name in run.shared_symbols:
        return dt.type(run.shared_symbols[name])
    if name in run.local_symbols:
        return (run.local_base + run.local_symbols[name]).astype(dt)
    if name in run.param_address:
        return dt.type(run.param_address[name])
    key = id(run.program.module), name
    if key in run.device.symbols:
        return dt.type(run.device.symbols[key])
    raise Fault(f"unknown symbol {name}")


def write(run, operand, values):
    """Write values (array over all threads or scalar) to a register, for the active threads."""
    if isinstance(operand, Pair):
        operand = operand.first
    if isinstance(operand, Reg):
        write_register(run, operand.index, values)
    elif not isinstance(operand, Sink):
        raise Fault(f"cannot write to {operand}")


def write_register(run, index, values):
    old = run.registers[index]
    if values.dtype.itemsize != old.dtype.itemsize:
        bits = old.dtype.itemsize * 8
        if values.dtype.kind in "iub":
            values = values.astype(SINT[bits] if values.dtype.kind == "i" else UINT[bits])
        else:
            values = convert_width(values, UINT[bits])
    elif (old.dtype.kind == "b") != (values.dtype.kind == "b"):
        values = values.astype(old.dtype)
    if not run.group.all_live:
        if old.dtype != values.dtype:
            old = old.view(values.dtype)
        values = np.where(run.group.mask, values, old)
    elif values.ndim == 0:
        values = values[()]
    run.registers[index] = values


def write_active(run, operand, values):
    """Write values (array over the active threads only)."""
    if isinstance(operand, Sink):
        return
    if run.group.everyone:
        write_register(run, operand.index, values)
        return
    old = run.registers[operand.index]
    if values.dtype.itemsize != old.dtype.itemsize:
        bits = old.dtype.itemsize * 8
        values = values.astype(SINT[bits] if values.dtype.kind == "i" else UINT[bits])
    new = np.empty(run.size, values.dtype)
    new[...] = old if old.dtype == values.dtype else old.view(values.dtype)
    new[run.group.index] = values
    run.registers[operand.index] = new


def spread(run, v):
    """v as a full contiguous array over all threads."""
    return v if v.ndim else np.full(run.size, v)


def active(run, v):
    """v for the active threads only."""
    if v.ndim == 0:
        return np.full(run.group.count, v)
    return v if run.group.everyone else v[run.group.index]


def address_of(o):
    """Memory operand -> function giving byte addresses (int64 array or scalar)."""
    base, off = o.base, o.offset
    if isinstance(base, Imm):
        v = np.int64(int(base.text, 0) + off)
        return lambda run: v
    inner = reader(base, "u64" if not isinstance(base, Reg) else f"u{max(32, register_bits(base.type))}")

    def execute(run):
        v = inner(run)
        v = v.view(np.int64) if v.dtype.itemsize == 8 else v.astype(np.int64)
        return v + off if off else v

    return execute


def space_of(mods):
    for m in mods:
        head = m.split("::")[0]
        if head in ("shared", "global", "local", "param", "const"):
            return "global" if head == "const" else head
    return None
