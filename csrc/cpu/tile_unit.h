// The two matrix products of a tile on the CPU's tile unit (AMX), for 16-bit features: sixteen by sixteen results, 32 terms at
// a time, of bfloat16 numbers with sums in float.
//
// Numbers of more than 8 bits are split into two bfloat16 parts, v = high + low + O(2^-17 |v|): prototypes and dS always, float16
// features too; bfloat16 features are their own high part. Every product of parts is taken.
#pragma once

#include "vector.h"

namespace proac::PROAC_ISA {

#if defined(__AMX_BF16__)
constexpr bool kHasTileUnit = true;

// Holds the tile unit's registers in the one shape that is used, 16 rows of 64 bytes, while it lives.
class TileUnit {
 public:
  explicit TileUnit(bool wanted) : used_(wanted) {
    if (!used_) return;
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    __asm__ volatile("" ::"r"(&shape) : "memory");  // GCC takes the instruction to read a part of it
    _tile_loadconfig(&shape);
  }
  ~TileUnit() {
    if (used_) _tile_release();
  }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;

 private:
  bool used_;
};

// The nearest bfloat16 in the low half of each lane.
PROAC_INLINE Vec<uint32_t> to_bfloat16(Vec<float> v) {
  return reinterpret_cast<Vec<uint32_t>>(
      _mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)))));
}

// The right factor: rows of [length][kTile] as pairs (row 2n in the low half, row 2n + 1 in the high half), [parts][n][kTile],
// padded with zeros to whole steps.
static void pair_rows(const float* rows, int64_t length, int parts, uint32_t* pairs) {
  constexpr int lanes = kLanes<float>;
  const int64_t padded = tile_steps(length) * (kTileStep / 2), part = padded * kTile;
  for (int64_t n = 0; n < padded; ++n) {
    for (int i = 0; i < kTile; i += lanes) {
      const float* at = rows + 2 * n * kTile + i;
      const Vec<float> even = 2 * n < length ? load(at) : Vec<float>{};
      const Vec<float> odd = 2 * n + 1 < length ? load(at + kTile) : Vec<float>{};
      const Vec<uint32_t> high0 = to_bfloat16(even), high1 = to_bfloat16(odd) << 16;
      uint32_t* out = pairs + n * kTile + i;
      *reinterpret_cast<VectorOf<uint32_t>::unaligned*>(out) = high0 | high1;
      if (parts == 1) continue;
      const Vec<float> rest0 = even - reinterpret_cast<Vec<float>>(high0 << 16);
      const Vec<float> rest1 = odd - reinterpret_cast<Vec<float>>(high1);
      *reinterpret_cast<VectorOf<uint32_t>::unaligned*>(out + part) = to_bfloat16(rest0) | to_bfloat16(rest1) << 16;
    }
  }
}

// Rows of `row_tiles` tiles of the left factor times all pixels of the right one: out[row][i]. `a` is as split in anchors.h lays
// it out, [row tile][step][part][row][term], `pairs` as pair_rows does.
template <int row_tiles>
static void multiply_tiles(const uint16_t* a, int64_t steps, const uint32_t* pairs, int parts, float* out) {
  constexpr int64_t left_tile = kTileRows * kTileStep, right_step = kTileStep / 2 * kTile;
  constexpr int left_stride = kTileStep * sizeof(uint16_t), right_stride = kTile * sizeof(uint32_t);
  constexpr bool two = row_tiles == 2;
  const uint16_t* below = a + steps * 2 * left_tile;
  // The intrinsics' registers are literals, and GCC's loads do not say that they read memory.
  const auto load_left = [](const uint16_t* upper, const uint16_t* lower) PROAC_LAMBDA {
    _tile_loadd(4, upper, left_stride);
    if constexpr (two) _tile_loadd(5, lower, left_stride);
  };
  const auto load_right = [](const uint32_t* at) PROAC_LAMBDA {
    _tile_loadd(6, at, right_stride);
    _tile_loadd(7, at + 16, right_stride);
  };
  const auto multiply = []() PROAC_LAMBDA {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (two) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  __asm__ volatile("" ::: "memory");
  for (int i = 0; i < kTile; i += 32) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (two) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t step = 0; step < steps; ++step) {
      const uint32_t* right = pairs + step * right_step + i;
      const int64_t high = step * 2 * left_tile, low = high + left_tile;
      const uint32_t* rest = right + steps * right_step;
      load_left(a + low, below + low);
      if (parts == 2) {
        load_right(rest);
        multiply();
      }
      load_right(right);
      multiply();
      load_left(a + high, below + high);
      multiply();
      if (parts == 2) {
        load_right(rest);
        multiply();
      }
    }
    _tile_stored(0, out + i, right_stride);
    _tile_stored(1, out + i + 16, right_stride);
    if constexpr (two) {
      _tile_stored(2, out + kTileRows * kTile + i, right_stride);
      _tile_stored(3, out + kTileRows * kTile + i + 16, right_stride);
    }
  }
  __asm__ volatile("" ::: "memory");
}

// Up to 32 rows of the left factor, the number of them that is left.
PROAC_INLINE void multiply_some_rows(const uint16_t* a, int64_t left, int64_t steps, const uint32_t* pairs, int parts,
                                     float* out) {
  left > kTileRows ? multiply_tiles<2>(a, steps, pairs, parts, out) : multiply_tiles<1>(a, steps, pairs, parts, out);
}
#else
constexpr bool kHasTileUnit = false;

class TileUnit {
 public:
  explicit TileUnit(bool) {}
};
#endif

}  // namespace proac::PROAC_ISA
