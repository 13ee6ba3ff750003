"""Number formats: bf16, f16, tf32 conversions and integer helpers, all on numpy arrays or numpy scalars."""

import numpy as np

UINT = {
    8: np.dtype(np.uint8),
    16: np.dtype(np.uint16),
    32: np.dtype(np.uint32),
    64: np.dtype(np.uint64),
    128: np.dtype(np.complex128),
}
SINT = {8: np.dtype(np.int8), 16: np.dtype(np.int16), 32: np.dtype(np.int32), 64: np.dtype(np.int64)}
#: PTX type name -> numpy dtype of its register image (bf16 and the packed types stay bit patterns)
DTYPE = {
    **{f"{c}{b}": UINT[b] for c in "bu" for b in UINT},
    **{f"s{b}": SINT[b] for b in SINT},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "bf16": UINT[16],
    "f16x2": UINT[32],
    "bf16x2": UINT[32],
    "tf32": np.dtype(np.float32),
    "pred": np.dtype(np.bool_),
}
#: types in which arithmetic is done in a wider format
BITS = {t: d.itemsize * 8 for t, d in DTYPE.items()}
BITS["pred"] = 1


def bf16_to_f32(bits):
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x, mode="rn"):
    """float32 -> bf16 bit pattern; 'rn' nearest even, 'rz' toward zero; NaN becomes 0x7fff."""
    i = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))
    r = (
        i >> np.uint32(16)
        if mode == "rz"
        else (i + (np.uint32(0x7FFF) + ((i >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    )
    nan = (i & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, np.uint16(0x7FFF), r.astype(np.uint16))


def f32_to_f16(x, mode="rn"):
    h = np.asarray(x).astype(np.float16)
    if mode == "rz":
        over = np.abs(h.astype(np.float64)) > np.abs(np.asarray(x, np.float64))
        h = np.where(over, np.nextafter(h, np.float16(0)), h)
    return h


def f32_to_tf32(x, mode="rna"):
    """Round float32 to 10 mantissa bits: 'rna' ties away (cvt.rna), 'rn' nearest even, 'rz' truncation (what mma does)."""
    i = np.ascontiguousarray(x, np.float32).view(np.uint32).reshape(np.shape(x))
    if mode == "rna":
        r = i + np.uint32(0x1000)
    elif mode == "rn":
        r = i + np.uint32(0xFFF) + ((i >> np.uint32(13)) & np.uint32(1))
    else:
        r = i
    special = (i & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    return np.where(special, i, r & np.uint32(0xFFFFE000)).view(np.float32)


def f64_to_f32(x, mode="rn"):
    """float64 -> float32 with a PTX rounding mode (rn, rz, rm, rp)."""
    x = np.asarray(x, np.float64)
    r = x.astype(np.float32)
    if mode == "rn":
        return r
    back = r.astype(np.float64)
    down, up = np.nextafter(r, np.float32(-np.inf)), np.nextafter(r, np.float32(np.inf))
    lower, upper = np.where(back > x, down, r), np.where(back < x, up, r)
    return {"rm": lower, "rp": upper, "rz": np.where(x >= 0, lower, upper)}[mode].astype(np.float32)


def flush(x):
    """Flush denormal float32 to zero, sign kept (.ftz)."""
    return np.where(np.abs(x) < np.float32(1.17549435e-38), np.copysign(np.float32(0), x), x)


def mul_hi_u64(a, b):
    m, s = np.uint64(0xFFFFFFFF), np.uint64(32)
    al, ah, bl, bh = a & m, a >> s, b & m, b >> s
    mid = ah * bl + ((al * bl) >> s)
    mid2 = al * bh + (mid & m)
    return ah * bh + (mid >> s) + (mid2 >> s)


def mul_hi(a, b):
    """High half of the product of two equal-width integer arrays, signed or unsigned by dtype."""
    a, b = np.asarray(a), np.asarray(b)
    bits, signed = a.dtype.itemsize * 8, a.dtype.kind == "i"
    if bits < 64:
        wide = (SINT if signed else UINT)[2 * bits]
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(bits)).astype(a.dtype)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    hi = mul_hi_u64(ua, ub)
    if signed:
        hi = hi - np.where(a < 0, ub, np.uint64(0)) - np.where(b < 0, ua, np.uint64(0))
    return hi.view(a.dtype)


def bit_length(x):
    """Position of the highest set bit plus one (0 for 0), exact up to 64 bits."""
    x = np.asarray(x).astype(np.uint64)
    n = np.zeros(x.shape, np.uint32)
    for s in (32, 16, 8, 4, 2, 1):
        big = x >= (np.uint64(1) << np.uint64(s))
        n = n + np.where(big, np.uint32(s), np.uint32(0))
        x = np.where(big, x >> np.uint64(s), x)
    return n + (x != 0).astype(np.uint32)


def reverse_bits(x):
    x = np.asarray(x)
    u = x.dtype.type
    n = x.dtype.itemsize * 8
    for s, m in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
        (16, 0x0000FFFF0000FFFF),
        (32, 0x00000000FFFFFFFF),
    ):
        if s < n:
            m = u(m & ((1 << n) - 1))
            x = ((x >> u(s)) & m) | ((x & m) << u(s))
    return x


def round_int(x, mode):
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def float_to_int(x, dtype, mode):
    """Saturating conversion; NaN gives 0 (PTX gives 0 for 32 bits and below)."""
    info = np.iinfo(dtype)
    v = round_int(np.asarray(x).astype(np.float64), mode)
    hi_excl = float(info.max) + 1.0 if info.bits < 64 else float(2.0 ** (info.bits - (1 if info.min < 0 else 0)))
    big, small = v >= hi_excl, v < float(info.min)
    safe = np.where(np.isnan(v) | big | small, 0.0, v)
    r = safe.astype(dtype)
    return np.where(big, dtype.type(info.max), np.where(small, dtype.type(info.min), r)).astype(dtype)
