"""mma.sync and wmma: products of small matrices that lie spread over a warp's registers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from .accesses import locate
from .fragments import fragment, warp_rows, write_warps
from .numeric import DTYPE, bf16_to_f32, f64_to_f32
from .operands import active, address_of, reader, space_of, write_active
from .syntax import Fault, Instruction, Reg, Vec

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def decode_elements(raw, type_, W):
    """[warps, 32] register images -> [warps, 8, 4*e] float64, e elements per register."""
    raw = np.ascontiguousarray(raw)
    if type_ == "f16":
        v = raw.view(np.float16)
    elif type_ == "bf16":
        v = bf16_to_f32(raw.view(np.uint16))
    elif type_ == "tf32":
        v = (raw & np.uint32(0xFFFFE000)).view(np.float32)
    elif type_ == "f64":
        v = raw.view(np.float64)
    elif type_ in ("s8", "u8"):
        v = raw.view(DTYPE[type_])
    else:
        raise Fault(f"mma operand type {type_} is not supported")
    return v.reshape(W, 8, -1)


def matrix_product(A, BT, C, type_, mode):
    """C + A @ BT^T for [warps, m, k], [warps, n, k], [warps, m, n]; float32 result (float64 for f64)."""
    if mode == "exact" or type_ in ("f64", "s8", "u8"):
        return np.matmul(A, BT.transpose(0, 2, 1)) + C
    step = 4 if type_ == "tf32" else 8
    for k in range(0, A.shape[2], step):
        p = A[:, :, None, k : k + step] * BT[:, None, :, k : k + step]
        terms = np.concatenate([p, C[..., None]], -1)
        top = np.frexp(np.abs(terms).max(-1))[1]
        unit = np.ldexp(1.0, top - 25)[..., None]
        total = (np.trunc(terms / unit) * unit).sum(-1)
        C = f64_to_f32(total, "rz").astype(np.float64)
    return C


def op_mma(instruction: Instruction) -> Step:
    shape = next((m for m in instruction.mods if re.fullmatch(r"m\d+n\d+k\d+", m)), None)
    if shape is None or instruction.mods[0] == "sp" or "sp" in instruction.mods:
        raise Fault("mma form not supported")
    M, N, K = (int(x) for x in re.findall(r"\d+", shape))
    dtype_d, type_a, type_b, type_c = instruction.mods[-4:]
    per = {"f16": 2, "bf16": 2, "tf32": 1, "f64": 1, "s8": 4, "u8": 4}.get(type_a)
    if (
        per is None
        or N != 8
        or M not in (8, 16)
        or tuple(m for m in instruction.mods if m in ("row", "col")) != ("row", "col")
        or (M == 8 and type_a != "f64")
    ):
        raise Fault("mma form not supported")
    d, a, b, c = (x.items if isinstance(x, Vec) else (x,) for x in instruction.args[:4])
    rb = M // 8  # row blocks
    if len(a) * 4 * per != rb * K or len(b) * 4 * per != K:
        raise Fault(f"mma {shape}: {len(a)}+{len(b)} operand registers")

    def execute(run: Run) -> None:
        rows = warp_rows(run)
        W = run.size // 32 if rows is None else len(rows)
        run.counters.mma += W
        A, BT, w = np.empty((W, M, K)), np.empty((W, 8, K)), 4 * per
        for i, o in enumerate(a):
            r, k = i % rb, i // rb
            A[:, 8 * r : 8 * r + 8, w * k : w * k + w] = decode_elements(fragment(run, o, rows), type_a, W)
        for k, o in enumerate(b):
            BT[:, :, w * k : w * k + w] = decode_elements(fragment(run, o, rows), type_b, W)
        C = np.empty((W, M, 8))
        if type_c == "f16":
            for r, o in enumerate(c):
                C[:, 8 * r : 8 * r + 8] = np.ascontiguousarray(fragment(run, o, rows)).view(np.float16).reshape(W, 8, 8)
        else:
            dt = DTYPE[type_c]
            CC = C.reshape(W, rb, 8, 4, 2)
            for e, o in enumerate(c):
                v = fragment(run, o, rows) if isinstance(o, Reg) else np.full((W, 32), reader(o, type_c)(run))
                CC[:, e >> 1, :, :, e & 1] = v.view(dt).reshape(W, 8, 4)
        D = matrix_product(A, BT, C, type_a, run.device.tensor_core)
        if dtype_d == "f16":
            h = D.astype(np.float16)
            for r, o in enumerate(d):
                write_warps(run, o, np.ascontiguousarray(h[:, 8 * r : 8 * r + 8]).view(np.uint32).reshape(W, 32), rows)
        else:
            if dtype_d == "s32":
                D = D.astype(np.int64).astype(np.int32)
            DD = D.astype(DTYPE[dtype_d]).reshape(W, rb, 8, 4, 2)
            for e, o in enumerate(d):
                write_warps(run, o, DD[:, e >> 1, :, :, e & 1].reshape(W, 32), rows)

    return execute


def op_wmma(instruction: Instruction) -> Step:
    """wmma m16n16k16 with 16-bit operands (fragment layout of our own: element e of lane l, see `place`)."""
    if "m16n16k16" not in instruction.mods:
        raise Fault("wmma shape not supported")
    what, part = instruction.mods[0], instruction.mods[1]
    space = space_of(instruction.mods)

    def place(run):
        lane = run.lane.astype(np.int64)
        return lambda e: ((lane >> 2) + (e >> 1 & 1) * 8, (lane & 3) * 2 + (e & 1) + (e >> 2) * 8)

    def element_addresses(run, mem, stride, e, width, store):
        r, c = place(run)(e)
        ld = stride(run).astype(np.int64)
        row = instruction.mods[instruction.mods.index("aligned") + 1] == "row"
        off = (r * ld + c if row else c * ld + r) * width
        return locate(run, mem(run) + off, space, width, store)

    if what == "load":
        mem = address_of(instruction.args[1])
        stride = reader(instruction.args[2], "u32") if len(instruction.args) > 2 else lambda run: np.uint32(16)
        regs = instruction.args[0].items
        if part in "ab":

            def load_ab(run):
                for j, o in enumerate(regs[:4]):
                    lo, hi = (
                        run.device.gather(element_addresses(run, mem, stride, 2 * j + u, 2, False), 2).astype(np.uint32)
                        for u in (0, 1)
                    )
                    write_active(run, o, lo | (hi << np.uint32(16)))

            return load_ab

        def load_c(run):
            for e, o in enumerate(regs):
                write_active(run, o, run.device.gather(element_addresses(run, mem, stride, e, 4, False), 4))

        return load_c
    if what == "store":
        mem = address_of(instruction.args[0])
        stride = reader(instruction.args[2], "u32") if len(instruction.args) > 2 else lambda run: np.uint32(16)

        def store(run):
            for e, o in enumerate(instruction.args[1].items):
                run.device.scatter(
                    element_addresses(run, mem, stride, e, 4, True), active(run, reader(o, "b32")(run)), 4
                )

        return store
    type_a = instruction.mods[-3] if instruction.mods[-3] in ("bf16", "f16") else "f16"
    d, a, b, c = (x.items for x in instruction.args)

    def multiply(run):
        rows = warp_rows(run)
        W = run.size // 32 if rows is None else len(rows)
        A, B, C = np.empty((W, 16, 16)), np.empty((W, 16, 16)), np.empty((W, 16, 16))
        for j in range(4):
            r, k = j & 1, j >> 1
            A[:, 8 * r : 8 * r + 8, 8 * k : 8 * k + 8] = decode_elements(fragment(run, a[j], rows), type_a, W)
            B[:, 8 * r : 8 * r + 8, 8 * k : 8 * k + 8] = decode_elements(fragment(run, b[j], rows), type_a, W)
        CC = C.reshape(W, 2, 8, 2, 4, 2)
        for e in range(8):
            CC[:, e >> 1 & 1, :, e >> 2, :, e & 1] = fragment(run, c[e], rows).view(np.float32).reshape(W, 8, 4)
        D = (A @ B + C).astype(np.float32).reshape(W, 2, 8, 2, 4, 2)
        for e in range(8):
            write_warps(run, d[e], D[:, e >> 1 & 1, :, e >> 2, :, e & 1].reshape(W, 32), rows)

    return multiply
