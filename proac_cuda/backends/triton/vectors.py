"""Norms, unit vectors and products of them in the precision that the accuracy table asks for.

Tensor cores take their operands in few bits. What the products here are made of:

* float32: each operand is split in two numbers for tensor cores, three of the four products are summed (on AMD "ieee").
* 16 bits: the features are exact as they are; prototypes and coefficients are split in two 16-bit parts, v = high + low
  with |v - high - low| <= 2^-18 |v| (bfloat16; 2^-22 for float16). Since sum_d |xhat_d| |phat_d| <= 1, a cosine is off by
  at most 3.8e-6, and by about 1e-6 / sqrt(D) as a rule.
* float64: plain products. float32 and float16 features without tensor cores (sm_75, where Triton uses none): plain products of
  float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPS = tl.constexpr(1e-12)


@triton.jit
def round_to(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``value`` rounded to DTYPE. Triton's interpreter loses the carry out of a bfloat16 mantissa, so there by hand."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def split(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """``value`` as high + low in DTYPE, 16 bits each."""
    high = round_to(value, DTYPE, INTERPRETED)
    return high, round_to(value - high.to(value.dtype), DTYPE, INTERPRETED)


@triton.jit
def split_for_tf32(value):
    """``value`` (float32) as high + low: tensor cores take the first 11 bits of each, which are all of high's."""
    bits = value.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, value - high


@triton.jit
def product_in_tf32(a, b):
    """``a b``, float32, but for the product of both low parts.

    Triton's "tf32x3" is the same, but looks for infinities and NaN at each step, which takes a quarter more instructions. Here
    an infinite operand may give NaN: |x| or the coefficient's sum is then infinite, too, and NaN is what comes of it anyway.
    """
    a_high, a_low = split_for_tf32(a)
    b_high, b_low = split_for_tf32(b)
    product = tl.dot(a_low, b_high, input_precision="tf32")
    product = tl.dot(a_high, b_low, product, input_precision="tf32")
    return tl.dot(a_high, b_high, product, input_precision="tf32")


@triton.jit
def dot(a, b, total, CASE: tl.constexpr):
    """``total + a b``. The interpreter is wrong for bfloat16 operands, so there they are cast up: exactly.

    Of many float32 products one after the other, ptxas puts the last step, the addition, behind all of them, and keeps them
    in registers until then: with LOOPED, loops keep it where it is (and Triton from loading ahead in the loop around them).
    """
    if CASE.INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    elif CASE.PRECISION == "tf32x3" and CASE.LOOPED:
        for _turn in range(once(CASE)):
            total += product_in_tf32(a, b)
        return total
    elif CASE.PRECISION == "tf32x3":
        return total + product_in_tf32(a, b)
    else:
        return tl.dot(a, b, total, input_precision=CASE.PRECISION, out_dtype=total.dtype)


@triton.jit
def turned(matrix, CASE: tl.constexpr):
    """A matrix (n, BM) as products are kept, (BM, n) where CASE.PIXEL_ROWS; and back."""
    if CASE.PIXEL_ROWS:
        return tl.trans(matrix)
    else:
        return matrix


@triton.jit
def no_products(n: tl.constexpr, CASE: tl.constexpr):
    """Zeros, n for each pixel, for :func:`dot_with_pixels` to add to."""
    if CASE.PIXEL_ROWS:
        return tl.full((CASE.BM, n), 0.0, CASE.REAL)
    else:
        return tl.full((n, CASE.BM), 0.0, CASE.REAL)


@triton.jit
def dot_with_pixels(a, b, total, CASE: tl.constexpr):
    """``total + a b`` for b (n, BM); both sums as :func:`turned` has them."""
    if CASE.PIXEL_ROWS:
        return dot(tl.trans(b), tl.trans(a), total, CASE)
    else:
        return dot(a, b, total, CASE)


@triton.jit
def add_squares(squares, far_squares, values):
    """Sums of squares, plain and of the values scaled down so far that no norm within the type's range overflows."""
    FAR: tl.constexpr = 2.0**-512 if squares.dtype == tl.float64 else 2.0**-64
    far = values * FAR
    return squares + values * values, far_squares + far * far


@triton.jit
def root(value):
    """Square root, rounded to nearest."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)


@triton.jit
def quotient(a, b):
    """a / b, rounded to nearest."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def norm_and_inverse(squares, far_squares):
    """|v| from :func:`add_squares`, and 1/|v|: 0 where |v| <= EPS, NaN where |v| is beyond the type's range.

    A norm of at least EPS has squares far above the smallest float32, so only overflow needs the second sum.
    """
    FAR: tl.constexpr = 2.0**512 if squares.dtype == tl.float64 else 2.0**64
    norm = tl.where(squares == float("inf"), root(far_squares) * FAR, root(squares))
    norm = tl.where(norm == float("inf"), float("nan"), norm)
    one = tl.full(norm.shape, 1.0, norm.dtype)
    return norm, tl.where(norm <= EPS, 0.0, quotient(one, norm))


@triton.jit
def load_anchors(anchors, k, d, PART: tl.constexpr, CASE: tl.constexpr, AGAIN: tl.constexpr):
    """A block of one part of phat, (len(k), len(d)); the buffer is (parts, K_PAD, D_PAD), zero where padded, and beyond.

    AGAIN: for a second product. Were both loads alike, Triton would make them one and hold all of phat in registers between.
    """
    block = anchors + (PART * CASE.K_PAD + k[:, None]) * CASE.D_PAD + d[None, :]
    if CASE.K_PAD // CASE.KB * CASE.KB != CASE.K_PAD:
        return tl.load(block, mask=(k < CASE.K_PAD)[:, None], other=0.0)
    elif AGAIN:
        return tl.load(block, cache_modifier=".ca")
    else:
        return tl.load(block)


@triton.jit
def load_parts(anchors, k, d, CASE: tl.constexpr, AGAIN: tl.constexpr = False):
    """Both 16-bit parts of a block of phat, (KB, BD) each, as a tuple; or the block alone."""
    if CASE.PARTS == 2:
        return (load_anchors(anchors, k, d, 0, CASE, AGAIN), load_anchors(anchors, k, d, 1, CASE, AGAIN))
    else:
        return (load_anchors(anchors, k, d, 0, CASE, AGAIN),)


@triton.jit
def add_products(total, parts, x, CASE: tl.constexpr):
    """``total`` + phat[k, d] x[d]: what the channels d add to <phat_k, x_i>, as :func:`dot_with_pixels` has it.

    Features x (BD, BM) are as they lie, phat as of :func:`load_parts`.
    """
    for part in tl.static_range(len(parts)):
        total = dot_with_pixels(parts[part], x.to(parts[part].dtype), total, CASE)
    return total


@triton.jit
def opaque(x, CASE: tl.constexpr):
    """``x`` as it is, but to the compiler a value that it does not know, by an empty line of assembly.

    It then makes what follows from x here, and keeps no second form of it in registers. CASE.REGISTERS: "nvidia", "amd", or
    None for x itself.
    """
    if CASE.REGISTERS is None:
        return x
    else:
        PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth if x.dtype.primitive_bitwidth < 32 else 1
        if CASE.REGISTERS == "amd":
            return tl.inline_asm_elementwise("", "=v,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)
        elif x.dtype == tl.float64:
            return tl.inline_asm_elementwise("", "=d,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)
        elif x.dtype == tl.float32:
            return tl.inline_asm_elementwise("", "=f,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)
        else:
            return tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=PACK)


@triton.jit
def once(CASE: tl.constexpr):
    """The number of turns of a loop that goes round once, which the compiler does not know: what is in it, it leaves there."""
    return opaque(tl.full((), 1, tl.int32), CASE)


@triton.jit
def pointers(channels, image, pixel, d):
    """Where the channels d of a tile's pixels stand, (BD, BM), in features or their gradient."""
    offset = d[:, None].to(tl.int64) * channels.strides[1] + pixel[None, :].to(tl.int64) * channels.strides[2]
    return channels.data + image.to(tl.int64) * channels.strides[0] + offset


@triton.jit
def load_features(features, image, pixel, inside, d, CASE: tl.constexpr):
    """Features of a tile, (BD, BM), wherever they lie; 0 outside. What stands in ignored pixels comes along."""
    return tl.load(pointers(features, image, pixel, d), mask=(d < CASE.D)[:, None] & inside[None, :], other=0.0)
