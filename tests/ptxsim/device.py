"""The simulated device: arguments packed, blocks run in groups, and what a launch did added up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .counters import Counters
from .grid_races import GridRaces
from .memory import DeviceArray, Memory
from .numeric import DTYPE
from .parser import Module
from .program import Program
from .run import MAX_SHARED_BYTES, Run
from .scheduler import execute, kind_of
from .syntax import Fault, Function

np.seterr(all="ignore")


class Device(Memory):
    """Memory, counters per kernel name (``counters``), races found in shared memory and between blocks (``races``).

    threads: how many threads run side by side; checks=False turns the race detector and the bank-conflict count off;
    tensor_core: 'exact' sums an mma in float64 and rounds once, 'truncate' models the hardware's pessimistic side
    (sums of 8 (16-bit) or 4 (tf32) products aligned to the largest, 24 bits kept, float32 result truncated).
    """

    def __init__(
        self,
        nbytes: int = 1 << 28,
        threads: int = 8192,
        checks: bool = True,
        tensor_core: str = "exact",
        seed: int | None = None,
        max_steps: int = 20_000_000,
    ) -> None:
        super().__init__(nbytes)
        self.threads, self.checks, self.tensor_core, self.max_steps = threads, checks, tensor_core, max_steps
        self.counters: dict[str, Counters] = {}
        self.races: list[str] = []
        self.printed: list[str] = []
        self.random = np.random.default_rng(seed)

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        args: Sequence[Any] = (),
        shared: int = 0,
        at_once: int | None = None,
        cooperative: bool = False,
    ) -> Counters:
        """Run ``kernel`` (name or substring, see Module.kernel) and return this launch's Counters.

        grid, block: int or tuple of up to 3. args: DeviceArray or int for pointers, Python or numpy scalars (a float
        becomes the parameter's float type, or float32/float64 by its size), bytes or structured numpy values for
        structs. shared: bytes of dynamic shared memory. at_once: blocks side by side (1: blocks one after another).
        """
        if not isinstance(module, Module):
            raise TypeError("module: use ptxsim.load or ptxsim.loads")
        function = module.kernel(kernel)
        if function.program is None:
            function.program = Program(module, function)
            for instruction in function.program.code:
                instruction.kind = kind_of(instruction)
        grid, block = three_dimensions(grid), three_dimensions(block)
        threads = int(np.prod(block))
        if threads > 1024 or threads < 1:
            raise Fault(f"block of {threads} threads")
        if function.reqntid and int(np.prod(function.reqntid)) != threads:
            raise Fault(f"{function.name} needs blocks of {function.reqntid} threads (.reqntid), not {block}")
        if shared > MAX_SHARED_BYTES:
            raise Fault(f"{shared} bytes of dynamic shared memory: more than 227 KB")
        self.place_variables(module)
        params = pack_arguments(function, args)
        count = int(np.prod(grid))
        padded = -(-threads // 32) * 32
        side = count if cooperative else min(count, at_once or max(1, self.threads // padded))
        counters = Counters(launches=1, blocks=count)
        touched = np.zeros((2, self.memory.size // 32), bool)  # sectors that were read, and written
        order = self.random.permutation(count)
        top = self.top
        self.grid_races = GridRaces(self, self.races)
        self.array_starts = np.array([array.address for array in self.arrays] or [0]) >> 5
        self.array_sectors = np.zeros((2, len(self.array_starts) + 1), np.int64)
        for first in range(0, count, side):
            blocks = order[first : first + side]
            try:
                execute(Run(self, function, grid, block, blocks, params, shared, counters, touched, cooperative))
            finally:  # shared, local and parameter memory of these blocks
                self.state[top : self.top] = 0
                self.top = top
        self._add_up(function.name, counters, touched)
        return counters

    def _add_up(self, name: str, counters: Counters, touched: np.ndarray) -> None:
        """A launch's footprint, its traffic by array, and the sums of its kernel."""
        used = self.top // 32 + 1
        counters.global_read_footprint += int(np.count_nonzero(touched[0][:used]))
        counters.global_write_footprint += int(np.count_nonzero(touched[1][:used]))
        for number, array in enumerate(self.arrays):
            first, last = array.address >> 5, -(-(array.address + array.nbytes) // 32)
            array.traffic = {
                "read_sectors": int(self.array_sectors[0, number + 1]),
                "write_sectors": int(self.array_sectors[1, number + 1]),
                "read_footprint": int(np.count_nonzero(touched[0][first:last])),
                "write_footprint": int(np.count_nonzero(touched[1][first:last])),
            }
        total = self.counters.setdefault(name, Counters())
        for field, number in vars(counters).items():
            setattr(total, field, getattr(total, field) + number)


def three_dimensions(sizes: int | Sequence[int]) -> tuple[int, ...]:
    given = (sizes,) if np.ndim(sizes) == 0 else tuple(sizes)
    return tuple(int(size) for size in (*given, 1, 1)[:3])


def pack_arguments(function: Function, args: Sequence[Any]) -> dict[str, bytes]:
    """Kernel arguments as {parameter name: bytes}."""
    if len(args) > len(function.params):
        raise Fault(f"{function.name} takes {len(function.params)} arguments, {len(args)} given")
    packed = {}
    for number, (name, type_, size) in enumerate(function.params):
        if number < len(args):
            packed[name] = pack_argument(args[number], type_, size)
            if len(packed[name]) != size:
                got = len(packed[name])
                raise Fault(f"{function.name}: argument {number} ({name}) has {size} bytes, {got} given")
        elif type_ in ("u64", "b64"):
            packed[name] = bytes(size)  # trailing scratch pointers (Triton) may be left out
        else:
            raise Fault(f"{function.name}: argument {number} ({name}) is missing")
    return packed


def pack_argument(value: Any, type_: str, size: int) -> bytes:
    if isinstance(value, bytes | bytearray):
        return bytes(value)
    if isinstance(value, DeviceArray):
        return value.address.to_bytes(8, "little")
    if isinstance(value, float | np.floating) and type_[0] != "s":
        return np.asarray(value, {2: np.float16, 4: np.float32, 8: np.float64}[size]).tobytes()
    if isinstance(value, bool | int | np.integer | np.bool_):
        if type_ in ("f32", "f64"):
            return np.asarray(value, DTYPE[type_]).tobytes()
        return (int(value) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return np.asarray(value).tobytes()
