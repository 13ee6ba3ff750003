"""Each access to memory: checked, then counted, for the threads that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import LOWEST_ADDRESS, NONE, WRITTEN, repeated, shift_of
from .numeric import UINT
from .operands import SHARED_WINDOW
from .syntax import Fault

if TYPE_CHECKING:
    from .run import Group, Run


def locate(
    run: Run,
    address: Any,
    space: str | None,
    width: int,
    store: bool,
    atomic: bool = False,
    quiet: bool = False,
    volatile: bool = False,
) -> np.ndarray:
    """Addresses in the device's memory of one access of ``width`` bytes by each active thread.

    ``address``: over all threads, or one for all. ``space`` None: a generic address. ``quiet``: checked, not counted.
    ``volatile``: may meet other blocks' accesses, as an atomic one.
    """
    group = run.group
    if np.ndim(address) == 0:
        addresses = np.full(group.count, int(address), np.int64)
    else:
        addresses = address if address.dtype == np.int64 else address.astype(np.int64)
        if not group.everyone:
            addresses = addresses[group.index]
    if width > 1 and (addresses & (width - 1)).any():
        bad = int(addresses[np.flatnonzero(addresses & (width - 1))[0]])
        raise Fault(f"misaligned {width}-byte access at {bad:#x}")
    threads = run.thread_index if group.everyone else group.index
    if space == "shared":
        return _shared_access(run, addresses, width, store, threads, atomic, quiet)
    if space is None:
        shared = addresses >= SHARED_WINDOW
        if shared.all():
            return _shared_access(run, addresses - SHARED_WINDOW, width, store, threads, atomic, quiet)
        if shared.any():
            out = np.empty_like(addresses)
            inside = addresses[shared] - SHARED_WINDOW
            out[shared] = _shared_access(run, inside, width, store, threads[shared], atomic, quiet)
            mine = addresses[~shared], width, store, threads[~shared], None
            out[~shared] = _global_access(run, *mine, quiet, atomic or volatile)
            return out
    if space == "local":
        run.counters.local_bytes += width * group.count
        return addresses
    return _global_access(run, addresses, width, store, None, group, quiet, atomic or volatile)


def _global_access(
    run: Run,
    addresses: np.ndarray,
    width: int,
    store: bool,
    threads: np.ndarray | None,
    group: Group | None,
    quiet: bool,
    meets: bool,
) -> np.ndarray:
    """An access of a whole group, or of the given threads of it."""
    device, counters = run.device, run.counters
    low, high = int(addresses.min()), int(addresses.max())
    if low < LOWEST_ADDRESS or high + width > device.memory.size:
        wild = low if low < LOWEST_ADDRESS else high
        raise Fault(f"{'store to' if store else 'load from'} wild address {wild:#x}")
    _check_state(run, addresses, width, store, "")
    if quiet:
        return addresses
    if device.checks:
        device.grid_races.access(run, addresses, width, group.index if threads is None else threads, store, meets)
    sector = addresses >> 5
    run.touched[int(store)][sector] = True
    key = sector + (group.warp_key if group is not None else (threads >> 5) << 40)  # warp and sector: one request each
    step = np.diff(key)
    if step.size and int(step.min()) < 0:
        key.sort()
        step = np.diff(key)
    new = step != 0
    sectors = 1 + int(np.count_nonzero(new))
    owner = np.searchsorted(device.array_starts, (low >> 5, high >> 5), "right")
    if owner[0] == owner[1]:
        device.array_sectors[int(store), owner[0]] += sectors
    else:  # one instruction touches several arrays
        once = key[np.concatenate(([True], new))] & ((1 << 40) - 1)
        owners = np.searchsorted(device.array_starts, once, "right")
        device.array_sectors[int(store)] += np.bincount(owners, minlength=device.array_sectors.shape[1])
    requests = group.warps if group is not None else len(np.unique(threads >> 5))
    if store:
        counters.global_write_bytes += width * addresses.size
        counters.global_write_requests += requests
        counters.global_write_sectors += sectors
    else:
        counters.global_read_bytes += width * addresses.size
        counters.global_read_requests += requests
        counters.global_read_sectors += sectors
    return addresses


def _check_state(run: Run, addresses: np.ndarray, width: int, store: bool, where: str) -> None:
    """Fault for bytes that belong to nobody; loads of bytes that nothing has written are counted."""
    states = run.device.state_view
    unit = min(width, 8)
    found = states[unit][addresses >> shift_of(unit)]
    if width == 16:
        found = found & states[8][(addresses >> 3) + 1]
    written = found == UINT[8 * unit].type(repeated(WRITTEN, unit))
    if written.all():
        return
    rest = addresses[~written]
    outside = (run.device.state[(rest[:, None] + np.arange(width))] == NONE).any(1)
    if outside.any():
        bad, what = rest[outside], "store" if store else "load"
        raise Fault(f"out-of-bounds {what} of {width} bytes at {where}{int(bad[0]):#x}, {len(bad)} threads")
    if not store:
        run.counters.uninitialised_loads += len(rest)


def _shared_access(
    run: Run, offsets: np.ndarray, width: int, store: bool, threads: np.ndarray, atomic: bool, quiet: bool
) -> np.ndarray:
    offsets = offsets & 0xFFFFFFFF
    high = int(offsets.max())
    if high + width > run.shared_bytes:
        what = "store" if store else "load"
        size = run.shared_bytes
        raise Fault(f"out-of-bounds shared {what} of {width} bytes at shared+{high}; the block has {size} bytes")
    addresses = offsets + run.shared_base[threads]
    if not store:
        _check_state(run, addresses, width, store, "shared ")
    if run.device.checks and not quiet:
        _count_wavefronts(run, addresses, width, threads, store)
        run.races.check(addresses, width, threads, store, atomic)
    return addresses


def _count_wavefronts(run: Run, addresses: np.ndarray, width: int, threads: np.ndarray, store: bool) -> None:
    """Bank conflicts: words of 4 bytes in 32 banks; half warps serve an access of 8 bytes, quarter warps one of 16."""
    unit = max(4, width)
    shift, banks = shift_of(unit), 128 // unit
    word = addresses >> shift
    row = threads >> (7 - shift)  # the threads that are served together
    first_row = int(row.min())
    rows = int(row.max()) - first_row + 1
    slot = (row - first_row) * banks + (word & (banks - 1))
    owner = np.zeros(rows * banks, np.int64)
    owner[slot] = word
    if row.size == rows * banks:
        ideal = rows
        requests = -(-rows * 4 // unit)
    else:
        ideal = int(np.count_nonzero(owner.reshape(rows, banks).any(1)))
        requests = len(np.unique(threads >> 5))
    if (owner[slot] == word).all():
        wavefronts = ideal
    else:  # as many as the bank with most distinct words has
        key = np.unique((slot << 32) | (word - int(word.min())))
        words_of_bank = np.bincount(key >> 32, minlength=rows * banks)
        wavefronts = int(words_of_bank.reshape(rows, banks).max(1).sum())
    counters = run.counters
    if store:
        counters.shared_write_requests += requests
        counters.shared_write_wavefronts += wavefronts
        counters.shared_write_ideal += ideal
    else:
        counters.shared_read_requests += requests
        counters.shared_read_wavefronts += wavefronts
        counters.shared_read_ideal += ideal
