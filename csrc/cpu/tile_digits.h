// Whole numbers for the tile unit, with sums in 32 bits: what float32 features are multiplied as.
//
// A value becomes three digits from -128 to 127, v = unit (q0 2^16 + q1 2^8 + q2) within unit / 2: as many bits as a
// float has, counted from the largest of its row in the left factor, of its pixel in the right one. A fourth, q3 2^-8, is
// for pixels whose values differ widely. Products q_i q_j are summed exactly, in a sum for each i + j, and put together
// in float.
#pragma once

#include "tile_unit.h"

namespace proac::PROAC_ISA {

#if defined(PROAC_TILE_UNIT)
PROAC_INLINE Vec<uint32_t> nearest_integer(Vec<float> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<uint32_t>>(_mm512_cvtps_epi32(v));
#else
  return reinterpret_cast<Vec<uint32_t>>(
      __builtin_convertvector(v + (v < 0.0f ? v * 0 - 0.5f : v * 0 + 0.5f), Vec<int32_t>));
#endif
}

// Pixels have `digits` digits, and as many sums are taken, of i + j = 0, 1, ... Three leave out what is below 2^-23 of the
// largest product, for each term anew.
template <int digits>
struct Digits {
  using Sum = int32_t;
  static constexpr int kRowParts = 3, kPixelParts = digits, kSums = digits, kRowStrips = 1;

  // The right factor, rows of [length][kTile]: 32 bits are a digit of four terms. unit[i] is that of pixel i, whose
  // largest value becomes 2^22 to 2^23 of them.
  static void split(const float* rows, int64_t length, int8_t* tiles, float* unit) {
    constexpr float margin = 1 + 0x1p-7f;  // 2^23 itself would need a digit before the first
    constexpr int lanes = kLanes<float>, more_bits = 8 * (digits - 3);
    const int64_t groups = tile_steps(length, kRowParts) * kTileRows, strip = tile_strip(length, kPixelParts);
    for (int i = 0; i < kTile; i += lanes) {
      Vec<int32_t> top{};  // bits of floats without a sign are in the floats' order, NaN above all
      for (int64_t n = 0; n < length; ++n) {
        const Vec<int32_t> size = as_bits<float>(load(rows + n * kTile + i)) & 0x7fffffff;
        top = size > top ? size : top;
      }
      // The unit is 2^(exponent - 149), in two factors, since its inverse may be beyond float; so is the last digit's.
      const Vec<int32_t> exponent = as_bits<float>(from_bits<float>(top) * margin) >> 23;
      const Vec<int32_t> first = (149 - exponent) >> 1, second = 149 - exponent - first;
      const auto power = [](Vec<int32_t> of) PROAC_LAMBDA { return from_bits<float>((of + 127) << 23); };
      const Vec<float> up0 = power(first + more_bits), up1 = power(second);
      store<float>(unit + i, power(-first) * power(-second));
      for (int64_t group = 0; group < groups; ++group) {
        Vec<uint32_t> q[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
          const int64_t n = 4 * group + r;
          const Vec<float> value = n < length ? load(rows + n * kTile + i) : Vec<float>{};
          q[r] = (nearest_integer(value * up0 * up1) + kDigitOffset) ^ kDigitOffset;
        }
        constexpr uint32_t even = 0x00ff00ffu, low = 0xffffu;
        const auto merge = [](Vec<uint32_t> a, Vec<uint32_t> b) PROAC_LAMBDA { return (a & even) | (b & even) << 8; };
        const Vec<uint32_t> even01 = merge(q[0], q[1]), even23 = merge(q[2], q[3]);  // bytes 0 and 2 of the terms
        const Vec<uint32_t> odd01 = merge(q[0] >> 8, q[1] >> 8), odd23 = merge(q[2] >> 8, q[3] >> 8);
        constexpr int next = kTileBytes / 4;  // digit
        uint32_t* out = pixel_terms(tiles, strip, kPixelParts, group, i);
        if constexpr (digits == 4) {
          store<uint32_t>(out, odd01 >> 16 | (odd23 & low << 16));
          out += next;
        }
        store<uint32_t>(out, even01 >> 16 | (even23 & low << 16));
        store<uint32_t>(out + next, (odd01 & low) | odd23 << 16);
        store<uint32_t>(out + 2 * next, (even01 & low) | even23 << 16);
      }
    }
  }

  // A strip by a strip: each tile is loaded once, for all of its products, whose sums are registers 0 to 3. Two strips by
  // two, one sum after another, load no more, but the nearest cache does not hold all that they come back to.
  template <bool>
  PROAC_MEMBER static void sum_products(const TileBlock& block, int64_t steps, Sum (*sums)[kTileRows * kTileAcross]) {
    sum_products(block.upper, block.left, steps, sums, 0);
    sum_products(block.upper, block.right, steps, sums, kTileLanes);
  }

  PROAC_MEMBER static void sum_products(const int8_t* rows, const int8_t* pixels, int64_t steps,
                                        Sum (*sums)[kTileRows * kTileAcross], int at) {
    constexpr int stride = kTileAcross * 4;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    if constexpr (digits == 4) _tile_zero(3);
    for (int64_t step = 0; step < steps; ++step, rows += kRowParts * kTileBytes, pixels += kPixelParts * kTileBytes) {
      _tile_loadd(4, rows, 64);
      _tile_loadd(7, pixels, 64);
      _tile_dpbssd(0, 4, 7);
      _tile_loadd(5, rows + kTileBytes, 64);
      _tile_dpbssd(1, 5, 7);
      _tile_loadd(6, rows + 2 * kTileBytes, 64);
      _tile_dpbssd(2, 6, 7);
      _tile_loadd(7, pixels + kTileBytes, 64);
      if constexpr (digits == 4) _tile_dpbssd(3, 6, 7);
      _tile_dpbssd(1, 4, 7);
      _tile_dpbssd(2, 5, 7);
      _tile_loadd(7, pixels + 2 * kTileBytes, 64);
      if constexpr (digits == 4) _tile_dpbssd(3, 5, 7);
      _tile_dpbssd(2, 4, 7);
      if constexpr (digits == 4) {
        _tile_loadd(7, pixels + 3 * kTileBytes, 64);
        _tile_dpbssd(3, 4, 7);
      }
    }
    _tile_stored(0, sums[0] + at, stride);
    _tile_stored(1, sums[1] + at, stride);
    _tile_stored(2, sums[2] + at, stride);
    if constexpr (digits == 4) _tile_stored(3, sums[3] + at, stride);
  }

  PROAC_MEMBER static Vec<float> value(const Sum (*sums)[kTileRows * kTileAcross], int at, float unit) {
    const auto sum = [&](int order)
                         PROAC_LAMBDA { return __builtin_convertvector(load(sums[order] + at), Vec<float>); };
    Vec<float> value = sum(0) * 65536.0f + sum(1) * 256.0f + sum(2);
    if constexpr (kSums == 4) value += sum(3) * 0x1p-8f;
    return value * unit;
  }
};
#endif

}  // namespace proac::PROAC_ISA
