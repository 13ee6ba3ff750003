"""Some blocks of a launch that run side by side: their registers, special registers, and memory.

All threads of the blocks form one numpy vector, each block padded to whole warps. A register holds one array over all
threads, or a numpy scalar while all threads agree, and is never changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import ALLOCATED, NONE, WRITTEN
from .numeric import UINT
from .operands import register_bits
from .races import RaceDetector
from .syntax import Fault, Function, Instruction

if TYPE_CHECKING:
    from .counters import Counters
    from .device import Device

MAX_SHARED_BYTES = 227 * 1024
MULTIPROCESSORS = 132


class Group:
    """A set of threads that run together, as a mask over all threads of a run."""

    __slots__ = ("mask", "count", "all_live", "everyone", "_index", "_warps", "_warp_key")

    def __init__(self, mask: np.ndarray, count: int, live: int, total: int) -> None:
        self.mask, self.count = mask, count
        self.all_live = count == live  # every thread that has not exited
        self.everyone = count == total  # every thread, and none has exited or is padding
        self._index = self._warps = self._warp_key = None

    @property
    def index(self) -> np.ndarray:
        """The threads' numbers."""
        if self._index is None:
            self._index = np.flatnonzero(self.mask)
        return self._index

    @property
    def warps(self) -> int:
        """How many warps have a thread in it."""
        if self._warps is None:
            self._warps = int(np.count_nonzero(self.mask.reshape(-1, 32).any(1)))
        return self._warps

    @property
    def warp_key(self) -> np.ndarray:
        """Each thread's warp, in the bits above a sector's number."""
        if self._warp_key is None:
            self._warp_key = (self.index >> 5) << 40
        return self._warp_key


class Run:
    """Some blocks of one launch, run side by side by ``scheduler.execute``."""

    def __init__(
        self,
        device: Device,
        function: Function,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        block_ids: np.ndarray,
        params: dict[str, bytes],
        dynamic: int,
        counters: Counters,
        touched: np.ndarray,
        cooperative: bool,
    ) -> None:
        self.device, self.function, self.counters, self.touched = device, function, counters, touched
        self.program, self.code = function.program, function.program.code
        threads = int(np.prod(block))
        self.padded = -(-threads // 32) * 32
        self.blocks = len(block_ids)
        self.size = self.padded * self.blocks
        self.thread_index = np.arange(self.size)
        self.block_of, self.warp_of = self.thread_index // self.padded, self.thread_index // 32
        self.number = (
            np.asarray(block_ids)[self.block_of] * self.padded + self.thread_index % self.padded
        )  # in the grid
        self.lane = (self.thread_index % 32).astype(np.uint32)
        self.special = special_registers(
            grid, block, self.thread_index % self.padded, np.asarray(block_ids)[self.block_of], self.lane
        )
        self.special["%dynamic_smem_size"] = np.uint32(dynamic)
        self._place_shared(dynamic)
        self._place_local()
        self._place_params(params, cooperative)
        self.registers: list[Any] = [
            np.bool_(False) if type_ == "pred" else UINT[max(8, register_bits(type_))].type(0)
            for type_ in self.program.registers
        ]
        self.carry: Any = np.uint32(0)
        self.live = np.tile(np.arange(self.padded) < threads, self.blocks)
        self.live_count = int(self.live.sum())
        self.live_per_block = np.full(self.blocks, threads)
        # Where threads stand: ready to run, waiting for their warp (both by program counter), or at a barrier.
        self.ready: dict[int, np.ndarray] = {0: self.live.copy()}
        self.parked: dict[int, np.ndarray] = {}
        self.barriers: dict[int, Any] = {}
        self.group: Any = None
        self.instruction: Any = None
        self.block_epoch, self.warp_epoch = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        self.races = RaceDetector(self)
        self.copies: list[Any] = []  # cp.async under way
        self.copy_group = np.zeros(self.size, np.int64)
        self.call_params: dict[str, np.ndarray] = {}

    def _place_shared(self, dynamic: int) -> None:
        """Offsets of the shared variables, one piece of memory a block; it starts as 0xff, allocated and not written."""
        program, device = self.program, self.device
        variables = [variable for variable in program.variables if variable[0] == "shared"]
        used = program.used_symbols()
        for name, (space, align, size, *_) in program.module.variables.items():
            if space == "shared" and name in used:
                variables.append((space, align, name, size))
        self.shared_symbols: dict[str, int] = {}
        offset, dynamic_align, dynamic_names = 0, 16, []
        for _, align, name, size in variables:
            if size:
                offset = -(-offset // align) * align
                self.shared_symbols[name] = offset
                offset += size
            else:  # extern __shared__
                dynamic_align = max(dynamic_align, align)
                dynamic_names.append(name)
        offset = -(-offset // dynamic_align) * dynamic_align
        self.shared_symbols.update(dict.fromkeys(dynamic_names, offset))
        self.shared_bytes = offset + dynamic
        if self.shared_bytes > MAX_SHARED_BYTES:
            raise Fault(f"{self.shared_bytes} bytes of shared memory per block")
        self.special["%total_smem_size"] = np.uint32(self.shared_bytes)
        self.shared_stride = stride = -(-(self.shared_bytes + 16) // 256) * 256
        self.shared_start = start = device.reserve(stride * self.blocks, NONE)
        end = start + stride * self.blocks
        device.memory[start:end] = 0xFF
        device.state[start:end].reshape(self.blocks, stride)[:, : self.shared_bytes] = ALLOCATED
        self.shared_base = start + self.block_of * stride

    def _place_local(self) -> None:
        self.local_symbols: dict[str, int] = {}
        size = 0
        for space, align, name, nbytes in self.program.variables:
            if space == "local":
                size = -(-size // max(align, 16)) * max(align, 16)
                self.local_symbols[name] = size
                size += nbytes
        if size:
            stride = -(-size // 16) * 16 + 16
            self.local_base = self.device.reserve(stride * self.size, WRITTEN) + self.thread_index * stride

    def _place_params(self, params: dict[str, bytes], cooperative: bool) -> None:
        device = self.device
        self.params = params
        self.param_address: dict[str, int] = {}
        for name, data in params.items():
            address = self.param_address[name] = device.reserve(len(data), WRITTEN)
            device.memory[address : address + len(data)] = np.frombuffer(data, np.uint8)
        self.special.update({f"%envreg{number}": np.uint32(0) for number in range(32)})
        if cooperative:  # the grid barrier's counter, where cooperative groups look for it
            address = device.reserve(64, WRITTEN)
            device.memory[address : address + 64] = 0
            self.special["%envreg2"] = np.uint32(address)

    def make_group(self, mask: np.ndarray, count: int) -> Group:
        return Group(mask, count, self.live_count, self.size)

    def set_group(self, mask: np.ndarray) -> None:
        self.group = self.make_group(mask, int(np.count_nonzero(mask)))

    def add_ready(self, pc: int, mask: np.ndarray) -> None:
        before = self.ready.get(pc)
        self.ready[pc] = mask if before is None else before | mask

    def fault(self, fault: Fault, instruction: Instruction) -> None:
        """Raises it with the place: line of the PTX, block, thread."""
        if fault.line is not None:
            raise fault
        threads = self.group.index if self.group is not None and self.group.count else [0]
        thread = int(threads[0]) if len(threads) else 0
        block = [int(np.broadcast_to(self.special[f"%ctaid.{axis}"], (self.size,))[thread]) for axis in "xyz"]
        placed = Fault(
            f"{self.function.name}, PTX line {instruction.line}: {fault}\n    {instruction.text}\n    "
            f"block {tuple(block)}, first of {len(threads)} active threads: {thread % self.padded}"
        )
        placed.line = instruction.line
        raise placed from None


def special_registers(
    grid: tuple[int, ...], block: tuple[int, ...], thread: np.ndarray, block_id: np.ndarray, lane: np.ndarray
) -> dict[str, Any]:
    """Values of %tid.x and its like over all threads; a block is its own cluster."""

    def unsigned(values: np.ndarray) -> np.ndarray:
        return values.astype(np.uint32)

    special: dict[str, Any] = {
        "%laneid": lane,
        "%warpid": unsigned(thread // 32),
        "%nwarpid": np.uint32(-(-int(np.prod(block)) // 32)),
        "%smid": unsigned(block_id % MULTIPROCESSORS),
        "%nsmid": np.uint32(MULTIPROCESSORS),
        "%gridid": np.uint32(1),
        "%cluster_ctarank": np.uint32(0),
        "%cluster_nctarank": np.uint32(1),
        "%is_explicit_cluster": np.bool_(False),
    }
    for axis, threads, blocks in zip("xyz", block, grid, strict=True):
        special[f"%tid.{axis}"], thread = unsigned(thread % threads), thread // threads
        special[f"%ctaid.{axis}"], block_id = unsigned(block_id % blocks), block_id // blocks
        special[f"%ntid.{axis}"], special[f"%nctaid.{axis}"] = np.uint32(threads), np.uint32(blocks)
        special[f"%clusterid.{axis}"], special[f"%nclusterid.{axis}"] = special[f"%ctaid.{axis}"], np.uint32(blocks)
        special[f"%cluster_ctaid.{axis}"], special[f"%cluster_nctaid.{axis}"] = np.uint32(0), np.uint32(1)
    equal = np.uint32(1) << lane
    below = equal - np.uint32(1)
    special["%lanemask_eq"], special["%lanemask_lt"], special["%lanemask_le"] = equal, below, equal | below
    special["%lanemask_ge"], special["%lanemask_gt"] = ~below, ~(equal | below)
    return special
