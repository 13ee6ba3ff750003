// The CPU's tile unit (AMX): sixteen rows of a left factor times sixteen pixels of a right one, 64 bytes of terms at a
// time. Its registers, and the loop over rows and pixels that products of bfloat16 numbers (tile_pairs.h) and of digits
// (tile_digits.h) share.
//
// Both factors are kept as the tiles that it loads, 1 KiB each: [strip][step][part][row or group of terms][64 bytes]. A
// strip of the left factor has sixteen rows, one of the right factor sixteen pixels.
#pragma once

#include "vector.h"

#if defined(PROAC_SOFTWARE_TILES)  // a header with the same instructions as functions, for tests on any processor
#define PROAC_TILE_UNIT
#include PROAC_SOFTWARE_TILES
#elif defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define PROAC_TILE_UNIT
#endif

namespace proac::PROAC_ISA {

#if defined(PROAC_TILE_UNIT)
constexpr bool kHasTileUnit = true;
constexpr int kTileAcross = 2 * kTileLanes;

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

// Where a right factor of `parts` parts has the first part of 32 bits of terms, the `group`-th, of pixel i.
PROAC_INLINE uint32_t* pixel_terms(int8_t* tiles, int64_t strip, int parts, int64_t group, int i) {
  int8_t* tile = tiles + (i / kTileLanes * strip + group / kTileRows * parts) * kTileBytes;
  return reinterpret_cast<uint32_t*>(tile + group % kTileRows * 64) + i % kTileLanes;
}

// Where strips of both factors begin: what is multiplied at a time. Of some numbers it is one strip of the left factor,
// `upper`.
struct TileBlock {
  const int8_t *upper, *lower, *left, *right;
};

// GCC's loads of tiles do not say that they read memory: multiply_strips does.
//
// Calls write(pixel)(row, a, b) with two vectors of pixels of the products of `rows` rows from `first` on, in the
// pixels' units.
template <class Numbers, bool two, class Write>
PROAC_INLINE void multiply_strips(const TileRows& left, int64_t first, int rows, int64_t terms, const int8_t* pixels,
                                  Write write) {
  constexpr int lanes = kLanes<float>;
  alignas(64) typename Numbers::Sum sums[Numbers::kSums][Numbers::kRowStrips * kTileRows * kTileAcross];
  const int64_t steps = tile_steps(terms, Numbers::kRowParts);
  const int64_t row_strip = tile_strip(terms, Numbers::kRowParts) * kTileBytes;
  const int64_t pixel_strip = tile_strip(terms, Numbers::kPixelParts) * kTileBytes;
  const int8_t* upper = left.tiles + first / kTileRows * row_strip;
  for (int i = 0; i < kTile; i += kTileAcross, pixels += 2 * pixel_strip) {
    const TileBlock block{upper, upper + row_strip, pixels, pixels + pixel_strip};
    __asm__ volatile("" ::: "memory");
    Numbers::template sum_products<two>(block, steps, sums);
    __asm__ volatile("" ::: "memory");
    for (int v = 0; v < kTileAcross; v += 2 * lanes) {
      const auto write_row = write(i + v);
      for (int r = 0; r < rows; ++r) {
        const int at = r * kTileAcross + v;
        const float unit = left.unit[first + r];
        write_row(first + r, Numbers::value(sums, at, unit), Numbers::value(sums, at + lanes, unit));
      }
    }
  }
}

// The same for all rows of the left factor.
template <class Numbers, class Write>
PROAC_INLINE void multiply_tiles(const TileRows& left, int64_t rows, int64_t terms, const int8_t* pixels, Write write) {
  int64_t first = 0;
  if constexpr (Numbers::kRowStrips == 2) {
    for (; rows - first > kTileRows; first += 2 * kTileRows) {
      const int some = rows - first < 2 * kTileRows ? static_cast<int>(rows - first) : 2 * kTileRows;
      multiply_strips<Numbers, true>(left, first, some, terms, pixels, write);
    }
  }
  for (; first < rows; first += kTileRows) {
    const int some = rows - first < kTileRows ? static_cast<int>(rows - first) : kTileRows;
    multiply_strips<Numbers, false>(left, first, some, terms, pixels, write);
  }
}
#else
constexpr bool kHasTileUnit = false;

class TileUnit {
 public:
  explicit TileUnit(bool) {}
};
#endif

}  // namespace proac::PROAC_ISA
