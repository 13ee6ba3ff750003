// Stage (0), its two passes over the pixels: count the keys, then collect the small ones. select.cpp does the rest.
#pragma once

#include "pixels.h"

namespace proac::PROAC_ISA {

template <class T, class F>
PROAC_INLINE void for_each_key(const SelectCall& call, Range range, F f) {
  PixelTile<T> tile;
  alignas(64) uint64_t keys[kTile];
  for (int64_t first = range.begin; first < range.end; first += kTile) {
    const int64_t left = range.end - first;
    read_pixels<T>(call.pixels, first, left < kTile ? static_cast<int>(left) : kTile, &tile, nullptr);
    if (tile.kept == 0) continue;
    tile_keys(call.seed, first + call.first_index, keys);
    for (int i = 0; i < tile.count; ++i) {
      if (tile.label[i] >= 0) f(static_cast<uint32_t>(keys[i]), tile.label[i], first + i);
    }
  }
}

template <class T>
static void count_keys_of(const SelectCall& call, Range range, int64_t* by_class, int64_t* by_key) {
  for_each_key<T>(call, range, [=](uint32_t key, int32_t label, int64_t) {
    ++by_class[label];
    ++by_key[key >> (32 - kHistogramBits)];
  });
}
static void count_keys(const SelectCall& call, Range range, int64_t* by_class, int64_t* by_key) {
  call.is_double ? count_keys_of<double>(call, range, by_class, by_key)
                 : count_keys_of<float>(call, range, by_class, by_key);
}

template <class T>
static void collect_keys_of(const SelectCall& call, Range range, int64_t limit, Candidate* out) {
  for_each_key<T>(call, range, [&](uint32_t key, int32_t label, int64_t index) {
    if ((key >> (32 - kHistogramBits)) <= limit) *out++ = {key, label, index + call.first_index};
  });
}
static void collect_keys(const SelectCall& call, Range range, int64_t limit, Candidate* out) {
  call.is_double ? collect_keys_of<double>(call, range, limit, out) : collect_keys_of<float>(call, range, limit, out);
}

}  // namespace proac::PROAC_ISA
