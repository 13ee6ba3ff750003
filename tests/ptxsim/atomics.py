"""Atomic operations."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .accesses import locate
from .arithmetic import float_ops
from .memory import WRITTEN, shift_of
from .numeric import DTYPE
from .operands import active, address_of, reader, space_of, vector_length, write_active
from .syntax import Fault, Instruction, Sink

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


ATOMIC = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def op_atom(instruction: Instruction, returns: bool = True) -> Step:
    """The threads of one address follow each other in random order; an access by float addition as well."""
    type_ = instruction.mods[-1]
    operation = next((m for m in instruction.mods if m in ATOMIC or m in ("exch", "cas", "inc", "dec")), None)
    if operation is None:
        raise Fault("atomic operation not supported")
    if vector_length(instruction.mods) > 1 or type_ == "b128":
        raise Fault("vector atomics are not supported")
    args = instruction.args if returns else (Sink(), *instruction.args)
    dest, mem, space = args[0], args[1], space_of(instruction.mods)
    operand = reader(args[2], type_)
    replacement = reader(args[3], type_) if operation == "cas" else None
    dtype = DTYPE[type_]
    width = dtype.itemsize
    combine = combination(operation, type_)
    simple_sum = isinstance(dest, Sink) and operation in ATOMIC and float_ops(type_)[0] is None
    address = address_of(mem)
    release, acquire = ("acq_rel" in instruction.mods or word in instruction.mods for word in ("release", "acquire"))

    def meet(run: Run, addresses: np.ndarray, order: np.ndarray | slice) -> None:
        if space != "shared" and run.device.checks:
            run.device.grid_races.meet(run, addresses[order], run.group.index[order], release, acquire and returns)

    def execute(run: Run) -> None:
        addresses = locate(run, address(run), space, width, True, atomic=True)
        run.counters.atomics += addresses.size
        cells = run.device.view[width].view(dtype)
        cell = addresses >> shift_of(width)
        values = active(run, operand(run))
        if simple_sum:
            order = run.device.random.permutation(cell.size) if dtype.kind == "f" else slice(None)
            ATOMIC[operation].at(cells, cell[order], values[order])
            run.device.mark(addresses, width, WRITTEN)
            meet(run, addresses, order)
            return
        others = active(run, replacement(run)) if replacement else values
        order = run.device.random.permutation(cell.size)
        order = order[np.argsort(cell[order], kind="stable")]  # by address, in random order for one address
        in_order = cell[order]
        first = np.flatnonzero(np.concatenate(([True], in_order[1:] != in_order[:-1])))
        first_of = np.repeat(first, np.diff(np.append(first, cell.size)))  # of the same address
        rank = np.arange(cell.size) - first_of  # in the row of those at one address
        old = np.empty(cell.size, dtype)
        if operation == "add" and dtype.kind in "iu" and int(rank.max()) > 2:
            added = values[order]
            before = np.cumsum(added, dtype=dtype) - added
            old[order] = cells[in_order] + (before - before[first_of])
            np.add.at(cells, cell, values)
        else:
            by_rank = order[np.argsort(rank, kind="stable")]
            for threads in np.split(by_rank, np.cumsum(np.bincount(rank))[:-1]):  # one of each address at a time
                old[threads] = cells[cell[threads]]
                cells[cell[threads]] = combine(old[threads], values[threads], others[threads])
        run.device.mark(addresses, width, WRITTEN)
        meet(run, addresses, order)
        write_active(run, dest, old)

    return execute


def combination(operation, type_):
    """new value = f(old value, operand, replacement of cas)"""
    dtype = DTYPE[type_]
    unpack, pack = float_ops(type_)
    if operation == "cas":
        return lambda old, value, other: np.where(old == value, other, old)
    if operation == "exch":
        return lambda old, value, _: value
    if operation == "inc":
        return lambda old, value, _: np.where(old >= value, dtype.type(0), old + dtype.type(1))
    if operation == "dec":
        return lambda old, value, _: np.where((old == 0) | (old > value), value, old - dtype.type(1))
    if unpack is None:
        return lambda old, value, _: ATOMIC[operation](old, value)
    return lambda old, value, _: pack(ATOMIC[operation](unpack(None, old), unpack(None, value))).view(dtype)


def op_red(instruction: Instruction) -> Step:
    if instruction.mods[0] == "async":
        raise Fault("red.async is not supported")
    return op_atom(instruction, False)
