"""What is counted while a kernel runs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """Counts of one launch, or summed over a kernel's. Requests are warp-wide accesses; sectors are 32 bytes.

    ``*_sectors`` counts a sector once per request (L1 traffic); ``*_footprint`` counts a sector once per launch (the DRAM
    traffic of an ideal cache). ``shared_*_wavefronts`` / ``shared_*_ideal`` is 1 without bank conflicts; a 16-byte access
    of a full warp has 4 ideal wavefronts (quarter warps), an 8-byte access 2, ldmatrix.x4 4.
    """

    launches: int = 0
    blocks: int = 0
    thread_instructions: int = 0
    warp_instructions: int = 0  # once for each warp that issues it, whatever the number of its active threads
    steps: int = 0  # of the interpreter
    global_read_bytes: int = 0
    global_read_requests: int = 0
    global_read_sectors: int = 0
    global_read_footprint: int = 0
    global_write_bytes: int = 0
    global_write_requests: int = 0
    global_write_sectors: int = 0
    global_write_footprint: int = 0
    shared_read_requests: int = 0
    shared_read_wavefronts: int = 0
    shared_read_ideal: int = 0
    shared_write_requests: int = 0
    shared_write_wavefronts: int = 0
    shared_write_ideal: int = 0
    local_bytes: int = 0
    atomics: int = 0
    barriers: int = 0
    mma: int = 0
    uninitialised_loads: int = 0

    @property
    def bank_conflict_ratio(self) -> float:
        """Shared wavefronts over their conflict-free number (1.0 = no bank conflicts)."""
        ideal = self.shared_read_ideal + self.shared_write_ideal
        return (self.shared_read_wavefronts + self.shared_write_wavefronts) / ideal if ideal else 1.0
