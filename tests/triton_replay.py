"""Runs the Triton kernels' sm_80 PTX in the PTX interpreter, on the arrays of CPU tensors: no GPU needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from triton_offline import Launch, compile_launch

import ptxsim


def _numpy(storage: Tensor) -> np.ndarray:
    return (storage.view(torch.uint16) if storage.dtype == torch.bfloat16 else storage).numpy()


class Simulator:
    """Launches run in ptxsim. ``counters`` has (kernel, launch counters, traffic by argument name) of each."""

    architecture = "sm_80"

    def __init__(self, tensor_core: str = "exact") -> None:
        self.device = ptxsim.Device(seed=0, tensor_core=tensor_core)
        self.counters: list[tuple[str, Any, dict[str, Any]]] = []

    def run(self, kernel: Any, grid: tuple[int, ...], **arguments: Any) -> None:
        """As ``launch.run``."""
        launch = compile_launch(kernel, grid, arguments, self.architecture)
        arrays: dict[str, tuple[Tensor, Any, int]] = {}
        values: list[Any] = []
        for number, (name, value) in enumerate(launch.arguments.items()):
            self._add(launch, (number,), name, value, values, arrays)
        module = ptxsim.loads(launch.compiled.asm["ptx"])
        metadata = launch.compiled.metadata
        counters = self.device.launch(
            module, launch.name, grid=launch.grid, block=32 * metadata.num_warps, args=values, shared=metadata.shared
        )
        assert not self.device.races, self.device.races[:3]
        traffic = {}
        for name, (tensor, array, start) in arrays.items():
            traffic[name] = array.traffic
            flat = torch.from_numpy(array.get()[start:].copy())
            if tensor.dtype == torch.bfloat16:
                flat = flat.view(torch.bfloat16)
            tensor.copy_(torch.as_strided(flat, tensor.shape, tensor.stride()))
        self.counters.append((launch.name, counters, traffic))

    def _add(self, launch: Launch, path: tuple, name: str, value: Any, values: list, arrays: dict) -> None:
        """Append an argument as the compiled kernel takes it: constants are compiled in, tuples are flat."""
        if path in launch.constants:
            return
        if isinstance(value, tuple):
            for place, part in enumerate(value):
                inner = name if name not in arrays else f"{name}.{place}"
                self._add(launch, (*path, place), inner, part, values, arrays)
        elif isinstance(value, Tensor):
            size = (
                1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) if value.numel() else 1
            )
            storage = torch.zeros(size, dtype=value.dtype)
            if value.numel():
                torch.as_strided(storage, value.shape, value.stride()).copy_(value)
            array = self.device.array(_numpy(storage))
            arrays[name] = (value, array, 0)
            values.append(array)
        else:
            values.append(value)
