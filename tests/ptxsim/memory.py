"""The device's memory: one array of bytes, the state of each byte, and the arrays that lie in it."""

from __future__ import annotations

from typing import Any

import numpy as np

from .numeric import DTYPE, UINT
from .operands import immediate
from .syntax import Fault

LOWEST_ADDRESS = 4096  # addresses below are never valid, as a null pointer plus an offset
GUARD = 256  # bytes after each allocation that belong to nobody
NONE, ALLOCATED, WRITTEN = range(3)  # the state of a byte

Traffic = dict[str, int]


def shift_of(width: int) -> int:
    """log2 of a width in bytes."""
    return width.bit_length() - 1


def repeated(state: int, width: int) -> int:
    """The states of ``width`` bytes read as one integer."""
    return int.from_bytes(bytes([state]) * width, "little")


class DeviceArray:
    """Memory of a Device with a shape and dtype; ``get()`` copies it back to numpy. Pass it to ``launch`` as a pointer.

    After a launch, ``traffic`` holds what that launch did to this array: read_sectors, write_sectors (32-byte sectors,
    once per warp request), read_footprint, write_footprint (each sector once).
    """

    traffic: Traffic = {"read_sectors": 0, "write_sectors": 0, "read_footprint": 0, "write_footprint": 0}

    def __init__(self, device: Memory, address: int, shape: Any, dtype: Any) -> None:
        self.device, self.address, self.dtype = device, address, np.dtype(dtype)
        self.shape = tuple(np.atleast_1d(shape)) if shape != () else ()
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def get(self) -> np.ndarray:
        raw = self.device.memory[self.address : self.address + self.nbytes]
        return raw.view(self.dtype).reshape(self.shape).copy()

    def set(self, values: Any) -> None:
        values = np.ascontiguousarray(np.broadcast_to(values, self.shape), self.dtype)
        self.device.memory[self.address : self.address + self.nbytes] = values.reshape(-1).view(np.uint8)
        self.device.state[self.address : self.address + self.nbytes] = WRITTEN

    def __index__(self) -> int:
        return self.address


class Memory:
    """``memory`` (bytes) and ``state`` (of each byte), both also seen as wider words: ``view[width]``, ``state_view``."""

    def __init__(self, nbytes: int) -> None:
        self.memory, self.state = np.zeros(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        self.view = {width: self.memory.view(UINT[8 * width]) for width in (1, 2, 4, 8, 16)}
        self.state_view = {width: self.state.view(UINT[8 * width]) for width in (1, 2, 4, 8)}
        self.top = LOWEST_ADDRESS
        self.arrays: list[DeviceArray] = []
        self.symbols: dict[tuple[int, str], int] = {}  # addresses of module variables

    def reserve(self, nbytes: int, state: int, align: int = 256) -> int:
        """The address of new memory, guarded behind; freed by setting ``top`` back."""
        address = -(-self.top // align) * align
        if address + nbytes + GUARD + (1 << 16) > self.memory.size:
            raise Fault("device memory is full: Device(nbytes=...)")
        self.top = -(-(address + nbytes + GUARD) // 256) * 256
        self.state[address : address + nbytes] = state
        return address

    def array(self, values: Any) -> DeviceArray:
        """Copy of a numpy array on the device."""
        values = np.ascontiguousarray(values)
        array = DeviceArray(self, self.reserve(values.nbytes, WRITTEN), values.shape, values.dtype)
        self.memory[array.address : array.address + array.nbytes] = values.reshape(-1).view(np.uint8)
        self.arrays.append(array)
        return array

    def empty(self, shape: Any, dtype: Any = np.float32) -> DeviceArray:
        """Uninitialised memory: loads from it before a store are counted (``uninitialised_loads``)."""
        array = DeviceArray(self, 0, shape, dtype)
        array.address = self.reserve(array.nbytes, ALLOCATED)
        self.memory[array.address : array.address + array.nbytes] = 0xFF
        self.arrays.append(array)
        return array

    def zeros(self, shape: Any, dtype: Any = np.float32) -> DeviceArray:
        return self.array(np.zeros(shape, dtype))

    def symbol(self, module: Any, name: str) -> DeviceArray:
        """A module's .global or .const variable (by substring of its name)."""
        self.place_variables(module)
        hits = [key for key, variable in module.variables.items() if variable[0] != "shared" and name in key]
        if len(hits) != 1:
            raise Fault(f"variable {name!r}: {hits}")
        return DeviceArray(self, self.symbols[id(module), hits[0]], module.variables[hits[0]][2], np.uint8)

    def place_variables(self, module: Any) -> None:
        """Gives a module's variables addresses and their first values, once."""
        for name, (space, align, size, initial, width, type_) in module.variables.items():
            if space == "shared" or (id(module), name) in self.symbols:
                continue
            address = self.symbols[id(module), name] = self.reserve(size, WRITTEN, max(align, 16))
            self.memory[address : address + size] = 0
            words = [word.strip() for word in initial.replace("{", "").replace("}", "").split(",")] if initial else []
            for place, word in enumerate(word for word in words if word):
                if not word[0].isdigit() and word[0] != "-":  # another variable's address
                    number = UINT[8 * width].type(self.symbols.get((id(module), word), 0))
                else:
                    number = immediate(word, DTYPE[type_])
                start = address + place * width
                self.memory[start : start + width] = np.frombuffer(number.tobytes(), np.uint8)

    def gather(self, address: np.ndarray, width: int) -> np.ndarray:
        return self.view[width][address >> shift_of(width)]

    def scatter(self, address: np.ndarray, values: Any, width: int) -> None:
        self.view[width][address >> shift_of(width)] = values
        self.mark(address, width, WRITTEN)

    def mark(self, address: np.ndarray, width: int, state: int) -> None:
        """Sets the state of ``width`` bytes at each address."""
        for offset in range(0, width, 8):
            part = min(width, 8)
            self.state_view[part][(address >> shift_of(part)) + offset // 8] = repeated(state, part)
