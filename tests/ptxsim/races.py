"""Races in shared memory, found by epochs: two accesses race unless a barrier lies between them.

Shared memory is cut into granules, as small as the smallest store of the kernel. Of each granule the last writer and the
last reader are kept, as ``block epoch << 40 | warp epoch << 20 | thread + 1``. A barrier of the block opens a new block
epoch, a warp's own barrier a new warp epoch. An access to a granule that another thread touched in the same block epoch
is a race, unless both are of one warp and in different warp epochs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .memory import shift_of
from .numeric import DTYPE
from .operands import register_bits, vector_length

if TYPE_CHECKING:
    from .run import Run

MANY = 0xFFFFF  # in place of a thread: several threads; also the mask of the thread's and the warp epoch's bits
NO_EPOCH = -1 << 40
SEVERAL_WARPS = np.int32(-2)
MOST_REPORTS = 100
STORES = ("st", "atom", "red", "stmatrix", "cp")


class RaceDetector:
    """What each granule of a run's shared memory has seen."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.granule = shift_of(self._smallest_store())
        count = (run.shared_stride * run.blocks) >> self.granule
        self.written = np.full(count, NO_EPOCH, np.int64)
        self.read = np.full(count, NO_EPOCH, np.int64)
        self.read_warp = np.full(count, -1, np.int32)

    def _smallest_store(self) -> int:
        """The bytes of the narrowest store to shared memory in the kernel."""
        width = 16
        for instruction in self.run.code:
            modifiers = instruction.mods
            elsewhere = {"global", "local", "param"} & {modifier.split("::")[0] for modifier in modifiers[:2]}
            if instruction.op in STORES and not elsewhere:
                bits = register_bits(modifiers[-1]) if modifiers and modifiers[-1] in DTYPE else 32
                if instruction.op == "st":
                    bits *= vector_length(modifiers)
                width = min(width, max(1, bits // 8))
        return width

    def check(self, addresses: np.ndarray, width: int, threads: np.ndarray, store: bool, atomic: bool = False) -> None:
        """One access of ``width`` bytes by each of ``threads``: compared with those before, then remembered."""
        granule = (addresses - self.run.shared_start) >> self.granule
        epoch = self.run.block_epoch[threads]
        mine = (epoch << 40) | (self.run.warp_epoch[threads] << 20) | (threads + 1)
        if width > 1 << self.granule:
            pieces = width >> self.granule
            granule = (granule[:, None] + np.arange(pieces)).ravel()
            threads, epoch, mine = (np.repeat(x, pieces) for x in (threads, epoch, mine))
        written = self.written[granule]
        same = (written >> 40) == epoch
        if same.any():
            what = "write-write" if store else "write-read"
            self._compare(np.flatnonzero(same), granule, written, None, threads, what, atomic)
        if store:
            read = self.read[granule]
            same = (read >> 40) == epoch
            if same.any():
                warps = self.read_warp[granule]
                self._compare(np.flatnonzero(same), granule, read, warps, threads, "read-write", False)
            self.written[granule] = (epoch << 40) | MANY if atomic else mine
        else:
            self._remember_read(granule, epoch, mine, threads)

    def _remember_read(self, granule: np.ndarray, epoch: np.ndarray, mine: np.ndarray, threads: np.ndarray) -> None:
        before, warp_before, warp = self.read[granule], self.read_warp[granule], (threads >> 5).astype(np.int32)
        again = (before >> 40) == epoch
        if again.any():
            other = again & ((before & MANY) != threads + 1)
            mine = np.where(other, mine | MANY, mine)
            warp = np.where(other & (warp_before != warp), SEVERAL_WARPS, warp)
        self.read[granule], self.read_warp[granule] = mine, warp
        lost = self.read[granule] != mine  # several lanes of this access read the granule
        if lost.any():
            shared = granule[lost]
            self.read_warp[shared] = np.where(self.read_warp[shared] == warp[lost], warp[lost], SEVERAL_WARPS)
            self.read[shared] |= MANY

    def _compare(
        self,
        at: np.ndarray,
        granule: np.ndarray,
        packed: np.ndarray,
        packed_warp: np.ndarray | None,
        threads: np.ndarray,
        what: str,
        atomic: bool,
    ) -> None:
        """The accesses ``at`` against what is packed of the granule in the same epoch."""
        run = self.run
        before, who = packed[at], threads[at]
        other = before & MANY
        many = other == MANY
        warp = np.where(many, -2, (other - 1) >> 5) if packed_warp is None else packed_warp[at]
        ordered = (warp == (who >> 5)) & (((before >> 20) & MANY) < run.warp_epoch[who])
        bad = (many | (other != who + 1)) & ~ordered
        if packed_warp is None and atomic:
            bad &= ~many  # atomic after atomic
        if bad.any() and len(run.device.races) < MOST_REPORTS:
            first = int(np.flatnonzero(bad)[0])
            offset = (int(granule[at[first]]) << self.granule) % run.shared_stride
            run.device.races.append(
                f"{run.function.name}: {what} race at shared+{offset}, thread {int(who[first]) % run.padded}"
                f" ({int(bad.sum())} accesses), line {run.instruction.line}: {run.instruction.text}"
            )
