// What every stage needs to know of the pixels of a tile: labels and weights by the nearest rule, the set V, random keys
// and the levels that say which sampled sets a pixel is in.
#pragma once

#include "vector.h"

namespace proac::PROAC_ISA {

constexpr int kUsualLogWeight = 20;

template <class T>
struct alignas(64) PixelTile {
  T weight[kTile];       // 0 outside V
  T log_weight[kTile];   // -inf outside V
  T level[kTile];        // sampled sets: the pixel is in N_k, k not its own, where level <= rank[k]; see SampleView
  int32_t label[kTile];  // -1 outside V
  int64_t first;         // index of the first pixel
  int count;             // pixels; the lanes behind them count as outside V
  int kept;              // pixels in V
  bool extreme;          // some |log weight| is above kUsualLogWeight
};

// Reads `count` elements from pixel `first` on, in pixel order.
template <class E, class Out>
PROAC_INLINE void read_nearest(const NearestView& view, const PixelView& pixels, int64_t first, int count, Out* out) {
  int64_t image = first / pixels.pixels, p = first % pixels.pixels;
  const E* data = static_cast<const E*>(view.data);
  if (!view.offset[0]) {
    for (int i = 0; i < count;) {
      const E* row = data + image * view.batch_stride + p;
      const int64_t left = pixels.pixels - p;
      const int run = left < count - i ? static_cast<int>(left) : count - i;
      for (int j = 0; j < run; ++j) out[i + j] = static_cast<Out>(row[j]);
      i += run;
      p = 0;
      ++image;
    }
    return;
  }
  int64_t i2 = p % pixels.size[2], i1 = p / pixels.size[2] % pixels.size[1], i0 = p / pixels.size[2] / pixels.size[1];
  for (int i = 0; i < count;) {
    const E* row = data + image * view.batch_stride + view.offset[0][i0] + view.offset[1][i1];
    for (; i < count && i2 < pixels.size[2]; ++i, ++i2) out[i] = static_cast<Out>(row[view.offset[2][i2]]);
    if (i2 == pixels.size[2]) i2 = 0, ++i1;
    if (i1 == pixels.size[1]) i1 = 0, ++i0;
    if (i0 == pixels.size[0]) i0 = 0, ++image;
  }
}

PROAC_INLINE void read_labels(const PixelView& pixels, int64_t first, int count, int64_t* out) {
  switch (pixels.label_type) {
    case kUInt8:
      return read_nearest<uint8_t>(pixels.labels, pixels, first, count, out);
    case kInt16:
      return read_nearest<int16_t>(pixels.labels, pixels, first, count, out);
    case kInt32:
      return read_nearest<int32_t>(pixels.labels, pixels, first, count, out);
    case kInt64:
      return read_nearest<int64_t>(pixels.labels, pixels, first, count, out);
  }
}

// The label rule and the weight rule of the set V, equation (2), for the pixels [first, first + count).
template <class T>
static void read_pixels(const PixelView& pixels, int64_t first, int count, PixelTile<T>* tile, Diagnostics* bad) {
  alignas(64) int64_t label[kTile];
  read_labels(pixels, first, count, label);
  tile->first = first;
  tile->count = count;
  tile->extreme = false;
  int kept = 0;
  for (int i = 0; i < kTile; ++i) {
    const bool in_range = i < count && label[i] >= 0 && label[i] < pixels.num_classes;
    const bool keep = in_range && label[i] != pixels.ignore_index;
    tile->label[i] = keep ? static_cast<int32_t>(label[i]) : -1;
    kept += keep;
  }
  if (bad && kept < count) {
    for (int i = 0; i < count; ++i) {
      if (tile->label[i] < 0 && label[i] != pixels.ignore_index && bad->bad_labels++ == 0) bad->first_label = label[i];
    }
  }
  if (!pixels.weights.data) {
    for (int i = 0; i < kTile; ++i) {
      tile->weight[i] = tile->label[i] < 0 ? T(0) : T(1);
      tile->log_weight[i] = tile->label[i] < 0 ? -kInfinity<T> : T(0);
    }
    tile->kept = kept;
    return;
  }
  alignas(64) T weight[kTile];
  read_nearest<T>(pixels.weights, pixels, first, count, weight);
  kept = 0;
  for (int i = 0; i < kTile; ++i) {
    const bool labelled = tile->label[i] >= 0;
    const bool good = labelled && weight[i] >= 0 && weight[i] < kInfinity<T>;
    if (bad && labelled && !good && bad->bad_weights++ == 0) bad->first_weight = weight[i];
    const bool keep = good && weight[i] >= kSmallestNormal<T>;  // its inverse is finite
    tile->weight[i] = keep ? weight[i] : T(0);
    if (!keep) tile->label[i] = -1;
    kept += keep;
  }
  for (int i = 0; i < kTile; i += kLanes<T>) store(tile->log_weight + i, log<T>(load(tile->weight + i)));
  for (int i = 0; i < kTile; ++i) {
    const T size = tile->log_weight[i] < 0 ? -tile->log_weight[i] : tile->log_weight[i];
    tile->extreme |= size > kUsualLogWeight && size < kInfinity<T>;
  }
  tile->kept = kept;
}

// ---- Philox4x32-10 (Salmon et al., SC 2011) --------------------------------------------------------------------------

using Words = Vec<uint64_t>;  // one 32-bit word in each 64-bit lane

// Products of the low 32 bits of each lane.
PROAC_INLINE Words multiply(Words a, uint64_t b) {
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), _mm512_set1_epi64(b)));
#elif PROAC_VECTOR_BYTES == 32 && defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(b)));
#elif PROAC_VECTOR_BYTES == 16 && defined(__x86_64__)
  return reinterpret_cast<Words>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The first output words for the counters (index mod 2^32, index div 2^32, 0, 0); only the low halves of a lane count.
PROAC_INLINE Words philox(Words index, uint64_t seed) {
  constexpr uint64_t mask = 0xffffffffu;
  Words c0 = index, c1 = index >> 32, c2{}, c3{};
  uint64_t k0 = seed & mask, k1 = seed >> 32;
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply(c0, 0xD2511F53u), b = multiply(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ k0;
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ k1;
    c3 = a;
    k0 = (k0 + 0x9E3779B9u) & mask;
    k1 = (k1 + 0xBB67AE85u) & mask;
  }
  return c0 & mask;
}

// Keys of the pixels of a tile, the lanes behind its last one included.
PROAC_INLINE void tile_keys(uint64_t seed, int64_t first_index, uint64_t* keys) {
  Words index{};
  for (int i = 0; i < kLanes<uint64_t>; ++i) index[i] = static_cast<uint64_t>(first_index) + i;
  for (int i = 0; i < kTile; i += kLanes<uint64_t>) store<uint64_t>(keys + i, philox(index + i, seed));
}

// Fills in the levels of a tile; returns how many of its pixels are in some sampled set, not counting their own class.
template <class T>
static int read_levels(const SampleView& sample, int64_t num_classes, PixelTile<T>* tile) {
  alignas(64) uint64_t keys[kTile];
  const int64_t first = tile->first + sample.first_index;
  tile_keys(sample.seed, first, keys);
  int members = 0;
  for (int i = 0; i < kTile; ++i) {
    int64_t low = 0, high = num_classes;  // the first threshold which is not below (key, index)
    while (low < high && tile->label[i] >= 0) {
      const int64_t middle = (low + high) / 2;
      const uint64_t key = sample.sorted_key[middle];
      const bool below = key < keys[i] || (key == keys[i] && sample.sorted_index[middle] < first + i);
      low = below ? middle + 1 : low;
      high = below ? high : middle;
    }
    const bool member = tile->label[i] >= 0 && low < num_classes;
    tile->level[i] = static_cast<T>(tile->label[i] < 0 ? num_classes : low);
    members += member;
  }
  return members;
}

}  // namespace proac::PROAC_ISA
