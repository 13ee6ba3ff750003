"""Instructions of a whole warp: shuffles, votes, reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .atomics import ATOMIC
from .numeric import DTYPE, bit_length
from .operands import reader, spread, write
from .syntax import Fault, Instruction, Pair

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def op_bar(instruction: Instruction) -> Step:
    def sync_warp(run):
        run.warp_epoch = run.warp_epoch + run.group.mask

    return sync_warp


op_barrier = op_bar


def op_shfl(instruction: Instruction) -> Step:
    mode = next(m for m in instruction.mods if m in ("up", "down", "bfly", "idx"))
    dest = instruction.args[0]
    d, p = (dest.first, dest.second) if isinstance(dest, Pair) else (dest, None)
    src, b, c = (
        reader(instruction.args[1], "b32"),
        reader(instruction.args[2], "u32"),
        reader(instruction.args[3], "u32"),
    )

    def execute(run: Run) -> None:
        lane = run.lane.astype(np.int64)
        bv, cv = b(run).astype(np.int64) & 31, c(run).astype(np.int64)
        seg, cl = (cv >> 8) & 31, cv & 31
        low, high = lane & seg, (lane & seg) | (cl & ~seg & 31)
        j = {"up": lane - bv, "down": lane + bv, "bfly": lane ^ bv, "idx": low | (bv & ~seg & 31)}[mode]
        ok = j >= high if mode == "up" else j <= high
        j = np.where(ok, j, lane)
        source = (run.thread_index & ~31) + j
        if not run.group.everyone and not run.group.mask[source][run.group.mask].all():
            raise Fault("shfl reads a lane that does not take part")
        v = src(run)
        write(run, d, v if v.ndim == 0 else v[source])
        if p is not None:
            write(run, p, ok)

    return execute


def warp_bits(run, flags):
    """Per warp, the bits of the active lanes whose flag is set -> array over all threads (uint32)."""
    f = (np.broadcast_to(flags, (run.size,)) & run.group.mask).reshape(-1, 32)
    bits = np.packbits(f, axis=1, bitorder="little").view(np.uint32).reshape(-1)
    return np.repeat(bits, 32)


def op_vote(instruction: Instruction) -> Step:
    mode = next(m for m in instruction.mods if m in ("ballot", "any", "all", "uni"))
    p = reader(instruction.args[1], "pred")

    def execute(run: Run) -> None:
        bits = warp_bits(run, p(run))
        if mode == "ballot":
            r = bits
        elif mode == "any":
            r = bits != 0
        else:
            everyone = warp_bits(run, np.bool_(True))
            r = bits == everyone if mode == "all" else (bits == everyone) | (bits == 0)
        write(run, instruction.args[0], r)

    return execute


def op_activemask(instruction: Instruction) -> Step:
    return lambda run: write(run, instruction.args[0], warp_bits(run, np.bool_(True)))


def op_elect(instruction: Instruction) -> Step:
    def execute(run: Run) -> None:
        bits = warp_bits(run, np.bool_(True))
        lead = bit_length(bits & (~bits + np.uint32(1))) - np.uint32(1)
        write(run, instruction.args[0].first, lead)
        write(run, instruction.args[0].second, run.lane == lead)

    return execute


def op_match(instruction: Instruction) -> Step:
    everyone = instruction.mods[0] == "all"
    dest = instruction.args[0]
    d, p = (dest.first, dest.second) if isinstance(dest, Pair) else (dest, None)
    a = reader(instruction.args[1], instruction.mods[-1])

    def execute(run: Run) -> None:
        v = spread(run, a(run)).reshape(-1, 32)
        m = run.group.mask.reshape(-1, 32)
        same = (v[:, :, None] == v[:, None, :]) & m[:, None, :]
        bits = np.packbits(same, axis=2, bitorder="little").view(np.uint32).reshape(-1)
        if everyone:
            ok = bits == warp_bits(run, np.bool_(True))
            write(run, d, np.where(ok, bits, np.uint32(0)))
            if p is not None:
                write(run, p, ok)
        else:
            write(run, d, bits)

    return execute


def op_redux(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    name = next(m for m in instruction.mods if m in ATOMIC)
    f, a, dt = ATOMIC[name], reader(instruction.args[1], type_), DTYPE[type_]
    if dt.kind == "f":
        neutral = -np.inf if name == "max" else np.inf
    else:
        info = np.iinfo(dt)
        neutral = {
            "add": 0,
            "or": 0,
            "xor": 0,
            "and": -1 if dt.kind == "i" else info.max,
            "max": info.min,
            "min": info.max,
        }[name]

    def execute(run: Run) -> None:
        v = np.where(run.group.mask, a(run), dt.type(neutral)).reshape(-1, 32)
        write(
            run,
            instruction.args[0],
            np.repeat(f.reduce(v, axis=1, dtype=dt) if name == "add" else f.reduce(v, axis=1), 32),
        )

    return execute
