"""The PTX interpreter on nvcc's PTX of small kernels: results, traffic, and each barrier that is left out found."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ptxsim
from ptxsim.numeric import bf16_to_f32, f32_to_bf16

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
SOURCE = Path(ptxsim.__file__).with_name("kernels.cu")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ptxsim.Module:
    target = tmp_path_factory.mktemp("ptx") / "kernels.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-arch=sm_80", "-ptx", str(SOURCE), "-o", str(target)], check=True)
    return ptxsim.load(str(target))


def test_calls_constants_structs(module: ptxsim.Module) -> None:
    count = 300
    x = np.random.default_rng(0).standard_normal(count).astype(np.float32)
    device = ptxsim.Device()
    y = device.empty(count)
    config = np.zeros(1, np.dtype([("count", "i4"), ("scale", "f4", 3)]))
    config["count"], config["scale"] = count, [1, 2, 3]
    counters = device.launch(module, "language::features", (3, 1, 1), 128, [device.array(x), y, config.tobytes()])
    i = np.arange(count)
    table, scale = np.array([1, 2, 3, 4.0]), np.array([1, 2, 3.0])
    j = (i * 5) & 7
    expected = 2 * x + x - 1 + np.where(i & 1, x * table[i & 3], x - 1) + j * scale[j % 3]
    assert np.abs(y.get() - expected).max() < 1e-4 and counters.atomics == count
    assert device.symbol(module, "total").get().view(np.uint32)[0] == 7 + count


def test_assert_printf_trap(module: ptxsim.Module) -> None:
    device = ptxsim.Device()
    device.launch(module, "asserts", 1, 32, [40])
    assert device.printed == ["hello 40 1.50 x\n"]
    with pytest.raises(ptxsim.Fault, match="assertion failed"):
        device.launch(module, "asserts", 1, 32, [20])
    with pytest.raises(ptxsim.Fault, match="PTX line"):
        device.launch(module, "traps", 1, 32, [20])
    with pytest.raises(ptxsim.Fault, match="not found"):
        device.launch(module, "nosuch", 1, 32, [])


def test_votes_and_named_barriers(module: ptxsim.Module) -> None:
    device = ptxsim.Device()
    out = device.empty(64, np.int32)
    device.launch(module, "votes", 1, 64, [out])
    assert (out.get() == np.where(np.arange(64) < 32, 0, 1000) + 22 * 4 + 2 + 0).all()


def test_atomics(module: ptxsim.Module) -> None:
    device = ptxsim.Device()
    f, d, u = device.zeros(1), device.zeros(1, np.float64), device.zeros(9, np.uint32)
    q, s = device.zeros(1, np.uint64), device.zeros(1, np.int32)
    device.launch(module, "atomics", 4, 96, [f, d, u, q, s])
    assert f.get()[0] == 192 and d.get()[0] == 96 and q.get()[0] == 384 << 33 and s.get()[0] == -383
    assert list(u.get()) == [383, 0, 2**32 - 1, 768, 766, 9, 5, 384 % 7, 384] and not device.races


def test_out_of_bounds_is_a_fault(module: ptxsim.Module) -> None:
    device = ptxsim.Device()
    with pytest.raises(ptxsim.Fault, match="out-of-bounds store"):
        device.launch(module, "reversed", 1, 64, [device.empty(60), 0])


def reversed_(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    y = device.empty(64)
    device.launch(module, "reversed", 1, 64, [y, removed])
    return np.abs(y.get() - np.arange(64)[::-1]).max()


def add(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    count = 20003
    a, b = np.random.default_rng(3).standard_normal((2, count + 1)).astype(np.float32)
    out = device.empty(count)
    counters = device.launch(module, "add", -(-count // 1024), 256, [device.array(a), device.array(b), out, count])
    assert counters.global_read_bytes == 8 * count and counters.global_write_footprint == -(-4 * count // 32)
    return np.abs(out.get() - (a + b)[:count]).max()


def sum_(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    count = 50000
    x = (np.random.default_rng(3).random(count) + 1).astype(np.float32)
    out = device.zeros(1)
    device.launch(module, "sum", 8, 256, [device.array(x), out, count, removed])
    return abs(out.get()[0] / x.sum(dtype=float) - 1)


def product(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    a, b = f32_to_bf16(np.random.default_rng(3).uniform(-1, 1, (2, 16, 16)))
    out = device.empty((16, 16))
    counters = device.launch(module, "product", 1, 32, [device.array(a), device.array(b), out, removed])
    assert counters.mma == 2
    assert counters.shared_read_wavefronts == counters.shared_read_ideal == 8, "rows of 48 bytes: no conflicts"
    assert counters.shared_write_wavefronts == 2 * counters.shared_write_ideal, "rows 0 and 3 share a bank"
    return np.abs(out.get() - bf16_to_f32(a).astype(float) @ bf16_to_f32(b)).max()


def copy_reversed(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    blocks, tiles, size = 3, 5, 128
    x = np.random.default_rng(3).standard_normal((blocks * tiles, size, 4)).astype(np.float32)
    out = device.empty(x.shape)
    device.launch(module, "copy_reversed", blocks, size, [device.array(x), out, tiles, removed], shared=2 * size * 16)
    return np.abs(out.get() - x[:, ::-1]).max()


def divide_by_sum(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    count = 5000
    x = (np.random.default_rng(3).random(count) + 1).astype(np.float32)
    out = device.empty(count)
    arguments = [device.array(x), device.empty(6), out, count, removed]
    # without the grid's barrier, blocks that run one after another show it
    device.launch(module, "divide_by_sum", 6, 256, arguments, cooperative=removed != 1, at_once=1)
    return np.abs(out.get() * x.sum(dtype=float) / x - 1).max()


def last_block(module: ptxsim.Module, device: ptxsim.Device, removed: int) -> float:
    x = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    out = device.empty(96)
    arguments = [device.array(x), device.empty(x.shape), out, device.zeros(1, np.uint32), removed]
    device.launch(module, "last_block", 5, 96, arguments)
    return np.abs(out.get() - x.sum(0, dtype=float)).max()


Kernel = Callable[[ptxsim.Module, ptxsim.Device, int], float]


def found(device: ptxsim.Device) -> bool:
    return bool(device.races) or any(counters.uninitialised_loads for counters in device.counters.values())


@pytest.mark.parametrize(
    ("kernel", "tolerance"),
    [
        (reversed_, 0),
        (add, 0),
        (sum_, 1e-6),
        (product, 1e-6),
        (copy_reversed, 0),
        (divide_by_sum, 1e-5),
        (last_block, 1e-6),
    ],
)
def test_right_and_nothing_found(module: ptxsim.Module, kernel: Kernel, tolerance: float) -> None:
    device = ptxsim.Device(seed=0)
    assert kernel(module, device, 0) <= tolerance and not found(device)


@pytest.mark.parametrize(
    ("kernel", "removed"),
    [
        (reversed_, 1),
        (sum_, 1),
        (product, 1),
        (copy_reversed, 1),
        (copy_reversed, 2),
        (copy_reversed, 3),
        (divide_by_sum, 1),
        (divide_by_sum, 2),
        *((last_block, removed) for removed in (1, 2, 3, 4)),
    ],
)
def test_a_missing_barrier_is_found(module: ptxsim.Module, kernel: Kernel, removed: int) -> None:
    device = ptxsim.Device(seed=0)
    error = kernel(module, device, removed)
    assert found(device) or not error <= 1e-5
