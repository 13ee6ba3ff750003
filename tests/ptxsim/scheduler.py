"""Which threads run next. Those at the lowest program counter run until they diverge, wait or meet others.

Structured control flow reconverges by itself that way. Where threads spin, others get a turn at random.
"""

from __future__ import annotations

import numpy as np

from . import barriers, collectives
from .instructions import execute_instruction
from .operands import reader
from .run import Group, Run
from .syntax import Fault, Instruction

NEVER = 1 << 60
SPINS = 64  # backward branches while others wait, before they get a turn
PLAIN, BRANCH, EXIT, BARRIER, COLLECTIVE, TABLE = range(6)


def kind_of(instruction: Instruction) -> int:
    if instruction.op == "bra":
        return BRANCH
    if instruction.op == "brx":
        return TABLE
    if instruction.op in ("ret", "exit"):
        return EXIT
    if instruction.op in ("bar", "barrier"):
        return COLLECTIVE if instruction.mods[0] == "warp" else BARRIER
    return COLLECTIVE if instruction.op in collectives.INSTRUCTIONS else PLAIN


def execute(run: Run) -> None:
    """All threads to their end."""
    ready, counters = run.ready, run.counters
    spins = total = 0
    while True:
        if not ready:
            if run.live_count == 0:
                return
            _deadlock(run)
        if spins > SPINS:
            pc, spins = int(run.device.random.choice(list(ready))), 0
            mask, limit = ready.pop(pc), NEVER
        else:
            pc = min(ready)
            mask = ready.pop(pc)
            limit = min(ready) if ready else NEVER
        run.set_group(mask)
        steps, spins = _run_group(run, pc, limit, spins, total)
        counters.steps += steps
        total += steps


def _run_group(run: Run, pc: int, limit: int, spins: int, total: int) -> tuple[int, int]:
    """The run's group from ``pc`` until it splits, waits, ends or reaches ``limit``: instructions run, and spins."""
    code, ready, counters, group = run.code, run.ready, run.counters, run.group
    end = len(code)
    steps = 0
    while True:
        if pc >= limit:
            run.add_ready(pc, group.mask)
            return steps, spins
        if pc >= end:
            _exit(run, group.mask)
            return steps, spins
        instruction = run.instruction = code[pc]
        steps += 1
        counters.thread_instructions += group.count
        counters.warp_instructions += group.warps
        kind = instruction.kind
        active = group if instruction.pred is None else _guarded(run, group, instruction)
        if active is None:  # the predicate is false for all
            pc += 1
        elif kind == PLAIN:
            run.group = active
            try:
                execute_instruction(run, instruction)
            except Fault as fault:
                run.fault(fault, instruction)
            run.group = group
            pc += 1
        elif kind == BRANCH:
            if active is not group:
                run.add_ready(instruction.target, active.mask)
                run.add_ready(pc + 1, group.mask & ~active.mask)
                return steps, spins
            if instruction.target <= pc:
                spins += 1 if ready else 0
                if total + steps > run.device.max_steps:
                    most = run.device.max_steps
                    run.fault(Fault(f"more than {most} steps: endless loop? (Device(max_steps=...))"), instruction)
                if spins > SPINS and ready:
                    run.add_ready(instruction.target, group.mask)
                    return steps, spins
            pc = instruction.target
            if pc >= limit or limit == NEVER and ready:
                run.add_ready(pc, group.mask)
                return steps, spins
        else:
            try:
                if not _wait(run, instruction, kind, group, active, pc):
                    return steps, spins
            except Fault as fault:
                run.fault(fault, instruction)
            pc += 1


def _guarded(run: Run, group: Group, instruction: Instruction) -> Group | None:
    """The threads of the group for which the instruction's predicate holds."""
    predicate = run.registers[instruction.pred.index]
    if predicate.ndim == 0:
        return None if bool(predicate) == instruction.negate else group
    mask = ~predicate if instruction.negate else predicate
    if not group.everyone:
        mask = mask & group.mask
    count = int(np.count_nonzero(mask))
    return None if count == 0 else group if count == group.count else run.make_group(mask, count)


def _wait(run: Run, instruction: Instruction, kind: int, group: Group, active: Group, pc: int) -> bool:
    """An instruction at which threads end, wait or part. True: the whole group goes on at the next one."""
    whole = active is group
    if not whole:
        run.add_ready(pc + 1, group.mask & ~active.mask)
    if kind == EXIT:
        _exit(run, active.mask)
    elif kind == BARRIER:
        run.group = active
        barriers.arrive(run, instruction, active, pc)
    elif kind == TABLE:
        index = np.broadcast_to(reader(instruction.args[0], "u32")(run), (run.size,))
        for place in np.unique(index[active.mask]):
            run.add_ready(instruction.target[int(place)], active.mask & (index == place))
    elif collectives.meet(run, instruction, active, pc):
        if whole:
            return True
        run.add_ready(pc + 1, active.mask)
    return False


def _exit(run: Run, mask: np.ndarray) -> None:
    run.live = run.live & ~mask
    run.live_count = int(np.count_nonzero(run.live))
    run.live_per_block = np.bincount(run.block_of[run.live], minlength=run.blocks)
    for pc, waiting in run.parked.items():  # they may have waited for a thread that exits
        run.add_ready(pc, waiting)
    run.parked.clear()
    for number in list(run.barriers):
        barriers.release(run, number)


def _deadlock(run: Run) -> None:
    waits = []
    for pc, mask in run.parked.items():
        place = run.code[pc]
        waits.append(f"{int(mask.sum())} threads wait for their warp at line {place.line}: {place.text}")
    for number, barrier in run.barriers.items():
        for pc in np.unique(barrier.resume[barrier.mask]):
            place, count = run.code[int(pc) - 1], int((barrier.mask & (barrier.resume == pc)).sum())
            waits.append(f"{count} threads wait at barrier {number}, line {place.line}: {place.text}")
    fault = Fault(f"{run.function.name}: deadlock; " + "; ".join(waits))
    fault.line = 0
    raise fault
