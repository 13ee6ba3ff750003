"""Calls of the few external functions, traps, and instructions without an effect here."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from .loads_stores import param_size
from .operands import write
from .syntax import Fault, Instruction

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def nothing(instruction):
    return lambda run: None


op_nanosleep = nothing
op_prefetch = op_prefetchu = op_discard = op_applypriority = nothing
op_griddepcontrol = op_setmaxnreg = op_pmevent = nothing


def op_fence(instruction: Instruction) -> Step:
    """One step after another: all is in order. But the race detector wants to know of it."""
    wide = bool({"gl", "gpu", "sys"} & set(instruction.mods))

    def execute(run: Run) -> None:
        if wide and run.device.checks:
            run.device.grid_races.fence(run)

    return execute


op_membar = op_fence


def op_createpolicy(instruction: Instruction) -> Step:
    return lambda run: write(run, instruction.args[0], np.uint64(0))


def op_trap(instruction: Instruction) -> Step:
    def execute(run: Run) -> None:
        raise Fault("trap")

    return execute


op_brkpt = op_trap


def op_call(instruction: Instruction) -> Step:
    """The external functions that assert() and printf() call; all others are inlined (see program.py)."""
    name, returned, given = instruction.args
    if name not in ("__assertfail", "vprintf"):

        def unknown(run):
            raise Fault(f"call of external function {name}")

        return unknown

    def execute(run: Run) -> None:
        if name == "__assertfail":
            thread = run.group.index[0]
            text, file = (string_at(run, parameter(run, given[place], thread, np.uint64)) for place in (0, 1))
            line = parameter(run, given[2], thread, np.uint32)
            raise Fault(f"assertion failed: {text} ({file}:{line})")
        for thread in run.group.index:
            text = string_at(run, parameter(run, given[0], thread, np.uint64))
            run.device.printed.append(formatted(run, text, parameter(run, given[1], thread, np.uint64)))
        for result in returned:
            run.call_params[result.name] = np.zeros((run.size, param_size(run, result.name)), np.uint8)

    return execute


def parameter(run, symbol, thread, dtype):
    """A thread's argument of the call."""
    raw = run.call_params[symbol.name][thread, : np.dtype(dtype).itemsize]
    return int(raw.copy().view(dtype)[0])


def string_at(run, address):
    memory, end = run.device.memory, address
    while memory[end]:
        end += 1
    return memory[address:end].tobytes().decode("latin1")


def formatted(run, text, arguments):
    """printf's text; its arguments lie at an address, each aligned to its size."""
    offset = 0

    def conversion(match):
        nonlocal offset
        given = match.group(0)
        kind = given[-1]
        size = 8 if "l" in given or kind in "feEgGsp" else 4
        offset = -(-offset // size) * size
        raw = run.device.memory[arguments + offset : arguments + offset + size].tobytes()
        offset += size
        plain = re.sub("[lhz]", "", given)
        if kind in "feEgG":
            return plain % struct.unpack("<d", raw)[0]
        number = int.from_bytes(raw, "little", signed=kind in "di")
        if kind == "s":
            return string_at(run, number)
        return hex(number) if kind == "p" else plain.replace("u", "d") % number

    return re.sub(r"%[-+ #0-9.]*[lhz]*[diuxXfeEgGscp]", conversion, text)
