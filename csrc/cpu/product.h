// The two matrix products of a tile: similarities = anchors * pixels, and gradient = anchors^T * dS. Both multiply packed
// blocks of up to kMaxRows rows with a [length][kTile] matrix; a block's sums stay in registers.
#pragma once

#include "tile.h"

namespace proac::PROAC_ISA {

// Vectors of pixels that one register block spans: with 32 registers 6 x 4 sums, with 16 of them 6 x 2.
constexpr int kBlockVectors = PROAC_VECTOR_BYTES == 64 ? 4 : 2;

// Number of blocks that `rows` rows are split into, and where block b begins: as even as can be. anchors.h packs so too.
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

// Equation (1): the similarities of a tile, [K][kTile]. scale[i] = unit[i] / tau.
template <class T>
static void similarities(const AnchorView& anchors, int64_t num_classes, int64_t channels, const T* x, const T* scale,
                         T* s) {
  const T* a = static_cast<const T*>(anchors.by_class);
  for (int64_t b = 0; b < block_count(num_classes); ++b) {
    const int64_t begin = block_begin(num_classes, b), rows = block_begin(num_classes, b + 1) - begin;
    with_rows(rows,
              [&]<int R>() { similarity_block<T, R>(a + begin * channels, x, channels, scale, s + begin * kTile); });
  }
}

// Equation (11) for the channels of one block: out[d][i] = along[i] * sum_k anchor[k][d] * ds[k][i] - back[i] * x[d][i], and
// 0 where `alive` is 0. Row d of the result goes to out + d * stride.
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
      const Vec<T> along0 = load(along + j), along1 = load(along + j + lanes);
      const Vec<T> back0 = load(back + j), back1 = load(back + j + lanes);
      const auto live0 = load(alive + j) != T(0), live1 = load(alive + j + lanes) != T(0);
#pragma GCC unroll 6
      for (int r = 0; r < rows; ++r) {
        const T* pixel = x + r * kTile + j;
        F* target = out + r * stride + j;
        Vec<T> value0 = sum[r][v] * along0 - load(pixel) * back0;
        Vec<T> value1 = sum[r][v + 1] * along1 - load(pixel + lanes) * back1;
        value0 = live0 ? value0 : Vec<T>{};
        value1 = live1 ? value1 : Vec<T>{};
        if constexpr (stream) {
          stream_lines<F>(target, value0, value1);
        } else {
          store_as(target, value0);
          store_as(target + lanes, value1);
        }
      }
    }
  }
}

// Equation (11) for a tile. `out` may be `x` itself, with stride kTile.
template <class F, class T, bool stream>
static void gradient_rows(const AnchorView& anchors, int64_t num_classes, int64_t channels, const T* ds, const T* x,
                          const T* along, const T* back, const T* alive, F* out, int64_t stride) {
  const T* a = static_cast<const T*>(anchors.by_channel);
  for (int64_t b = 0; b < block_count(channels); ++b) {
    const int64_t begin = block_begin(channels, b), rows = block_begin(channels, b + 1) - begin;
    with_rows(rows, [&]<int R>() {
      gradient_block<F, T, R, stream>(a + begin * num_classes, ds, num_classes, x + begin * kTile, along, back, alive,
                                      out + begin * stride, stride);
    });
  }
}

}  // namespace proac::PROAC_ISA
