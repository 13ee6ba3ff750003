"""mma.sync: products of small matrices that lie spread over a warp's registers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .fragments import active_warps, fragment, write_warps
from .numeric import DTYPE, bf16_to_f32, f64_to_f32
from .operands import reader
from .syntax import Fault, Instruction, Reg, Vec

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


ELEMENTS = {"f16": 2, "bf16": 2, "tf32": 1, "f64": 1, "s8": 4, "u8": 4}  # of an operand in one register


def decode_elements(registers, type_):
    """[warps, 32] registers as [warps, 8, 4 elements of a register]: a block of 8 rows, four lanes a row."""
    registers = np.ascontiguousarray(registers)
    if type_ == "f16":
        elements = registers.view(np.float16)
    elif type_ == "bf16":
        elements = bf16_to_f32(registers.view(np.uint16))
    elif type_ == "tf32":  # the hardware ignores the lower bits
        elements = (registers & np.uint32(0xFFFFE000)).view(np.float32)
    elif type_ in ("f64", "s8", "u8"):
        elements = registers.view(DTYPE[type_])
    else:
        raise Fault(f"mma operand type {type_} is not supported")
    return elements.reshape(len(registers), 8, -1)


def matrix_product(A, B, C, type_, mode):
    """A @ B^T + C for [warps, m, k], [warps, n, k], [warps, m, n] in float64.

    "exact" sums without rounding; "truncate" in steps of 8 products (4 of tf32), aligned to the largest, 25 bits kept.
    """
    if mode == "exact" or type_ in ("f64", "s8", "u8"):
        return np.matmul(A, B.transpose(0, 2, 1)) + C
    step = 4 if type_ == "tf32" else 8
    for k in range(0, A.shape[2], step):
        products = A[:, :, None, k : k + step] * B[:, None, :, k : k + step]
        terms = np.concatenate([products, C[..., None]], -1)
        exponent = np.frexp(np.abs(terms).max(-1))[1]
        unit = np.ldexp(1.0, exponent - 25)[..., None]
        C = f64_to_f32((np.trunc(terms / unit) * unit).sum(-1), "rz").astype(np.float64)
    return C


def op_mma(instruction: Instruction) -> Step:
    mods = instruction.mods
    shape = next((m for m in mods if re.fullmatch(r"m\d+n\d+k\d+", m)), None)
    if shape is None or "sp" in mods:
        raise Fault("mma form not supported")
    m, n, k = (int(number) for number in re.findall(r"\d+", shape))
    type_d, type_a, type_b, type_c = mods[-4:]
    elements = ELEMENTS.get(type_a)
    order = tuple(modifier for modifier in mods if modifier in ("row", "col"))
    if elements is None or n != 8 or order != ("row", "col") or not (m == 16 or m == 8 and type_a == "f64"):
        raise Fault("mma form not supported")
    d, a, b, c = (x.items if isinstance(x, Vec) else (x,) for x in instruction.args[:4])
    row_blocks, width = m // 8, 4 * elements  # a register of each lane: a block of 8 rows and this many columns
    if len(a) * width != row_blocks * k or len(b) * width != k:
        raise Fault(f"mma {shape}: {len(a)}+{len(b)} operand registers")

    def execute(run: Run) -> None:
        which = active_warps(run)
        warps = run.size // 32 if which is None else len(which)
        run.counters.mma += warps
        A, B, C = np.empty((warps, m, k)), np.empty((warps, 8, k)), np.empty((warps, m, 8))
        for i, operand in enumerate(a):
            row, column = 8 * (i % row_blocks), width * (i // row_blocks)
            block = decode_elements(fragment(run, operand, which), type_a)
            A[:, row : row + 8, column : column + width] = block
        for i, operand in enumerate(b):
            B[:, :, width * i : width * (i + 1)] = decode_elements(fragment(run, operand, which), type_b)
        if type_c == "f16":
            for i, operand in enumerate(c):
                C[:, 8 * i : 8 * i + 8] = decode_elements(fragment(run, operand, which), "f16")
        else:  # lane 4 g + t: elements 2 t and 2 t + 1 of rows g and g + 8
            by_lane = C.reshape(warps, row_blocks, 8, 4, 2)
            for i, operand in enumerate(c):
                if isinstance(operand, Reg):
                    values = fragment(run, operand, which)
                else:
                    values = np.full((warps, 32), reader(operand, type_c)(run))
                by_lane[:, i >> 1, :, :, i & 1] = values.view(DTYPE[type_c]).reshape(warps, 8, 4)
        D = matrix_product(A, B, C, type_a, run.device.tensor_core)
        if type_d == "f16":
            halves = D.astype(np.float16)
            for i, operand in enumerate(d):
                block = np.ascontiguousarray(halves[:, 8 * i : 8 * i + 8])
                write_warps(run, operand, block.view(np.uint32).reshape(warps, 32), which)
        else:
            by_lane = (D.astype(np.int64) if type_d == "s32" else D).astype(DTYPE[type_d])
            by_lane = by_lane.reshape(warps, row_blocks, 8, 4, 2)
            for i, operand in enumerate(d):
                write_warps(run, operand, by_lane[:, i >> 1, :, :, i & 1].reshape(warps, 32), which)

    return execute
