// The prologue over K-vectors: unit prototypes in the orders the kernels read, sorted thresholds, scales of the
// gradient. Computed once for each call, in double.
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

// A left factor of the tile unit.
struct SplitRows {
  struct alignas(64) TileRow {  // a cache line: a row that lies across two takes twice as long to load
    int8_t bytes[64];
  };
  std::vector<TileRow> tiles;
  std::vector<float> unit;

  SplitRows() = default;

  // Row r, term n is values[r * row_stride + n * stride]. Digits of 8 bits where features have three parts, else
  // bfloat16 pairs.
  SplitRows(const double* values, int64_t rows, int64_t length, int64_t row_stride, int64_t stride, bool digits)
      : unit(rows) {
    const int parts = digits ? 3 : 2, bytes = digits ? 1 : 2;
    const int64_t strip = tile_strip(length, parts);
    tiles.resize((rows + kTileRows - 1) / kTileRows * strip * kTileRows);
    for (int64_t r = 0; r < rows; ++r) {
      const double* row = values + r * row_stride;
      auto* begin = reinterpret_cast<int8_t*>(&tiles[r / kTileRows * strip * kTileRows + r % kTileRows]);
      const auto at = [&](int64_t n) { return begin + n * bytes / 64 * parts * kTileBytes + n * bytes % 64; };
      digits ? put_digits(row, length, stride, at, &unit[r]) : put_pairs(row, length, stride, at);
    }
  }

  TileRows view() const { return {reinterpret_cast<const int8_t*>(tiles.data()), unit.data()}; }

 private:
  template <class At>
  static void put_pairs(const double* row, int64_t length, int64_t stride, At at) {
    for (int64_t n = 0; n < length; ++n) {
      const float value = static_cast<float>(row[n * stride]);
      const uint16_t high = bfloat16_bits(value), low = bfloat16_bits(value - bfloat16_value(high));
      std::memcpy(at(n), &high, 2);
      std::memcpy(at(n) + kTileBytes, &low, 2);
    }
  }

  // Units and digits as tile_digits.h has them; the unit takes the 2^16 by which products of the first digits are too
  // small.
  template <class At>
  static void put_digits(const double* row, int64_t length, int64_t stride, At at, float* unit) {
    double top = 0;
    bool finite = true;
    for (int64_t n = 0; n < length; ++n) {
      top = std::max(top, std::fabs(row[n * stride]));
      finite = finite && std::isfinite(row[n * stride]);
    }
    int exponent;
    std::frexp(top * (1 + 0x1p-7), &exponent);
    *unit = finite ? static_cast<float>(std::ldexp(0x1p16, exponent - 23)) : std::nanf("");
    for (int64_t n = 0; finite && n < length; ++n) {
      const auto whole = static_cast<uint32_t>(std::lrint(std::ldexp(row[n * stride], 23 - exponent)));
      const uint32_t bytes = (whole + kDigitOffset) ^ kDigitOffset;
      for (int digit = 0; digit < 3; ++digit)
        at(n)[digit * kTileBytes] = static_cast<int8_t>(bytes >> (16 - 8 * digit));
    }
  }
};

// Equation (1) for the prototypes, (K, D).
template <class T>
struct Anchors {
  int64_t classes, channels;
  std::vector<double> unit, norm;  // (K, D), (K,)
  std::vector<T> by_class, by_channel, transposed;
  SplitRows class_tiles, channel_tiles;
  TileUse tile_use;

  Anchors(const T* prototypes, int64_t num_classes, int64_t num_channels, bool need_transposed, TileUse use)
      : classes(num_classes),
        channels(num_channels),
        unit(classes * channels),
        norm(classes),
        by_class(classes * channels),
        by_channel(classes * channels),
        tile_use(use) {
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
    if (const int parts = tile_use.pixel_parts) {
      class_tiles = SplitRows(unit.data(), classes, channels, channels, 1, parts == 3);
      channel_tiles = SplitRows(unit.data(), channels, classes, 1, channels, parts == 3);
    }
    if (need_transposed) {
      transposed.resize(classes * channels);
      for (int64_t k = 0; k < classes; ++k) {
        for (int64_t d = 0; d < channels; ++d) transposed[d * classes + k] = static_cast<T>(unit[k * channels + d]);
      }
    }
  }

  AnchorView view() const {
    return {by_class.data(), by_channel.data(), transposed.data(), class_tiles.view(), channel_tiles.view(), tile_use};
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
