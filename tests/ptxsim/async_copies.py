"""cp.async: copies from global to shared memory that end at a wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .accesses import locate
from .memory import ALLOCATED, WRITTEN
from .operands import active, address_of, reader, spread
from .syntax import Fault, Instruction, Not, Reg

if TYPE_CHECKING:
    from .syntax import Step


POISON = 0xFF


class Copy(NamedTuple):
    """One cp.async of some threads, under way."""

    threads: np.ndarray
    target: np.ndarray
    source: np.ndarray
    size: int
    count: np.ndarray | None  # bytes that are read, the rest is zero; None: all
    group: np.ndarray  # each thread's number of commits before it


def op_cp(instruction: Instruction) -> Step:
    """cp.async: the target is poisoned until the wait; the bytes are copied at the wait, the latest moment allowed."""
    mods = instruction.mods
    if "bulk" in mods or "reduce" in mods:
        raise Fault("cp.async.bulk and TMA are not supported")
    if "mbarrier" in mods:
        raise Fault("mbarrier is not supported")
    if "commit_group" in mods:
        return commit
    if "wait_group" in mods or "wait_all" in mods:
        pending = int(instruction.args[0].text) if "wait_group" in mods else -1
        return lambda run: wait(run, pending)
    args = instruction.args
    if any(modifier.endswith("cache_hint") for modifier in mods) and len(args) == 4:
        args = args[:3]  # the last one is a policy of the cache
    target, source = address_of(args[0]), address_of(args[1])
    size = int(args[2].text, 0)
    extra = args[3] if len(args) > 3 else None
    ignore = isinstance(extra, Not) or isinstance(extra, Reg) and extra.type == "pred"  # a predicate: read nothing
    amount = None if extra is None else reader(extra, "pred" if ignore else "u32")

    def copy(run):
        group = run.group
        targets = locate(run, target(run), "shared", size, True)
        from_address = np.asarray(source(run))
        count = None
        if amount is not None:
            given = active(run, amount(run))
            count = np.where(given, 0, size) if ignore else np.minimum(given.astype(np.int64), size)
            if (count == size).all():
                count = None
        if count is None:
            sources = locate(run, from_address, "global", size, False)
        else:
            sources = active(run, from_address.astype(np.int64))
            if (sources[count > 0] & (size - 1)).any():
                raise Fault(f"misaligned {size}-byte cp.async")
            for part in np.unique(count[count > 0]):  # only the bytes that are read are checked and counted
                reading = np.zeros(run.size, bool)
                reading[group.index[count == part]] = True
                run.set_group(reading)
                begin, width = spread(run, from_address), 1 << (int(part).bit_length() - 1)
                locate(run, begin, "global", width, False)
                for offset in range(width, int(part)):  # of the same request
                    locate(run, begin + offset, "global", 1, False, quiet=True)
                run.group = group
        poison(run, targets, size)
        run.copies.append(Copy(group.index, targets, sources, size, count, run.copy_group[group.index]))

    return copy


def commit(run):
    run.copy_group = run.copy_group + run.group.mask


def poison(run, targets, size):
    memory = run.device.memory
    for offset in range(size):
        memory[targets + offset] = POISON
    run.device.mark(targets, size, ALLOCATED)


def wait(run, pending):
    """Ends the active threads' copies but the ``pending`` latest groups; all for -1."""
    keep = []
    active_threads, groups = run.group.mask, run.copy_group
    for copy in run.copies:
        due = active_threads[copy.threads]
        if pending >= 0:
            due = due & (copy.group < groups[copy.threads] - pending)
        if not due.all():
            keep.append(select(copy, ~due) if due.any() else copy)
        if due.any():
            finish(run, copy if due.all() else select(copy, due))
    run.copies = keep


def select(copy, threads):
    """The copies of some of the threads."""
    return Copy(*(field[threads] if isinstance(field, np.ndarray) else field for field in copy))


def finish(run, copy):
    memory = run.device.memory
    if copy.count is None:
        run.device.scatter(copy.target, run.device.gather(copy.source, copy.size), copy.size)
    else:
        for offset in range(copy.size):
            read = offset < copy.count
            memory[copy.target + offset] = np.where(read, memory[np.where(read, copy.source + offset, 0)], 0)
        run.device.mark(copy.target, copy.size, WRITTEN)
    if run.device.checks:
        run.races.check(copy.target, copy.size, copy.threads, True)
