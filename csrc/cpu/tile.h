// A tile: up to 128 consecutive pixels, packed as [D][kTile] in the compute type, or as pack_pairs.h has it, with the
// norms found on the way.
//
// Reading the features where they lie more than once would be slow: with power-of-two image sizes, the rows of all
// channels of a tile map to the same few cache sets.
#pragma once

#include "pixels.h"

namespace proac::PROAC_ISA {

// Scales of the packed pixels: xhat = x * unit, and 1 / |x|, both 0 where |x| <= 1e-12, NaN where |x| is not finite.
// They differ only for pixels whose packed values were scaled down, see `rescale`.
template <class T>
struct alignas(64) PixelScale {
  T unit[kTile];
  T inverse_norm[kTile];
};

// The packed pixels, [D][kTile].
template <class T>
struct PixelFloats {
  T* data;
  static constexpr int kRows = 1;  // channels that are stored together

  PROAC_MEMBER void put(int64_t d, int i, const Vec<T>* value) const { store(data + d * kTile + i, value[0]); }
  PROAC_MEMBER void clear(int64_t channels) const { memset(data, 0, sizeof(T) * channels * kTile); }
  PROAC_MEMBER Vec<T> channel(int64_t d, int i) const { return load(data + d * kTile + i); }
  PROAC_MEMBER T get(int64_t d, int i) const { return data[d * kTile + i]; }
  PROAC_MEMBER void set(int64_t d, int i, T value) const { data[d * kTile + i] = value; }
};

// One image's share of a tile.
struct Segment {
  int64_t image, pixel;
  int begin, count;  // within the tile
};

// Calls f(segment) for each image that the tile touches.
template <class F>
PROAC_INLINE void for_each_segment(const FeatureView& view, int64_t first, int count, F f) {
  int64_t image = first / view.pixels, pixel = first % view.pixels;
  for (int begin = 0; begin < count;) {
    const int64_t left = view.pixels - pixel;
    const int run = left < count - begin ? static_cast<int>(left) : count - begin;
    f(Segment{image, pixel, begin, run});
    begin += run;
    pixel = 0;
    ++image;
  }
}

// Lane l of the result is lane from[l] of a, or lane from[l] - kLanes of b.
template <class T>
PROAC_INLINE Vec<T> choose_lanes(Vec<T> a, Vec<T> b, Vec<Int<T>> from) {
#if defined(__clang__)
  Vec<T> result;
  for (int l = 0; l < kLanes<T>; ++l) result[l] = from[l] < kLanes<T> ? a[from[l]] : b[from[l] - kLanes<T>];
  return result;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Transposes a square of kLanes vectors, by exchanging halves, quarters and so on.
template <class T, int half>
PROAC_INLINE void exchange(Vec<T>* row) {
  constexpr int lanes = kLanes<T>;
  Vec<Int<T>> low, high;
#pragma GCC unroll 16
  for (int l = 0; l < lanes; ++l) {
    low[l] = l & half ? lanes + l - half : l;
    high[l] = l & half ? lanes + l : l + half;
  }
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if (i & half) continue;
    const Vec<T> a = row[i], b = row[i + half];
    row[i] = choose_lanes<T>(a, b, low);
    row[i + half] = choose_lanes<T>(a, b, high);
  }
}
template <class T>
PROAC_INLINE void transpose(Vec<T>* row) {
  if constexpr (kLanes<T> > 8) exchange<T, 8>(row);
  if constexpr (kLanes<T> > 4) exchange<T, 4>(row);
  if constexpr (kLanes<T> > 2) exchange<T, 2>(row);
  exchange<T, 1>(row);
}

// Rows that are asked for ahead of their use: the hardware's own prefetching ends with a page, and each row is in
// another.
constexpr int kRowsAhead = 16;

// Pixels that lie side by side: a row of the tile is a row of the features. `square` gets the sums of squares.
template <class F, class X, class T>
static void pack_rows(const F* data, int64_t channel_stride, int64_t channels, const T* keep, X pixels, T* square) {
  constexpr int lanes = kLanes<T>, vectors = kTile / lanes;
  Vec<T> total[vectors] = {}, mask[vectors];
  for (int v = 0; v < vectors; ++v) mask[v] = load(keep + v * lanes);
  for (int64_t begin = 0; begin < channels; begin += 64) {  // in blocks, so that the sums lose less
    const int64_t end = begin + 64 < channels ? begin + 64 : channels;
    Vec<T> sum[vectors] = {};
    for (int64_t d = begin; d < end; d += X::kRows) {
      const F* row[X::kRows];
      for (int r = 0; r < X::kRows; ++r) row[r] = d + r < channels ? data + (d + r) * channel_stride : nullptr;
      if (d + kRowsAhead + X::kRows <= channels) {
#pragma GCC unroll 16
        for (size_t byte = 0; byte < kTile * sizeof(F); byte += 64) {
          for (int r = 0; r < X::kRows; ++r) {
            __builtin_prefetch(reinterpret_cast<const char*>(row[r] + kRowsAhead * channel_stride) + byte);
          }
        }
      }
#pragma GCC unroll 16
      for (int v = 0; v < vectors; ++v) {
        Vec<T> value[X::kRows];
        for (int r = 0; r < X::kRows; ++r) {
          const Vec<T> number = r == 0 || row[r] ? Vec<T>(load_as(row[r] + v * lanes)) : Vec<T>{};
          value[r] = mask[v] > T(0) ? number : Vec<T>{};
          sum[v] += value[r] * value[r];
        }
        pixels.put(d, v * lanes, value);
      }
    }
    for (int v = 0; v < vectors; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < vectors; ++v) store(square + v * lanes, total[v]);
}

// Sums of squares of what is packed already.
template <class X, class T>
static void square_sums(int64_t channels, const X& x, T* square) {
  constexpr int lanes = kLanes<T>;
  for (int i = 0; i < kTile; i += lanes) {
    Vec<T> total{};
    for (int64_t begin = 0; begin < channels; begin += 64) {
      const int64_t end = begin + 64 < channels ? begin + 64 : channels;
      Vec<T> sum{};
      for (int64_t d = begin; d < end; ++d) {
        const Vec<T> value = x.channel(d, i);
        sum += value * value;
      }
      total += sum;
    }
    store(square + i, total);
  }
}

// Channels that lie side by side: squares of pixels x channels, transposed in registers. `pixel[i]` is where pixel i of
// the tile starts, null where it is outside V. `square` gets the sums of squares.
template <class F, class T>
static void pack_columns(const F* const* pixel, int64_t channels, PixelFloats<T> pixels, T* square) {
  T* x = pixels.data;
  constexpr int lanes = kLanes<T>;
  const int64_t whole = channels - channels % lanes;
  for (int begin = 0; begin < kTile; begin += lanes) {
    const F* const* group = pixel + begin;
    Vec<T> total{};
    for (int64_t d = 0; d < whole; d += lanes) {
      Vec<T> row[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) row[i] = group[i] ? Vec<T>(load_as(group[i] + d)) : Vec<T>{};
      transpose<T>(row);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(x + (d + i) * kTile + begin, row[i]);
      Vec<T> even = row[0] * row[0], odd = row[1] * row[1];
#pragma GCC unroll 16
      for (int i = 2; i < lanes; i += 2) {
        even += row[i] * row[i];
        odd += row[i + 1] * row[i + 1];
      }
      total += even + odd;
    }
    for (int64_t d = whole; d < channels; ++d) {
      T* out = x + d * kTile + begin;
      for (int i = 0; i < lanes; ++i) out[i] = group[i] ? T(widen(group[i][d])) : T(0);
      total += load(out) * load(out);
    }
    store(square + begin, total);
  }
}

PROAC_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
PROAC_INLINE double square_root(double v) { return __builtin_sqrt(v); }

// Sums of squares from here on may overflow, or the gradient's factors underflow.
template <class T>
constexpr T kLargeSquare = sizeof(T) == 4 ? T(1e20) : T(1e200);

// The rare pixel that is so long: its packed values are scaled down by a power of two, to about 1. NaN where the norm
// is not finite.
template <class X, class T>
static __attribute__((noinline)) void rescale(int64_t channels, int i, const X& x, PixelScale<T>* scale) {
  T largest = 0;
  for (int64_t d = 0; d < channels; ++d) {
    const T size = __builtin_fabs(x.get(d, i));
    largest = size <= largest ? largest : size;
  }
  scale->unit[i] = scale->inverse_norm[i] = static_cast<T>(__builtin_nan(""));
  if (!(largest < kInfinity<T>)) return;
  const int exponent = __builtin_ilogb(largest);
  double sum = 0;
  for (int64_t d = 0; d < channels; ++d) {
    x.set(d, i, static_cast<T>(__builtin_ldexp(x.get(d, i), -exponent)));
    const double value = x.get(d, i);
    sum += value * value;
  }
  const T norm = static_cast<T>(__builtin_ldexp(__builtin_sqrt(sum), exponent));
  if (!(norm < kInfinity<T>)) return;  // also that of a NaN, which `largest` may have missed
  scale->unit[i] = static_cast<T>(1 / __builtin_sqrt(sum));
  scale->inverse_norm[i] = 1 / norm;
}

// Reads the pixels of a tile, equation (1). What stands in pixels outside V is never looked at.
template <class F, class X, class T>
static void pack_tile(const FeatureView& view, const PixelTile<T>& tile, const X& x, PixelScale<T>* scale) {
  const F* data = static_cast<const F*>(view.data);
  const int64_t channels = view.channels;
  alignas(64) T square[kTile];
  const int64_t image = tile.first / view.pixels, pixel = tile.first % view.pixels;
  if (view.pixel_stride == 1 && pixel + kTile <= view.pixels) {
    pack_rows(data + image * view.batch_stride + pixel, view.channel_stride, channels, tile.weight, x, square);
  } else if (view.channel_stride == 1) {
    const F* start[kTile] = {};
    for_each_segment(view, tile.first, tile.count, [&](const Segment& segment) {
      const F* row = data + segment.image * view.batch_stride + segment.pixel * view.pixel_stride;
      for (int i = segment.begin; i < segment.begin + segment.count; ++i, row += view.pixel_stride) {
        start[i] = tile.label[i] < 0 ? nullptr : row;
      }
    });
    pack_columns(start, channels, x, square);
  } else {
    x.clear(channels);
    for_each_segment(view, tile.first, tile.count, [&](const Segment& segment) {
      for (int64_t d = 0; d < channels; ++d) {
        const F* row =
            data + segment.image * view.batch_stride + segment.pixel * view.pixel_stride + d * view.channel_stride;
        for (int i = 0; i < segment.count; ++i) {
          const int at = segment.begin + i;
          x.set(d, at, tile.label[at] < 0 ? T(0) : T(widen(row[i * view.pixel_stride])));
        }
      }
    });
    square_sums(channels, x, square);
  }
  for (int i = 0; i < kTile; ++i) {
    const T norm = square_root(square[i]);
    const T inverse = norm <= T(1e-12) ? T(0) : T(1) / norm;
    scale->unit[i] = scale->inverse_norm[i] = inverse;
  }
  for (int i = 0; i < kTile; ++i) {
    if (!(square[i] < kLargeSquare<T>)) rescale(channels, i, x, scale);
  }
}

// Writes a tile of gradients [D][kTile] to where the features' gradient lies, converted once.
template <class F, class T>
static void unpack_tile(const FeatureView& view, const PixelTile<T>& tile, const T* gradient) {
  constexpr int lanes = kLanes<T>;
  F* data = static_cast<F*>(view.data);
  const int64_t channels = view.channels, whole = channels - channels % lanes;
  for_each_segment(view, tile.first, tile.count, [&](const Segment& segment) {
    F* out = data + segment.image * view.batch_stride + segment.pixel * view.pixel_stride;
    int i = 0;
    if (view.channel_stride == 1) {
      for (; i + lanes <= segment.count; i += lanes) {
        for (int64_t d = 0; d < whole; d += lanes) {
          Vec<T> row[lanes];
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) row[l] = load(gradient + (d + l) * kTile + segment.begin + i);
          transpose<T>(row);
#pragma GCC unroll 16
          for (int l = 0; l < lanes; ++l) store_as(out + (i + l) * view.pixel_stride + d, row[l]);
        }
        for (int64_t d = whole; d < channels; ++d) {
          for (int l = 0; l < lanes; ++l) {
            narrow(gradient[d * kTile + segment.begin + i + l], out + (i + l) * view.pixel_stride + d);
          }
        }
      }
    }
    for (int64_t d = 0; d < channels; ++d) {
      const T* row = gradient + d * kTile + segment.begin;
      F* target = out + d * view.channel_stride;
      int j = i;
      if (view.pixel_stride == 1) {
        for (; j + lanes <= segment.count; j += lanes) store_as(target + j, load(row + j));
      }
      for (; j < segment.count; ++j) narrow(row[j], target + j * view.pixel_stride);
    }
  });
}

}  // namespace proac::PROAC_ISA
