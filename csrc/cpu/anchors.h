// The prologue over K-vectors: unit prototypes in the orders the kernels read, sorted thresholds, scales of the gradient.
// Computed once for each call, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"

namespace proac {

constexpr double kEps = 1e-12;

// The nearest bfloat16, ties to even, and its value.
inline uint16_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Equation (1) for the prototypes, (K, D).
template <class T>
struct Anchors {
  int64_t classes, channels;
  std::vector<double> unit, norm;  // (K, D), (K,)
  std::vector<T> by_class, by_channel, transposed;
  std::vector<uint16_t> class_tiles, channel_tiles;
  int pixel_parts;

  // `parts` is 0 where the tile unit is not used, else into how many bfloat16 numbers a feature is split.
  Anchors(const T* prototypes, int64_t num_classes, int64_t num_channels, bool need_transposed, int parts)
      : classes(num_classes),
        channels(num_channels),
        unit(classes * channels),
        norm(classes),
        by_class(classes * channels),
        by_channel(classes * channels),
        pixel_parts(parts) {
    for (int64_t k = 0; k < classes; ++k) {
      const T* p = prototypes + k * channels;
      double largest = 0, sum = 0;
      for (int64_t d = 0; d < channels; ++d) {
        const double size = std::fabs(static_cast<double>(p[d]));
        largest = size <= largest ? largest : size;  // a NaN stays, unless larger ones follow: the sum has it too
      }
      const double scale = largest > 0 ? largest : 1;
      for (int64_t d = 0; d < channels; ++d) sum += (p[d] / scale) * (p[d] / scale);
      norm[k] = scale * std::sqrt(sum);
      if (!(norm[k] <= std::numeric_limits<T>::max())) norm[k] = std::nan("");
      for (int64_t d = 0; d < channels; ++d) unit[k * channels + d] = norm[k] <= kEps ? 0 : p[d] / norm[k];
    }
    pack(classes, channels, channels, 1, by_class.data());
    pack(channels, classes, 1, channels, by_channel.data());
    if (pixel_parts) {
      class_tiles = split(classes, channels, channels, 1);
      channel_tiles = split(channels, classes, 1, channels);
    }
    if (need_transposed) {
      transposed.resize(classes * channels);
      for (int64_t k = 0; k < classes; ++k) {
        for (int64_t d = 0; d < channels; ++d) transposed[d * classes + k] = static_cast<T>(unit[k * channels + d]);
      }
    }
  }

  AnchorView view() const {
    return {by_class.data(),    by_channel.data(),    transposed.data(),
            class_tiles.data(), channel_tiles.data(), pixel_parts};
  }

 private:
  // Blocks of rows as block_begin in product.h has them, each [length][rows].
  void pack(int64_t rows, int64_t length, int64_t row_stride, int64_t stride, T* out) const {
    const int64_t blocks = (rows + kMaxRows - 1) / kMaxRows;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = rows * b / blocks, end = rows * (b + 1) / blocks;
      for (int64_t n = 0; n < length; ++n) {
        for (int64_t r = begin; r < end; ++r) *out++ = static_cast<T>(unit[r * row_stride + n * stride]);
      }
    }
  }

  // A left factor of the tile unit, as AnchorView has it: each value as the sum of two bfloat16 numbers.
  std::vector<uint16_t> split(int64_t rows, int64_t length, int64_t row_stride, int64_t stride) const {
    const int64_t steps = tile_steps(length), tile = int64_t{kTileRows} * kTileStep;
    std::vector<uint16_t> tiles((rows + kTileRows - 1) / kTileRows * steps * 2 * tile);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t n = 0; n < length; ++n) {
        const float value = static_cast<float>(unit[r * row_stride + n * stride]);
        uint16_t* at = tiles.data() + (r / kTileRows * steps + n / kTileStep) * 2 * tile + r % kTileRows * kTileStep +
                       n % kTileStep;
        at[0] = bfloat16_bits(value);
        at[tile] = bfloat16_bits(value - bfloat16_value(at[0]));
      }
    }
    return tiles;
  }
};

// Thresholds of sampled sets in ascending order, and each class's place in it. See SampleView.
template <class T>
struct Thresholds {
  std::vector<uint64_t> key;
  std::vector<int64_t> index;
  std::vector<T> rank;

  // `thresholds` is (K, 2): the last member of each N_k.
  Thresholds(const int64_t* thresholds, int64_t classes) : key(classes), index(classes), rank(classes) {
    std::vector<int64_t> order(classes);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return thresholds[2 * a] != thresholds[2 * b] ? thresholds[2 * a] < thresholds[2 * b]
                                                    : thresholds[2 * a + 1] < thresholds[2 * b + 1];
    });
    for (int64_t place = 0; place < classes; ++place) {
      key[place] = static_cast<uint64_t>(thresholds[2 * order[place]]);
      index[place] = thresholds[2 * order[place] + 1];
      rank[order[place]] = static_cast<T>(place);
    }
  }

  SampleView view(const int64_t* rng_state) const {
    return {key.data(), index.data(), rank.data(), static_cast<uint64_t>(rng_state[0]), rng_state[1]};
  }
};

}  // namespace proac
