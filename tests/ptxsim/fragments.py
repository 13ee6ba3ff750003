"""8x8 matrices in a warp's registers: ldmatrix, stmatrix, movmatrix."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .accesses import locate
from .numeric import UINT
from .operands import address_of, reader, space_of, spread, write_register
from .syntax import Fault, Instruction, Reg, Vec

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def active_warps(run):
    """Indices of the warps that take part (whole warps), or None for all."""
    if run.group.everyone:
        return None
    m = run.group.mask.reshape(-1, 32)
    return np.flatnonzero(m.any(1))


def fragment(run, o, which):
    """A .b32 (or wider) register over the warps: [warps, 32]."""
    v = run.registers[o.index] if isinstance(o, Reg) else reader(o, "b32")(run)
    v = spread(run, v)
    if v.dtype.kind not in "u" and v.dtype.itemsize <= 8:
        v = v.view(UINT[8 * v.dtype.itemsize])
    v = v.reshape(-1, 32)
    return v if which is None else v[which]


def write_warps(run, o, v, which):
    """Write [warps, 32] values."""
    if which is None:
        write_register(run, o.index, np.ascontiguousarray(v).reshape(-1))
        return
    full = np.zeros((run.size // 32, 32), v.dtype)
    full[which] = v
    write_register(run, o.index, full.reshape(-1))


def op_ldmatrix(instruction: Instruction) -> Step:
    count = next((int(m[1]) for m in instruction.mods if re.fullmatch(r"x[124]", m)), None)
    if count is None or "b16" not in instruction.mods or "m8n8" not in instruction.mods:
        raise Fault("ldmatrix form not supported")
    trans = "trans" in instruction.mods
    dests = instruction.args[0].items if isinstance(instruction.args[0], Vec) else (instruction.args[0],)
    address, space = address_of(instruction.args[1]), space_of(instruction.mods)

    def execute(run: Run) -> None:
        which = active_warps(run)
        a = row_addresses(run, address(run), space, count, False)
        data = run.device.gather(a, 16).view(np.uint16).reshape(-1, count, 8, 8)  # [warp, matrix, row, column]
        for j, d in enumerate(dests):
            m = data[:, j].transpose(0, 2, 1) if trans else data[:, j]
            write_warps(run, d, np.ascontiguousarray(m).view(np.uint32).reshape(-1, 32), which)

    return execute


def row_addresses(run, address, space, count, store):
    """Arena addresses of the 8*count rows per warp that ldmatrix/stmatrix touch; the other lanes' addresses are ignored."""
    g = run.group
    if count < 4:
        run.set_group(g.mask & (run.lane < 8 * count))
    a = locate(run, address, space, 16, store)
    run.group = g
    return a


def op_stmatrix(instruction: Instruction) -> Step:
    count = next((int(m[1]) for m in instruction.mods if re.fullmatch(r"x[124]", m)), None)
    if count is None or "b16" not in instruction.mods:
        raise Fault("stmatrix form not supported")
    trans = "trans" in instruction.mods
    sources = instruction.args[1].items if isinstance(instruction.args[1], Vec) else (instruction.args[1],)
    address, space = address_of(instruction.args[0]), space_of(instruction.mods)

    def execute(run: Run) -> None:
        which = active_warps(run)
        parts = []
        for s in sources:
            m = np.ascontiguousarray(fragment(run, s, which)).view(np.uint16).reshape(-1, 8, 8)
            parts.append(m.transpose(0, 2, 1) if trans else m)
        data = np.ascontiguousarray(np.stack(parts, 1)).reshape(-1, 8).view(np.complex128).reshape(-1)
        run.device.scatter(row_addresses(run, address(run), space, count, True), data, 16)

    return execute


def op_movmatrix(instruction: Instruction) -> Step:
    def execute(run: Run) -> None:
        which = active_warps(run)
        m = (
            np.ascontiguousarray(fragment(run, instruction.args[1], which))
            .view(np.uint16)
            .reshape(-1, 8, 8)
            .transpose(0, 2, 1)
        )
        write_warps(run, instruction.args[0], np.ascontiguousarray(m).view(np.uint32).reshape(-1, 32), which)

    return execute
