// The instructions of a tile unit that csrc/cpu uses, as functions: what its kernels compute with them can then be tested on any
// processor. Eight registers of 16 rows of 64 bytes; sums of whole numbers are exact, as the instruction's are.
#pragma once

#include <cstdint>
#include <cstring>

namespace software_tiles {

struct Tile {
  alignas(64) int8_t row[16][64];
};
inline thread_local Tile tiles[8];

inline float bfloat16(const int8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void load(int t, const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(tiles[t].row[r], static_cast<const int8_t*>(from) + r * stride, 64);
}
inline void store(int t, void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r) std::memcpy(static_cast<int8_t*>(to) + r * stride, tiles[t].row[r], 64);
}

// c[m][n] += the sum over `terms` of 32 bits of a[m] and b's row of that number.
template <class Sum, class Dot>
void multiply(int c, int a, int b, Dot dot) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      Sum sum;
      std::memcpy(&sum, tiles[c].row[m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k) sum = dot(sum, tiles[a].row[m] + 4 * k, tiles[b].row[k] + 4 * n);
      std::memcpy(tiles[c].row[m] + 4 * n, &sum, 4);
    }
  }
}
inline void multiply_digits(int c, int a, int b) {
  multiply<int32_t>(c, a, b, [](int32_t sum, const int8_t* x, const int8_t* y) {
    return sum + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
  });
}
inline void multiply_pairs(int c, int a, int b) {
  multiply<float>(c, a, b, [](float sum, const int8_t* x, const int8_t* y) {
    return sum + bfloat16(x) * bfloat16(y) + bfloat16(x + 2) * bfloat16(y + 2);
  });
}

}  // namespace software_tiles

// Compilers have some of these as macros.
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) static_cast<void>(shape)
#define _tile_release()
#define _tile_zero(t) std::memset(&software_tiles::tiles[t], 0, sizeof(software_tiles::Tile))
#define _tile_loadd(t, from, stride) software_tiles::load(t, from, stride)
#define _tile_stored(t, to, stride) software_tiles::store(t, to, stride)
#define _tile_dpbssd(c, a, b) software_tiles::multiply_digits(c, a, b)
#define _tile_dpbf16ps(c, a, b) software_tiles::multiply_pairs(c, a, b)
