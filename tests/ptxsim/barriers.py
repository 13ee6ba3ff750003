"""bar and barrier: threads of a block wait for each other, with numbers, counts, votes, and arrivals without waiting."""

from __future__ import annotations

from typing import Any

import numpy as np

from .operands import reader, write
from .run import Group, Run
from .syntax import Instruction


class BarrierState:
    """One barrier number, in all blocks of a run."""

    def __init__(self, run: Run) -> None:
        self.mask = np.zeros(run.size, bool)  # threads that wait
        self.resume = np.zeros(run.size, np.int64)  # the program counter where each goes on
        self.vote = np.zeros(run.size, bool)
        self.count = np.zeros(run.blocks, np.int64)  # threads that have arrived
        self.expected = np.zeros(run.blocks, np.int64)  # 0: all that live
        self.reductions: dict[int, tuple[str, Any]] = {}  # by program counter: which, and its destination


def arrive(run: Run, instruction: Instruction, active: Group, pc: int) -> None:
    args = list(instruction.args)
    reduction = destination = predicate = None
    if "red" in instruction.mods:
        reduction = next((modifier for modifier in instruction.mods if modifier in ("popc", "and", "or")), None)
    if reduction:
        destination, *args, predicate = args
    number = reader(args[0], "u32")(run)
    expected = reader(args[1], "u32")(run) if len(args) > 1 else None
    uniform = np.ndim(number) == 0
    for which in [int(number)] if uniform else [int(x) for x in np.unique(number[active.mask])]:
        mask = active.mask if uniform else active.mask & (number == which)
        barrier = run.barriers.get(which)
        if barrier is None:
            barrier = run.barriers[which] = BarrierState(run)
        barrier.count += np.bincount(run.block_of[mask], minlength=run.blocks)
        here = np.unique(run.block_of[mask])
        if expected is None:
            barrier.expected[here] = 0
        else:
            barrier.expected[here] = int(expected) if np.ndim(expected) == 0 else np.asarray(expected)[mask].max()
        if "arrive" in instruction.mods:
            run.add_ready(pc + 1, mask)
        else:
            barrier.mask = barrier.mask | mask
            barrier.resume[mask] = pc + 1
            if reduction:
                votes = np.broadcast_to(reader(predicate, "pred")(run), (run.size,))
                barrier.vote = np.where(mask, votes, barrier.vote)
                barrier.reductions[pc + 1] = (reduction, destination)
        release(run, which)


def release(run: Run, number: int) -> None:
    """Lets the blocks go on whose threads have all arrived, in new epochs."""
    barrier = run.barriers[number]
    need = np.where(barrier.expected > 0, barrier.expected, run.live_per_block)
    done = (barrier.count > 0) & (barrier.count >= need)
    if not done.any():
        return
    run.counters.barriers += int(done.sum())
    mask = barrier.mask if done.all() else barrier.mask & done[run.block_of]
    barrier.mask = barrier.mask & ~mask
    barrier.count[done] = 0
    if not mask.any():
        return
    if done.all() and mask.sum() == run.live_count:
        run.block_epoch = np.full(run.size, int(run.block_epoch.max()) + 1, np.int64)
    else:
        highest = np.zeros(run.blocks, np.int64)
        np.maximum.at(highest, run.block_of[run.live], run.block_epoch[run.live])
        run.block_epoch = np.where(mask, highest[run.block_of] + 1, run.block_epoch)
    run.warp_epoch = np.where(mask, run.warp_epoch + 1, run.warp_epoch)
    keep = run.group
    places = [int(place) for place in np.unique(barrier.resume[mask])]
    for pc in places:
        here = mask if len(places) == 1 else mask & (barrier.resume == pc)
        if pc in barrier.reductions:
            kind, destination = barrier.reductions[pc]
            votes = np.bincount(run.block_of[mask & barrier.vote], minlength=run.blocks)[run.block_of]
            total = np.bincount(run.block_of[mask], minlength=run.blocks)[run.block_of]
            run.set_group(here)
            result = {"popc": votes.astype(np.uint32), "and": votes == total, "or": votes > 0}[kind]
            write(run, destination, result)
        run.add_ready(pc, here)
    run.group = keep
