"""Loads and stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .accesses import locate
from .numeric import DTYPE, UINT
from .operands import active, address_of, reader, space_of, spread, vector_length, write, write_active
from .syntax import Fault, Instruction, Sink, Symbol, Vec

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def op_ld(instruction: Instruction) -> Step:
    type_, n = instruction.mods[-1], vector_length(instruction.mods)
    dt = DTYPE[type_] if type_ != "pred" else UINT[8]
    width = dt.itemsize * n
    space = space_of(instruction.mods)
    mem = instruction.args[1]
    dests = instruction.args[0].items if isinstance(instruction.args[0], Vec) else (instruction.args[0],)
    if space == "param" and isinstance(mem.base, Symbol):
        return load_parameter(instruction, dests, mem, dt)
    if space == "param":
        space = "global"
    quiet = "param" in instruction.mods or "const" in instruction.mods
    address = address_of(mem)
    piece = UINT[dt.itemsize * 8]
    acquire = "acquire" in instruction.mods
    volatile = acquire or "volatile" in instruction.mods or "relaxed" in instruction.mods

    def execute(run: Run) -> None:
        a = locate(run, address(run), space, min(width, 16), False, quiet=quiet, volatile=volatile)
        if volatile and space != "shared" and run.device.checks:
            run.device.grid_races.meet(run, a, run.group.index, False, acquire, changes=False)
        if n == 1:
            v = run.device.gather(a, width)
            write_active(run, dests[0], v.view(dt) if dt.itemsize < 16 else v)
            return
        parts = [run.device.gather(a + 16 * h, min(width, 16)) for h in range(-(-width // 16))]
        if width > 16:
            locate(run, address(run) + 16, space, 16, False)
        per = n // len(parts)
        for h, v in enumerate(parts):
            m = v.view(piece).reshape(-1, per)
            for j in range(per):
                d = dests[h * per + j]
                if not isinstance(d, Sink):
                    write_active(run, d, np.ascontiguousarray(m[:, j]).view(dt))

    return execute


op_ldu = op_ld


def load_parameter(instruction, dests, mem, dt):
    name, offset, w = mem.base.name, mem.offset, dt.itemsize

    def execute(run: Run) -> None:
        data = run.params.get(name)
        if data is not None:
            if offset + w * len(dests) > len(data):
                raise Fault(f"parameter {name} read past its end")
            for j, d in enumerate(dests):
                write(run, d, np.frombuffer(data, dt, 1, offset + j * w)[0])
            return
        store = run.call_params.get(name)
        if store is None:
            raise Fault(f"parameter {name} is read before it is written")
        for j, d in enumerate(dests):
            raw = np.ascontiguousarray(store[:, offset + j * w : offset + (j + 1) * w])
            write(run, d, raw.view(dt).reshape(-1))

    return execute


def param_size(run, name):
    for _, _, n, size in run.program.variables:
        if n == name:
            return size
    return 64


def op_st(instruction: Instruction) -> Step:
    type_, n = instruction.mods[-1], vector_length(instruction.mods)
    dt = DTYPE[type_]
    width = dt.itemsize * n
    space = space_of(instruction.mods)
    mem = instruction.args[0]
    src = [
        reader(x, f"b{dt.itemsize * 8}")
        for x in (instruction.args[1].items if isinstance(instruction.args[1], Vec) else (instruction.args[1],))
    ]
    if space == "param":
        name, offset, w = mem.base.name, mem.offset, dt.itemsize

        def to_parameter(run):
            store = run.call_params.get(name)
            if store is None:
                store = run.call_params[name] = np.zeros((run.size, param_size(run, name)), np.uint8)
            for j, s in enumerate(src):
                v = np.ascontiguousarray(spread(run, s(run))).view(np.uint8).reshape(run.size, w)
                store[run.group.mask, offset + j * w : offset + (j + 1) * w] = v[run.group.mask]

        return to_parameter
    address = address_of(mem)

    def execute(run: Run) -> None:
        a = locate(run, address(run), space, min(width, 16), True)
        if n == 1:
            run.device.scatter(a, active(run, src[0](run)), width)
            return
        halves = -(-width // 16)
        per = n // halves
        for h in range(halves):
            m = np.empty((a.size, per), UINT[dt.itemsize * 8])
            for j in range(per):
                v = src[h * per + j](run)
                m[:, j] = v if v.ndim == 0 or run.group.everyone else v[run.group.index]
            if h:
                locate(run, address(run) + 16 * h, space, 16, True)
            run.device.scatter(a + 16 * h, m.view(UINT[8 * min(width, 16)]).reshape(-1), min(width, 16))

    return execute
