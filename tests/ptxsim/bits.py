"""Logic, shifts, bit fields, byte permutation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import elementwise
from .numeric import DTYPE, UINT, bit_length, reverse_bits
from .operands import reader, register_bits, write
from .syntax import Fault, Imm, Instruction

if TYPE_CHECKING:
    from .run import Run
    from .syntax import Step


def bitwise(f):
    return lambda instruction: elementwise(instruction, f)


op_and, op_or, op_xor = bitwise(np.bitwise_and), bitwise(np.bitwise_or), bitwise(np.bitwise_xor)


op_not = bitwise(np.invert)


def op_cnot(instruction: Instruction) -> Step:
    return elementwise(instruction, lambda a: (a == 0).astype(a.dtype))


def op_shl(instruction: Instruction) -> Step:
    return shift(instruction, np.left_shift)


def op_shr(instruction: Instruction) -> Step:
    return shift(instruction, np.right_shift)


def shift(instruction, f):
    type_ = instruction.mods[-1]
    bits, signed = DTYPE[type_].itemsize * 8, type_[0] == "s" and instruction.op == "shr"
    a, dest, dt = reader(instruction.args[1], type_), instruction.args[0], DTYPE[type_]
    if isinstance(instruction.args[2], Imm):
        n = int(instruction.args[2].text.rstrip("U"), 0)
        if n < bits:
            k = dt.type(n)
            return lambda run: write(run, dest, f(a(run), k))
    amount = reader(instruction.args[2], "u32")

    def execute(run: Run) -> None:
        n, x = amount(run), a(run)
        r = f(x, np.minimum(n, bits - 1).astype(dt))
        write(run, dest, r if signed else np.where(n >= bits, dt.type(0), r))

    return execute


def op_shf(instruction: Instruction) -> Step:
    lo, hi, amount = (reader(x, "u32") for x in instruction.args[1:4])
    right, wrap = "r" in instruction.mods, "wrap" in instruction.mods

    def execute(run: Run) -> None:
        n = amount(run)
        n = (n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        v = (hi(run).astype(np.uint64) << np.uint64(32)) | lo(run)
        write(run, instruction.args[0], (v >> n if right else (v << n) >> np.uint64(32)).astype(np.uint32))

    return execute


def op_bfe(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    bits, signed = DTYPE[type_].itemsize * 8, type_[0] == "s"
    a, pos, length = (
        reader(instruction.args[1], type_),
        reader(instruction.args[2], "u32"),
        reader(instruction.args[3], "u32"),
    )

    def execute(run: Run) -> None:
        x, p, n = a(run), pos(run) & np.uint32(255), length(run) & np.uint32(255)
        n64 = np.minimum(n, 64).astype(np.uint64)
        w = x.astype(np.int64 if signed else np.uint64)
        w = np.right_shift(w, np.minimum(p, 63).astype(w.dtype))
        if not signed:
            w = np.where(p >= bits, np.uint64(0), w)
            m = np.where(
                n64 >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), (np.uint64(1) << (n64 & np.uint64(63))) - np.uint64(1)
            )
            write(run, instruction.args[0], (w & m).astype(DTYPE[type_]))
        else:
            s = np.where(
                (n64 >= 64) | (p.astype(np.uint64) + n64 >= bits), np.int64(0), (np.uint64(64) - n64).astype(np.int64)
            )
            r = np.right_shift(np.left_shift(w, s & 63), s & 63)
            write(run, instruction.args[0], np.where(n == 0, np.int64(0), r).astype(DTYPE[type_]))

    return execute


def op_bfi(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    a, b = reader(instruction.args[1], type_), reader(instruction.args[2], type_)
    pos, length = reader(instruction.args[3], "u32"), reader(instruction.args[4], "u32")
    bits = DTYPE[type_].itemsize * 8

    def execute(run: Run) -> None:
        p, n = (pos(run) & np.uint32(255)).astype(np.uint64), (length(run) & np.uint32(255)).astype(np.uint64)
        m = np.where(n >= 64, np.uint64(0xFFFFFFFFFFFFFFFF), (np.uint64(1) << (n & np.uint64(63))) - np.uint64(1))
        m = np.where(p >= bits, np.uint64(0), m << (p & np.uint64(63)))
        x, y = a(run).astype(np.uint64), b(run).astype(np.uint64)
        write(run, instruction.args[0], ((y & ~m) | ((x << (p & np.uint64(63))) & m)).astype(DTYPE[type_]))

    return execute


def op_bmsk(instruction: Instruction) -> Step:
    return elementwise(
        instruction,
        lambda p, n: (
            ((np.uint64(1) << np.minimum(n, 32).astype(np.uint64)) - np.uint64(1))
            << np.minimum(p, 32).astype(np.uint64)
        ).astype(np.uint32),
        type_="u32",
    )


def op_prmt(instruction: Instruction) -> Step:
    a, b, c = (reader(x, "u32") for x in instruction.args[1:4])
    mode = instruction.mods[-1] if instruction.mods[-1] != "b32" else None
    const = (
        int(instruction.args[3].text.rstrip("U"), 0) if isinstance(instruction.args[3], Imm) and mode is None else None
    )

    def execute(run: Run) -> None:
        v = (b(run).astype(np.uint64) << np.uint64(32)) | a(run)
        r = np.uint32(0)
        sel = c(run)
        for j in range(4):
            if mode is not None:
                k = (sel & np.uint32(3)).astype(np.int64)
                q = {
                    "f4e": k + j,
                    "b4e": (k - j) & 7,
                    "rc8": k,
                    "ecl": np.maximum(k, j),
                    "ecr": np.minimum(k, j),
                    "rc16": (k & 1) * 2 + (j & 1),
                }[mode]
                byte, sign = (v >> (q.astype(np.uint64) * np.uint64(8))) & np.uint64(255), None
            elif const is not None:
                q = const >> (4 * j) & 15
                byte, sign = (v >> np.uint64(8 * (q & 7))) & np.uint64(255), q & 8 or None
            else:
                q = (sel >> np.uint32(4 * j)) & np.uint32(15)
                byte, sign = (
                    (v >> ((q & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255),
                    (q & np.uint32(8)) != 0,
                )
            if sign is not None:
                byte = np.where(sign, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
            r = r | (byte.astype(np.uint32) << np.uint32(8 * j))
        write(run, instruction.args[0], np.asarray(r))

    return execute


def op_lop3(instruction: Instruction) -> Step:
    a, b, c = (reader(x, "u32") for x in instruction.args[1:4])
    table = int(instruction.args[4].text, 0)
    common = {
        0x96: lambda x, y, z: x ^ y ^ z,
        0xE8: lambda x, y, z: (x & y) | (y & z) | (x & z),
        0xCA: lambda x, y, z: (x & y) | (~x & z),
        0x80: lambda x, y, z: x & y & z,
        0xFE: lambda x, y, z: x | y | z,
        0xF8: lambda x, y, z: x | (y & z),
        0xEA: lambda x, y, z: (x & y) | z,
        0x6A: lambda x, y, z: (x & y) ^ z,
        0x78: lambda x, y, z: x ^ (y & z),
        0xA8: lambda x, y, z: (x | y) & z,
        0xE0: lambda x, y, z: x & (y | z),
    }

    def general(x, y, z):
        r = np.uint32(0)
        for j in range(8):
            if table >> j & 1:
                r = r | ((x if j & 4 else ~x) & (y if j & 2 else ~y) & (z if j & 1 else ~z))
        return r

    f = common.get(table, general)
    return lambda run: write(run, instruction.args[0], np.asarray(f(a(run), b(run), c(run))))


def op_popc(instruction: Instruction) -> Step:
    a = reader(instruction.args[1], "u" + instruction.mods[-1][1:])
    return lambda run: write(run, instruction.args[0], np.asarray(np.bitwise_count(a(run))).astype(np.uint32))


def op_clz(instruction: Instruction) -> Step:
    a, bits = (
        reader(instruction.args[1], "u" + instruction.mods[-1][1:]),
        np.uint32(register_bits(instruction.mods[-1])),
    )
    return lambda run: write(run, instruction.args[0], np.asarray(bits - bit_length(a(run))))


def op_bfind(instruction: Instruction) -> Step:
    type_ = instruction.mods[-1]
    a, bits = reader(instruction.args[1], type_), register_bits(type_)

    def execute(run: Run) -> None:
        x = a(run)
        if type_[0] == "s":
            x = np.where(x < 0, ~x, x).astype(x.dtype).view(UINT[bits])
        n = bit_length(x)
        r = (np.uint32(bits) - n) if "shiftamt" in instruction.mods else n - np.uint32(1)
        write(run, instruction.args[0], np.where(n == 0, np.uint32(0xFFFFFFFF), r).astype(np.uint32))

    return execute


def op_brev(instruction: Instruction) -> Step:
    return elementwise(instruction, reverse_bits)


def op_fns(instruction: Instruction) -> Step:
    raise Fault("fns is not supported")
