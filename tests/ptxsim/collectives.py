"""Where the lanes of a warp meet: an instruction of the whole warp runs once all its lanes are there."""

from __future__ import annotations

from typing import Any

import numpy as np

from .instructions import execute_instruction
from .operands import reader
from .run import Group, Run
from .syntax import Fault, Instruction

FULL_WARP = {"mma", "ldmatrix", "stmatrix", "movmatrix"}  # without a member mask: all 32 lanes
INSTRUCTIONS = FULL_WARP | {"shfl", "vote", "redux", "activemask", "match", "elect"}
ALL_LANES = np.uint32(0xFFFFFFFF)


def _whole_warps(mask: np.ndarray) -> bool:
    lanes = np.count_nonzero(mask.reshape(-1, 32), axis=1)
    return bool(((lanes == 0) | (lanes == 32)).all())


def _operand(instruction: Instruction) -> Any:
    """The one that holds the member mask."""
    return instruction.args[0] if instruction.op in ("bar", "barrier") else instruction.args[-1]


def _member_mask(run: Run, instruction: Instruction) -> Any:
    """The lanes that take part, over all threads or one for all; None: those that are there."""
    if instruction.op in FULL_WARP:
        return ALL_LANES
    if instruction.op == "activemask":
        return None
    return reader(_operand(instruction), "u32")(run)


def meet(run: Run, instruction: Instruction, active: Group, pc: int) -> bool:
    """Runs it for the warps whose members are all here; parks the rest. True: all of ``active`` went on."""
    members = _member_mask(run, instruction)
    parked = run.parked.pop(pc, None)
    keep = run.group
    all_lanes = members is None or np.ndim(members) == 0 and int(members) == ALL_LANES
    if parked is None and all_lanes and (members is None or active.everyone or _whole_warps(active.mask)):
        run.group = active
        execute_instruction(run, instruction)
        run.group = keep
        return True
    here = active.mask if parked is None else active.mask | parked
    lane = run.lane.astype(np.uint64)
    bit = np.uint64(1) << lane
    present = (here * bit).reshape(-1, 32).sum(1).astype(np.uint64)
    exited = (~run.live * bit).reshape(-1, 32).sum(1).astype(np.uint64)
    run.set_group(here)
    if instruction.op in FULL_WARP:
        needed = np.broadcast_to(ALL_LANES, (run.size,)).astype(np.uint64)
    else:  # read anew: the parked threads' masks count too
        members = np.asarray(reader(_operand(instruction), "u32")(run))
        needed = np.broadcast_to(members, (run.size,)).astype(np.uint64)
        if not ((needed >> lane) & np.uint64(1))[here].all():
            raise Fault("a lane executes a collective whose member mask leaves it out")
    needed = needed & ~exited[run.warp_of]
    complete = here & ((present[run.warp_of] & needed) == needed)
    waiting = here & ~complete
    if waiting.any():
        run.parked[pc] = waiting
    if complete.any():
        run.set_group(complete)
        execute_instruction(run, instruction)
        run.add_ready(pc + 1, complete)
    run.group = keep
    return False
