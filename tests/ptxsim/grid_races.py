"""Races between the blocks of a launch, in global memory: a block may read what another one wrote if it has heard of it.

It hears by an atomic operation on a word that a thread of the other block changed before. That thread passes on what its
block wrote before their last barrier, if a fence lies between or the operation releases; the hearer's block may read it
after its next barrier, if a fence lies between or the operation acquires. Of each granule of 4 bytes the last writer is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .memory import Memory
    from .run import Run

LOW = (1 << 32) - 1
MOST_REPORTS = 100
Known = dict[
    int, int
]  # by thread that passed it on: the epoch before which its block's writes are known, and its own within


class GridRaces:
    """What a launch's blocks wrote, passed on and heard of."""

    def __init__(self, device: Memory, races: list[str]) -> None:
        self.races = races
        self.written = np.zeros((device.top >> 2) + 1, np.int64)  # epoch << 32 | thread + 1
        self.fenced: Known = {}  # by thread: the epoch of its last fence
        self.at_word: dict[int, Known] = {}
        self.heard: dict[int, Known] = {}  # by thread, until its next fence
        self.known: dict[int, list[tuple[int, int, Known]]] = {}  # by block: the thread that heard, when, and what

    def access(
        self, run: Run, addresses: np.ndarray, width: int, threads: np.ndarray, store: bool, quiet: bool
    ) -> None:
        """One access by each of ``threads``. ``quiet``: atomic or volatile, which may meet others."""
        granule = addresses >> 2
        if width > 4:
            granule = (granule[:, None] + np.arange(width >> 2)).ravel()
            threads = np.repeat(threads, width >> 2)
        inside = granule < len(self.written)
        if not inside.all():
            granule, threads = granule[inside], threads[inside]
        if store:
            self.written[granule] = (run.block_epoch[threads] << 32) | (run.number[threads] + 1)
        elif not quiet:
            written = self.written[granule]
            foreign = (written != 0) & (((written & LOW) - 1) // run.padded != run.number[threads] // run.padded)
            if foreign.any():
                pairs = np.unique(np.stack([written[foreign], threads[foreign]]), axis=1)
                for writer, thread in pairs.T.tolist():
                    self._check(run, writer, thread)

    def _check(self, run: Run, written: int, thread: int) -> None:
        """Whether a thread of the run knows of a write."""
        epoch, writer = written >> 32, (written & LOW) - 1
        number, now = int(run.number[thread]), int(run.block_epoch[thread])
        for hearer, when, known in self.known.get(number // run.padded, ()):
            if hearer != number and when >= now:
                continue  # no barrier since
            for teller, before in known.items():
                same_block = teller // run.padded == writer // run.padded
                if same_block and (epoch < before or (teller == writer and epoch == before)):
                    return
        if len(self.races) < MOST_REPORTS:
            block, other = number // run.padded, writer // run.padded
            self.races.append(
                f"{run.function.name}: thread {number % run.padded} of block {block} reads what thread {writer % run.padded}"
                f" of block {other} wrote, without order, line {run.instruction.line}: {run.instruction.text}"
            )

    def fence(self, run: Run) -> None:
        """By the threads that run, for the whole device."""
        for thread in run.group.index:
            number, epoch = int(run.number[thread]), int(run.block_epoch[thread])
            self.fenced[number] = epoch
            if number in self.heard:
                self._learn(run, number, epoch, self.heard.pop(number))

    def meet(
        self, run: Run, addresses: np.ndarray, threads: np.ndarray, release: bool, acquire: bool, changes: bool = True
    ) -> None:
        """Atomic operations, in the order in which they happen; or volatile loads, which change nothing."""
        for address, thread in zip(addresses.tolist(), threads.tolist(), strict=True):
            number, epoch = int(run.number[thread]), int(run.block_epoch[thread])
            before = epoch if release else self.fenced.get(number)
            if before is None and not acquire:
                continue
            word = self.at_word.setdefault(address, {})
            if word and acquire:
                self._learn(run, number, epoch, dict(word))
            elif word:
                self.heard.setdefault(number, {}).update(word)
            if changes and before is not None:
                for hearer, when, known in self.known.get(number // run.padded, ()):
                    if hearer == number or when < before:
                        word.update(known)
                word[number] = before

    def _learn(self, run: Run, number: int, epoch: int, known: Known) -> None:
        self.known.setdefault(number // run.padded, []).append((number, epoch, known))
