// The two matrix products of a tile: similarities = anchors * pixels, and gradient = anchors^T * dS. Both multiply
// packed blocks of up to kMaxRows rows with a [length][kTile] matrix; a block's sums stay in registers.
#pragma once

#include "pack_pairs.h"
#include "tile.h"
#include "tile_digits.h"

namespace proac::PROAC_ISA {

// Vectors of pixels that one register block spans: with 32 registers 6 x 4 sums, with 16 of them 6 x 2.
constexpr int kBlockVectors = PROAC_VECTOR_BYTES == 64 ? 4 : 2;

// Number of blocks that `rows` rows are split into, and where block b begins: as even as can be. anchors.h packs so
// too.
PROAC_INLINE int64_t block_count(int64_t rows) { return (rows + kMaxRows - 1) / kMaxRows; }
PROAC_INLINE int64_t block_begin(int64_t rows, int64_t block) { return rows * block / block_count(rows); }

// sum[r][v] += sum_n a[n][r] * x[n][i + v * lanes ...], for n in [0, length).
template <class T, int rows>
PROAC_INLINE void multiply_block(const T* a, const T* x, int64_t length, Vec<T> (&sum)[rows][kBlockVectors]) {
  constexpr int lanes = kLanes<T>;
  for (int64_t n = 0; n < length; ++n, a += rows, x += kTile) {
    Vec<T> pixel[kBlockVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) pixel[v] = load(x + v * lanes);
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const Vec<T> row = broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) sum[r][v] += row * pixel[v];
    }
  }
}

// Calls f.template operator()<rows>(...) for the number of rows of a block, as a compile-time constant.
template <class F>
PROAC_INLINE void with_rows(int64_t rows, F f) {
  switch (rows) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    case 5:
      return f.template operator()<5>();
    default:
      return f.template operator()<6>();
  }
}

// s[k][i] = scale[i] * sum_d anchor[k][d] * x[d][i], for the classes of one block. Channels are taken 256 at a time, so
// that the pixels of a step stay in the cache and long sums lose less.
template <class T, int rows>
static void similarity_block(const T* a, const T* x, int64_t channels, const T* scale, T* s) {
  constexpr int lanes = kLanes<T>;
  constexpr int64_t step = 256;
  for (int i = 0; i < kTile; i += kBlockVectors * lanes) {
    for (int64_t d = 0; d < channels; d += step) {
      const bool last = d + step >= channels;
      Vec<T> sum[rows][kBlockVectors] = {};
      multiply_block<T, rows>(a + d * rows, x + d * kTile + i, last ? channels - d : step, sum);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kBlockVectors; ++v) {
          T* out = s + r * kTile + i + v * lanes;
          Vec<T> value = sum[r][v];
          if (d > 0) value += load(out);
          store<T>(out, last ? value * load(scale + i + v * lanes) : value);
        }
      }
    }
  }
}

#if defined(PROAC_TILE_UNIT)
// The same by the tile unit, of pixels in `tiles`; for all classes.
template <class Numbers>
static void similarities_of(const AnchorView& anchors, int64_t num_classes, int64_t channels, const int8_t* tiles,
                            const float* scale, float* s) {
  multiply_tiles<Numbers>(anchors.class_tiles, num_classes, channels, tiles, [&](int i) PROAC_LAMBDA {
    const Vec<float> scale0 = load(scale + i), scale1 = load(scale + i + kLanes<float>);
    return [=](int64_t k, Vec<float> a, Vec<float> b) PROAC_LAMBDA {
      store<float>(s + k * kTile + i, a * scale0);
      store<float>(s + k * kTile + i + kLanes<float>, b * scale1);
    };
  });
}

// Splits the pixels first.
static void similarities_by_tiles(const AnchorView& anchors, int64_t num_classes, int64_t channels, const float* x,
                                  const float* scale, const Workspace& work) {
  float* s = static_cast<float*>(work.s);
  if (anchors.tile_use.pixel_parts == 3) {
    alignas(64) float unit[kTile];
    Digits<3>::split(x, channels, work.tiles, unit);
    for (int i = 0; i < kTile; ++i) unit[i] *= scale[i];
    similarities_of<Digits<3>>(anchors, num_classes, channels, work.tiles, unit, s);
  } else if (anchors.tile_use.pixel_parts == 2) {
    Pairs<2, 4>::split(x, channels, work.tiles);
    similarities_of<Pairs<2, 4>>(anchors, num_classes, channels, work.tiles, scale, s);
  } else {
    Pairs<1, 2>::split(x, channels, work.tiles);
    similarities_of<Pairs<1, 2>>(anchors, num_classes, channels, work.tiles, scale, s);
  }
}

// Equation (1) for pixels that were packed as pairs.
template <class T>
static void similarities(const AnchorView& anchors, int64_t num_classes, int64_t channels, const PixelPairs& x,
                         const T* scale, const Workspace& work) {
  similarities_of<Pairs<1, 2>>(anchors, num_classes, channels, x.tiles, scale, static_cast<T*>(work.s));
}
#endif

// Equation (1): the similarities of a tile, [K][kTile], to work.s. scale[i] = unit[i] / tau.
template <class T>
static void similarities(const AnchorView& anchors, int64_t num_classes, int64_t channels, const PixelFloats<T>& pixels,
                         const T* scale, const Workspace& work) {
  const T* x = pixels.data;
  T* s = static_cast<T*>(work.s);
  if constexpr (kHasTileUnit && sizeof(T) == 4) {
    if (anchors.tile_use.pixel_parts) return similarities_by_tiles(anchors, num_classes, channels, x, scale, work);
  }
  const T* a = static_cast<const T*>(anchors.by_class);
  for (int64_t b = 0; b < block_count(num_classes); ++b) {
    const int64_t begin = block_begin(num_classes, b), rows = block_begin(num_classes, b + 1) - begin;
    with_rows(rows,
              [&]<int R>() { similarity_block<T, R>(a + begin * channels, x, channels, scale, s + begin * kTile); });
  }
}

// The last step of equation (11) for two vectors of pixels: along[i] * sum - back[i] * x, and 0 where `alive` is 0.
template <class T>
struct LastStep {
  Vec<T> along[2], back[2], alive[2];

  PROAC_MEMBER LastStep(const T* along_row, const T* back_row, const T* alive_row) {
    for (int v = 0; v < 2; ++v) {
      along[v] = load(along_row + v * kLanes<T>);
      back[v] = load(back_row + v * kLanes<T>);
      alive[v] = load(alive_row + v * kLanes<T>);
    }
  }

  template <bool stream, class F>
  PROAC_MEMBER void write(Vec<T> sum0, Vec<T> sum1, Vec<T> x0, Vec<T> x1, F* out) const {
    const Vec<T> value0 = sum0 * along[0] - x0 * back[0], value1 = sum1 * along[1] - x1 * back[1];
    const Vec<T> result0 = alive[0] != T(0) ? value0 : Vec<T>{}, result1 = alive[1] != T(0) ? value1 : Vec<T>{};
    if constexpr (stream) {
      stream_lines<F>(out, result0, result1);
    } else {
      store_as(out, result0);
      store_as(out + kLanes<T>, result1);
    }
  }
};

// Equation (11) for the channels of one block: row d, along * sum_k anchor[k][d] * ds[k][i] - back * x[d][i], goes to
// out + d * stride.
template <class F, class T, int rows, bool stream>
static void gradient_block(const T* a, const T* ds, int64_t num_classes, const T* x, const T* along, const T* back,
                           const T* alive, F* out, int64_t stride) {
  constexpr int lanes = kLanes<T>;
  for (int i = 0; i < kTile; i += kBlockVectors * lanes) {
    Vec<T> sum[rows][kBlockVectors] = {};
    multiply_block<T, rows>(a, ds + i, num_classes, sum);
#pragma GCC unroll 2
    for (int v = 0; v < kBlockVectors; v += 2) {
      const int j = i + v * lanes;
      const LastStep<T> last(along + j, back + j, alive + j);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const T* pixel = x + r * kTile + j;
        last.template write<stream>(sum[r][v], sum[r][v + 1], load(pixel), load(pixel + lanes), out + r * stride + j);
      }
    }
  }
}

#if defined(PROAC_TILE_UNIT)
// The same for all channels by the tile unit, dS being in `tiles`.
template <class Numbers, bool stream, class F, class X>
static void gradient_of(const AnchorView& anchors, int64_t num_classes, int64_t channels, const int8_t* tiles,
                        const X& x, const float* along, const float* back, const float* alive, F* out, int64_t stride) {
  multiply_tiles<Numbers>(anchors.channel_tiles, channels, num_classes, tiles, [&](int i) PROAC_LAMBDA {
    const LastStep<float> last(along + i, back + i, alive + i);
    return [=](int64_t d, Vec<float> a, Vec<float> b) PROAC_LAMBDA {
      last.template write<stream>(a, b, x.channel(d, i), x.channel(d, i + kLanes<float>), out + d * stride + i);
    };
  });
}

template <bool stream, class F, class X>
static void gradient_by_tiles(const AnchorView& anchors, int64_t num_classes, int64_t channels, const float* ds,
                              const X& x, const float* along, const float* back, const float* alive, int8_t* tiles,
                              F* out, int64_t stride) {
  if (anchors.tile_use.pixel_parts == 3) {
    alignas(64) float unit[kTile];
    // A fourth digit, since a pixel's own class has a dS many times the others', which together may weigh more: near its
    // prototype its own is a small difference.
    Digits<4>::split(ds, num_classes, tiles, unit);
    for (int i = 0; i < kTile; ++i) unit[i] *= along[i];
    gradient_of<Digits<4>, stream>(anchors, num_classes, channels, tiles, x, unit, back, alive, out, stride);
  } else {
    Pairs<2, 3>::split(ds, num_classes, tiles);
    gradient_of<Pairs<2, 3>, stream>(anchors, num_classes, channels, tiles, x, along, back, alive, out, stride);
  }
}
#endif

// Equation (11) for a tile. `out` may be where the pixels' floats are, with stride kTile.
template <class F, class T, bool stream, class X>
static void gradient_rows(const AnchorView& anchors, int64_t num_classes, int64_t channels, const T* ds, const X& x,
                          const T* along, const T* back, const T* alive, int8_t* tiles, F* out, int64_t stride) {
  if constexpr (kHasTileUnit && sizeof(T) == 4) {
    if (anchors.tile_use.pixel_parts) {
      return gradient_by_tiles<stream>(anchors, num_classes, channels, ds, x, along, back, alive, tiles, out, stride);
    }
  }
  if constexpr (!kIsPairs<X>) {
    const T* a = static_cast<const T*>(anchors.by_channel);
    for (int64_t b = 0; b < block_count(channels); ++b) {
      const int64_t begin = block_begin(channels, b), rows = block_begin(channels, b + 1) - begin;
      with_rows(rows, [&]<int R>() {
        gradient_block<F, T, R, stream>(a + begin * num_classes, ds, num_classes, x.data + begin * kTile, along, back,
                                        alive, out + begin * stride, stride);
      });
    }
  }
}

}  // namespace proac::PROAC_ISA
