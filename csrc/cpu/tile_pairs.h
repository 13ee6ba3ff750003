// bfloat16 numbers for the tile unit, with sums in float: what 16-bit features are multiplied as.
//
// Numbers of more than 8 bits are split into two bfloat16 parts, v = high + low + O(2^-17 |v|): prototypes and dS
// always, float16 features too; bfloat16 features are their own high part.
#pragma once

#include "tile_unit.h"

namespace proac::PROAC_ISA {

#if defined(PROAC_TILE_UNIT)
// The intrinsics' registers are literals: 0 to 3 hold the sums of two strips by two, 4 and 5 tiles of the left factor, 6
// and 7 of the right one.
template <bool two>
PROAC_INLINE void clear_sums() {
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (two) {
    _tile_zero(2);
    _tile_zero(3);
  }
}
template <bool two>
PROAC_INLINE void load_rows(const TileBlock& block, int64_t tile) {
  _tile_loadd(4, block.upper + tile * kTileBytes, 64);
  if constexpr (two) _tile_loadd(5, block.lower + tile * kTileBytes, 64);
}
PROAC_INLINE void load_pixels(const TileBlock& block, int64_t tile) {
  _tile_loadd(6, block.left + tile * kTileBytes, 64);
  _tile_loadd(7, block.right + tile * kTileBytes, 64);
}
template <bool two>
PROAC_INLINE void store_sums(void* sums) {
  constexpr int stride = kTileAcross * 4;
  int8_t* at = static_cast<int8_t*>(sums);
  _tile_stored(0, at, stride);
  _tile_stored(1, at + 64, stride);
  if constexpr (two) {
    _tile_stored(2, at + kTileRows * stride, stride);
    _tile_stored(3, at + kTileRows * stride + 64, stride);
  }
}

// The nearest bfloat16 in the low half of each lane.
PROAC_INLINE Vec<uint32_t> to_bfloat16(Vec<float> v) {
  const HalfWords words = narrow_to(static_cast<BFloat16*>(nullptr), v);
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)  // of the conversion below GCC makes two halves
  return reinterpret_cast<Vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(words)));
#else
  return __builtin_convertvector(words, Vec<uint32_t>);
#endif
}

// `products` of the parts of two numbers are taken: all, or those but of the low parts, which is below 2^-18 of the
// whole.
template <int pixel_parts, int products>
struct Pairs {
  using Sum = float;
  static constexpr int kRowParts = 2, kPixelParts = pixel_parts, kSums = 1, kRowStrips = 2;

  // The right factor, rows of [length][kTile]: 32 bits are two terms, the first in the low half.
  static void split(const float* rows, int64_t length, int8_t* tiles) {
    constexpr int lanes = kLanes<float>;
    const int64_t groups = tile_steps(length, kRowParts) * kTileRows, strip = tile_strip(length, kPixelParts);
    for (int i = 0; i < kTile; i += lanes) {
      for (int64_t group = 0; group < groups; ++group) {
        const float* at = rows + 2 * group * kTile + i;
        const Vec<float> even = 2 * group < length ? load(at) : Vec<float>{};
        const Vec<float> odd = 2 * group + 1 < length ? load(at + kTile) : Vec<float>{};
        const Vec<uint32_t> high0 = to_bfloat16(even), high1 = to_bfloat16(odd) << 16;
        uint32_t* out = pixel_terms(tiles, strip, kPixelParts, group, i);
        store<uint32_t>(out, high0 | high1);
        if constexpr (kPixelParts == 2) {
          const Vec<float> rest0 = even - reinterpret_cast<Vec<float>>(high0 << 16);
          const Vec<float> rest1 = odd - reinterpret_cast<Vec<float>>(high1);
          store<uint32_t>(out + kTileBytes / 4, to_bfloat16(rest0) | to_bfloat16(rest1) << 16);
        }
      }
    }
  }

  template <bool two>
  PROAC_MEMBER static void sum_products(const TileBlock& block, int64_t steps,
                                        Sum (*sums)[2 * kTileRows * kTileAcross]) {
    const auto multiply = []() PROAC_LAMBDA {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (two) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    };
    clear_sums<two>();
    for (int64_t step = 0; step < steps; ++step) {  // the smallest products first
      load_rows<two>(block, 2 * step + 1);
      if constexpr (products == 4) {
        load_pixels(block, 2 * step + 1);
        multiply();
      }
      load_pixels(block, kPixelParts * step);
      multiply();
      load_rows<two>(block, 2 * step);
      multiply();
      if constexpr (kPixelParts == 2) {
        load_pixels(block, 2 * step + 1);
        multiply();
      }
    }
    store_sums<two>(sums[0]);
  }

  PROAC_MEMBER static Vec<float> value(const Sum (*sums)[2 * kTileRows * kTileAcross], int at, float) {
    return load(sums[0] + at);
  }
};
#endif

}  // namespace proac::PROAC_ISA
