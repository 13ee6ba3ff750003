"""The PTX interpreter's instructions, one by one, on random operands: against Python's integers and numpy's floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

import ptxsim
from ptxsim.numeric import bf16_to_f32, f32_to_bf16

MAX32, MAX64 = (1 << 32) - 1, (1 << 64) - 1
HEAD = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
.reg .b32 %a<9>, %o<9>, %t<9>;
.reg .b64 %b<9>, %q<9>, %ad<9>;
.reg .b16 %h<9>;
.reg .pred %p<9>;
mov.u32 %t0, %tid.x;
"""


def run_ptx(body: str, inputs: Sequence[np.ndarray], dtype: type, outs: int = 1) -> list[np.ndarray]:
    """One thread for each element: inputs in %h0, %a0, %b0, ... by their size, results from %h8, %o0, %q0, ..."""
    count = len(inputs[0])
    parameters = ", ".join(f".param .u64 p{i}" for i in range(len(inputs) + outs))
    text = f"{HEAD}.visible .entry k({parameters})\n{{{REGISTERS}"
    for i, values in enumerate(inputs):
        width = values.dtype.itemsize
        register = {2: "%h", 4: "%a", 8: "%b"}[width]
        text += f"ld.param.u64 %ad0, [p{i}];\nmad.wide.u32 %ad0, %t0, {width}, %ad0;\n"
        text += f"ld.global.b{8 * width} {register}{i}, [%ad0];\n"
    text += body + "\n"
    width = np.dtype(dtype).itemsize
    for j in range(outs):
        register = {2: "%h8", 4: f"%o{j}", 8: f"%q{j}"}[width]
        text += f"ld.param.u64 %ad0, [p{len(inputs) + j}];\nmad.wide.u32 %ad0, %t0, {width}, %ad0;\n"
        text += f"st.global.b{8 * width} [%ad0], {register};\n"
    device = ptxsim.Device(1 << 22, seed=0)
    results = [device.empty(count, dtype) for _ in range(outs)]
    device.launch(ptxsim.loads(text + "ret;\n}\n"), "k", 1, count, [device.array(x) for x in inputs] + results)
    return [result.get() for result in results]


def random_bits(bits: int, seed: int, count: int = 64) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, MAX64, count, dtype=np.uint64, endpoint=True)
    values[:6] = [0, 1, MAX64, 1 << 63, 1 << 31, 0x7FFFFFFF]
    return values.astype({32: np.uint32, 64: np.uint64}[bits])


def signed(x: int, bits: int = 32) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def field(bits: int) -> int:
    return (1 << bits) - 1


def bit_field(a: int, position: int, length: int) -> int:
    """bfe.s32: the field's top bit, or bit 31 beyond it, is its sign."""
    sign = a >> min(position + length - 1, 31) & 1
    return sum(((a >> (position + i) & 1) if i < length and position + i <= 31 else sign) << i for i in range(32))


def permuted(a: int, b: int, selector: int) -> int:
    out = 0
    for j in range(4):
        choice = selector >> 4 * j & 15
        byte = (a | b << 32) >> 8 * (choice & 7) & 255
        out |= ((255 if byte & 128 else 0) if choice & 8 else byte) << 8 * j
    return out


def table(a: int, b: int, c: int) -> int:
    """lop3 with the table 0x1b."""
    return sum((0x1B >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32))


def truncated(a: int, b: int, bits: int = 32) -> tuple[int, int]:
    """Quotient toward zero, and the remainder that belongs to it."""
    sign = 1 if signed(a, bits) >= 0 else -1
    return abs(signed(a, bits)) // b * sign, abs(signed(a, bits)) % b * sign


CASES_32 = {
    "mul.hi.u32 %o0, %a0, %a1;": lambda a, b, c: a * b >> 32,
    "mul.hi.s32 %o0, %a0, %a1;": lambda a, b, c: signed(a) * signed(b) >> 32,
    "mad.hi.u32 %o0, %a0, %a1, %a2;": lambda a, b, c: (a * b >> 32) + c,
    "mad.lo.s32 %o0, %a0, %a1, %a2;": lambda a, b, c: a * b + c,
    "prmt.b32 %o0, %a0, %a1, %a2;": permuted,
    "prmt.b32 %o0, %a0, %a1, 0x5410;": lambda a, b, c: (a & 0xFFFF) | (b & 0xFFFF) << 16,
    "lop3.b32 %o0, %a0, %a1, %a2, 0x96;": lambda a, b, c: a ^ b ^ c,
    "lop3.b32 %o0, %a0, %a1, %a2, 0x1b;": table,
    "shf.l.wrap.b32 %o0, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) << (c & 31) >> 32,
    "shf.r.wrap.b32 %o0, %a0, %a1, %a2;": lambda a, b, c: (b << 32 | a) >> (c & 31),
    "and.b32 %t1, %a2, 63; shf.l.clamp.b32 %o0, %a0, %a1, %t1;": lambda a, b, c: (b << 32 | a) << min(c & 63, 32) >> 32,
    "and.b32 %t1, %a2, 63; shf.r.clamp.b32 %o0, %a0, %a1, %t1;": lambda a, b, c: (b << 32 | a) >> min(c & 63, 32),
    "and.b32 %t1, %a1, 63; bfe.u32 %o0, %a0, %t1, 9;": lambda a, b, c: a >> (b & 63) & field(9),
    "bfe.s32 %o0, %a0, 5, 9;": lambda a, b, c: bit_field(a, 5, 9),
    "bfe.s32 %o0, %a0, 28, 9;": lambda a, b, c: bit_field(a, 28, 9),
    "bfi.b32 %o0, %a0, %a1, 7, 13;": lambda a, b, c: b & ~(field(13) << 7) | (a & field(13)) << 7,
    "brev.b32 %o0, %a0;": lambda a, b, c: int(f"{a:032b}"[::-1], 2),
    "popc.b32 %o0, %a0;": lambda a, b, c: a.bit_count(),
    "clz.b32 %o0, %a0;": lambda a, b, c: 32 - a.bit_length(),
    "bfind.u32 %o0, %a0;": lambda a, b, c: a.bit_length() - 1,
    "bfind.shiftamt.u32 %o0, %a0;": lambda a, b, c: 32 - a.bit_length() if a else MAX32,
    "bfind.s32 %o0, %a0;": lambda a, b, c: (~signed(a) if signed(a) < 0 else a).bit_length() - 1,
    "and.b32 %t1, %a1, 63; shl.b32 %o0, %a0, %t1;": lambda a, b, c: a << (b & 63) if b & 63 < 32 else 0,
    "and.b32 %t1, %a1, 63; shr.s32 %o0, %a0, %t1;": lambda a, b, c: signed(a) >> min(b & 63, 31),
    "div.s32 %o0, %a0, 7;": lambda a, b, c: truncated(a, 7)[0],
    "rem.s32 %o0, %a0, 7;": lambda a, b, c: truncated(a, 7)[1],
    "div.u32 %o0, %a0, 7;": lambda a, b, c: a // 7,
    "slct.s32.s32 %o0, %a0, %a1, %a2;": lambda a, b, c: a if signed(c) >= 0 else b,
    "setp.lt.s32 %p1|%p2, %a0, %a1; selp.b32 %o0, 1, 0, %p1; @%p2 add.u32 %o0, %o0, 2;": (
        lambda a, b, c: 1 if signed(a) < signed(b) else 2
    ),
    "setp.eq.u32 %p8, %t0, %t0; setp.hs.and.u32 %p1, %a0, %a1, %p8; selp.b32 %o0, 1, 0, %p1;": (
        lambda a, b, c: int(a >= b)
    ),
    "set.ge.u32.s32 %o0, %a0, %a1;": lambda a, b, c: MAX32 if signed(a) >= signed(b) else 0,
    "add.cc.u32 %t1, %a0, %a1; addc.u32 %o0, %a2, 0;": lambda a, b, c: c + (a + b >> 32),
    "sub.cc.u32 %t1, %a0, %a1; subc.u32 %o0, %a2, 0;": lambda a, b, c: c - (a < b),
    "cvt.u32.u8 %o0, %a0;": lambda a, b, c: a & 255,
    "cvt.s32.s8 %o0, %a0;": lambda a, b, c: signed(a & 255, 8),
    "cvt.sat.s8.s32 %o0, %a0;": lambda a, b, c: max(-128, min(127, signed(a))),
    "mul24.lo.u32 %o0, %a0, %a1;": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF),
}


@pytest.mark.parametrize("code", CASES_32)
def test_integers_of_32_bits(code: str) -> None:
    operands = [random_bits(32, seed) for seed in (1, 2, 3)]
    (got,) = run_ptx(code, operands, np.uint32)
    expected = [CASES_32[code](int(a), int(b), int(c)) & MAX32 for a, b, c in zip(*operands, strict=True)]
    assert got.tolist() == expected


CASES_64 = {
    "mul.hi.u64 %q0, %b0, %b1;": lambda a, b: a * b >> 64,
    "mul.hi.s64 %q0, %b0, %b1;": lambda a, b: signed(a, 64) * signed(b, 64) >> 64,
    "mul.lo.u64 %q0, %b0, %b1;": lambda a, b: a * b,
    "brev.b64 %q0, %b0;": lambda a, b: int(f"{a:064b}"[::-1], 2),
    "bfe.u64 %q0, %b0, 9, 50;": lambda a, b: a >> 9 & field(50),
    "bfi.b64 %q0, %b0, %b1, 40, 30;": lambda a, b: b & ~(field(30) << 40) | (a & field(30)) << 40,
    "mov.b64 {%t1, %t2}, %b0; mov.b64 %q0, {%t2, %t1};": lambda a, b: a >> 32 | (a & MAX32) << 32,
    "mov.b64 {%t1, %t2}, %b0; mul.wide.s32 %q0, %t1, %t2;": lambda a, b: signed(a & MAX32) * signed(a >> 32),
    "mov.b64 {%t1, %t2}, %b0; mad.wide.u32 %q0, %t1, %t2, %b1;": lambda a, b: (a & MAX32) * (a >> 32) + b,
    "popc.b64 %t1, %b0; cvt.u64.u32 %q0, %t1;": lambda a, b: a.bit_count(),
    "clz.b64 %t1, %b0; cvt.u64.u32 %q0, %t1;": lambda a, b: 64 - a.bit_length(),
    "div.u64 %q0, %b0, 1000003;": lambda a, b: a // 1000003,
    "rem.s64 %q0, %b0, 1000003;": lambda a, b: truncated(a, 1000003, 64)[1],
    ".reg .b128 %w<2>; mov.b128 %w1, {%b0, %b1}; mov.b128 {%q1, %q0}, %w1;": lambda a, b: b,
}


@pytest.mark.parametrize("code", CASES_64)
def test_integers_of_64_bits(code: str) -> None:
    operands = [random_bits(64, seed) for seed in (4, 5)]
    (got,) = run_ptx(code, operands, np.uint64)
    assert got.tolist() == [CASES_64[code](int(a), int(b)) & MAX64 for a, b in zip(*operands, strict=True)]


def floats(seed: int, count: int = 64) -> np.ndarray:
    generator = np.random.default_rng(seed)
    x = (generator.standard_normal(count) * 10.0 ** generator.integers(-3, 5, count)).astype(np.float32)
    x[:4] = [0, np.nan, np.inf, -1]
    return x


@pytest.mark.parametrize(
    ("operation", "function"),
    [
        ("add.rn.f32", np.add),
        ("add.ftz.f32", np.add),
        ("mul.rn.f32", np.multiply),
        ("div.rn.f32", np.divide),
        ("min.f32", np.fmin),
        ("max.NaN.f32", np.maximum),
        ("add.sat.f32", lambda a, b: np.where(np.isnan(a + b), 0, np.clip(a + b, 0, 1))),
        ("set.ltu.f32.f32", lambda a, b: ~(a >= b)),
        ("set.ne.f32.f32", lambda a, b: (a < b) | (a > b)),
        ("set.num.f32.f32", lambda a, b: ~np.isnan(a) & ~np.isnan(b)),
    ],
)
def test_floats(operation: str, function: np.ufunc) -> None:
    a, b = floats(1), floats(2)[::-1].copy()
    (got,) = run_ptx(f"{operation} %o0, %a0, %a1;", [a, b], np.float32)
    assert np.array_equal(got, function(a, b).astype(np.float32), equal_nan=True)


@pytest.mark.parametrize("operation", ["fma.rn", "add", "mul", "max", "sub", "min"])
@pytest.mark.parametrize("type_", ["bf16x2", "f16x2"])
def test_packed_floats(operation: str, type_: str) -> None:
    def encode(x: np.ndarray) -> np.ndarray:
        return f32_to_bf16(x) if type_ == "bf16x2" else x.astype(np.float16).view(np.uint16)

    def decode(x: np.ndarray) -> np.ndarray:
        return bf16_to_f32(x) if type_ == "bf16x2" else x.view(np.float16).astype(np.float32)

    bits = encode((np.random.default_rng(0).standard_normal((3, 128)) * 4).astype(np.float32))
    a, b, c = decode(bits)
    expected = {
        "fma.rn": (a.astype(float) * b + c).astype(np.float32),
        "add": a + b,
        "mul": a * b,
        "sub": a - b,
        "max": np.maximum(a, b),
        "min": np.minimum(a, b),
    }[operation]
    third = ", %a2" if operation == "fma.rn" else ""
    (got,) = run_ptx(f"{operation}.{type_} %o0, %a0, %a1{third};", list(bits.view(np.uint32)), np.uint32)
    assert (got.view(np.uint16) == encode(expected)).all()


def test_conversions() -> None:
    x = floats(7)
    (got,) = run_ptx("cvt.rn.bf16x2.f32 %o0, %a0, %a1;", [x, x[::-1].copy()], np.uint32)
    assert (got == (f32_to_bf16(x).astype(np.uint32) << 16 | f32_to_bf16(x[::-1]))).all()
    (got,) = run_ptx("cvt.rna.tf32.f32 %o0, %a0;", [x], np.float32)
    finite = np.isfinite(x)
    assert (np.abs(got - x)[finite] <= np.abs(x[finite]) * 2.0**-11).all()
    assert not (got.view(np.uint32)[finite] & 0x1FFF).any()
    for mode, function in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
        (got,) = run_ptx(f"cvt.{mode}.s32.f32 %o0, %a0;", [x], np.int32)
        assert (got == np.where(np.isnan(x), 0, np.clip(function(x.astype(float)), -(2**31), 2**31 - 1))).all()
        (got,) = run_ptx(f"cvt.{mode}.f32.f32 %o0, %a0;", [x], np.float32)
        assert np.array_equal(got, function(x), equal_nan=True)
    wide = np.random.default_rng(0).standard_normal(64)
    for mode in ("rz", "rm", "rp"):
        (got,) = run_ptx(f"cvt.{mode}.f32.f64 %o0, %b0;", [wide], np.float32)
        right = {"rz": np.abs(got) <= np.abs(wide), "rm": got <= wide, "rp": got >= wide}[mode]
        assert right.all() and (np.abs(got - wide) <= np.abs(wide) * 2.0**-23).all()
    (got,) = run_ptx("cvt.rn.f16.f32 %h8, %a0; cvt.f32.f16 %o0, %h8;", [x], np.float32)
    assert np.array_equal(got, x.astype(np.float16).astype(np.float32), equal_nan=True)


def test_instructions_of_a_warp() -> None:
    a = random_bits(32, 9) % np.uint32(7)
    code = """
        match.any.sync.b32 %o0, %a0, -1;
        redux.sync.add.u32 %o1, %a0, -1;
        setp.gt.u32 %p0, %a0, 3;
        vote.sync.ballot.b32 %o2, %p0, -1;
        shfl.sync.up.b32 %o3|%p1, %a0, 3, 0, -1;
        @!%p1 mov.u32 %o3, 99;
        redux.sync.max.s32 %o4, %a0, -1;"""
    same, total, ballot, shifted, largest = (x.reshape(2, 32) for x in run_ptx(code, [a], np.uint32, 5))
    for row, lanes in enumerate(a.reshape(2, 32)):
        assert same[row].tolist() == [sum(1 << j for j in range(32) if lanes[j] == value) for value in lanes]
        assert (total[row] == lanes.sum()).all() and (largest[row] == lanes.max()).all()
        assert (ballot[row] == sum(1 << j for j in range(32) if lanes[j] > 3)).all()
        assert shifted[row].tolist() == [99] * 3 + lanes[:29].tolist()


def test_a_predicate_may_leave_whole_warps_out_of_a_collective() -> None:
    a = random_bits(32, 9)
    code = "mov.u32 %o0, 5; setp.lt.u32 %p0, %t0, 32; @%p0 shfl.sync.bfly.b32 %o0, %a0, 1, 31, -1;"
    (got,) = run_ptx(code, [a], np.uint32)
    assert (got[:32] == a[:32].reshape(16, 2)[:, ::-1].ravel()).all() and (got[32:] == 5).all()


FORMATS = {
    "f16": (lambda x: x.astype(np.float16).view(np.uint16), lambda x: x.view(np.float16).astype(float)),
    "bf16": (lambda x: f32_to_bf16(x.astype(np.float32)), lambda x: bf16_to_f32(x).astype(float)),
    "tf32": (
        lambda x: x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000),
        lambda x: x.view(np.float32).astype(float),
    ),
    "f64": (lambda x: x.view(np.uint64), lambda x: x.view(np.float64)),
}


@pytest.mark.parametrize(
    ("rows", "depth", "type_"),
    [
        (16, 16, "bf16"),
        (16, 8, "bf16"),
        (16, 16, "f16"),
        (16, 8, "f16"),
        (16, 8, "tf32"),
        (16, 4, "tf32"),
        (8, 4, "f64"),
        (16, 8, "f64"),
    ],
)
def test_matrix_products(rows: int, depth: int, type_: str) -> None:
    """mma.sync: the operands laid out over the lanes as the PTX manual's figures have them."""
    generator = np.random.default_rng(0)
    encode, decode = FORMATS[type_]
    a, b = encode(generator.standard_normal((rows, depth))), encode(generator.standard_normal((depth, 8)))
    is_double = type_ == "f64"
    register = np.dtype(np.uint64 if is_double else np.uint32)
    per = register.itemsize // a.dtype.itemsize  # elements a register
    group, lane = np.divmod(np.arange(32), 4)

    def pack(elements: list[np.ndarray]) -> np.ndarray:
        return np.stack(elements, -1).copy().view(register).reshape(32)

    operands = []
    for i in range(rows * depth // 32 // per):
        row, column = group + 8 * (i % (rows // 8)), lane * per + 4 * per * (i // (rows // 8))
        operands.append(pack([a[row, column + e] for e in range(per)]))
    of_a = len(operands)
    for i in range(depth * 8 // 32 // per):
        operands.append(pack([b[lane * per + e + 4 * per * i, group] for e in range(per)]))
    source, out, zero, result = (
        ("%b", "%q", "0d0000000000000000", "f64") if is_double else ("%a", "%o", "0f00000000", "f32")
    )

    def vector(names: Sequence[str]) -> str:
        return "{" + ",".join(names) + "}"

    names, count = [f"{source}{i}" for i in range(len(operands))], rows // 4
    code = (
        f"mma.sync.aligned.m{rows}n8k{depth}.row.col.{result}.{type_}.{type_}.{result} "
        f"{vector([f'{out}{i}' for i in range(count)])}, {vector(names[:of_a])}, {vector(names[of_a:])}, "
        f"{vector([zero] * count)};"
    )
    expected = decode(a) @ decode(b)
    for e, got in enumerate(run_ptx(code, operands, np.float64 if is_double else np.float32, count)):
        error = np.abs(got - expected[group + 8 * (e >> 1), 2 * lane + (e & 1)]).max()
        assert error < (1e-14 if is_double else 2e-6)


def test_transposed_matrix() -> None:
    matrix = random_bits(32, 1, 32).view(np.uint16).reshape(8, 8)
    (got,) = run_ptx("movmatrix.sync.aligned.m8n8.trans.b16 %o0, %a0;", [matrix.view(np.uint32).ravel()], np.uint32)
    assert (got.view(np.uint16).reshape(8, 8) == matrix.T).all()


def test_sectors_belong_to_their_array() -> None:
    """c[i] = a[i] + (a or b)[i]: one load of it goes to two arrays."""
    text = f"""{HEAD}.visible .entry k(.param .u64 a, .param .u64 b, .param .u64 c)
        {{{REGISTERS}
        ld.param.u64 %b1, [a];
        ld.param.u64 %b2, [b];
        ld.param.u64 %b3, [c];
        mov.u32 %t1, %ctaid.x;
        mov.u32 %t2, %ntid.x;
        mad.lo.s32 %t4, %t1, %t2, %t0;
        mul.wide.s32 %b4, %t4, 4;
        add.s64 %b5, %b1, %b4;
        ld.global.f32 %a1, [%b5];
        and.b32 %t5, %t4, 1;
        setp.eq.s32 %p1, %t5, 0;
        selp.b64 %b6, %b1, %b2, %p1;
        add.s64 %b6, %b6, %b4;
        ld.global.f32 %a2, [%b6];
        add.f32 %a3, %a1, %a2;
        add.s64 %b7, %b3, %b4;
        st.global.f32 [%b7], %a3;
        ret;
        }}"""
    count = 512
    device = ptxsim.Device(seed=0)
    a, b = device.array(np.arange(count, dtype=np.float32)), device.array(np.ones(count, np.float32))
    c = device.empty(count)
    counters = device.launch(ptxsim.loads(text), "k", 2, 256, [a, b, c])
    i = np.arange(count)
    assert (c.get() == i + np.where(i % 2 == 0, i, 1)).all()
    full = count * 4 // 32
    nothing = dict.fromkeys(("read_sectors", "write_sectors", "read_footprint", "write_footprint"), 0)
    assert a.traffic == {**nothing, "read_sectors": 2 * full, "read_footprint": full}
    assert b.traffic == {**nothing, "read_sectors": full, "read_footprint": full}
    assert c.traffic == {**nothing, "write_sectors": full, "write_footprint": full}
    assert counters.global_read_sectors == 3 * full and counters.global_write_sectors == full
    assert counters.warp_instructions * 32 == counters.thread_instructions == 19 * count


def test_text_that_is_cut_short_is_named() -> None:
    with pytest.raises(ptxsim.Fault, match="cut.ptx: k has no end"):
        ptxsim.loads(".version 8.0\n.target sm_80\n.entry k() {\n { ret; }\n", "cut.ptx")
