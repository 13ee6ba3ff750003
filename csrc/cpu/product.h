// The two matrix products of a tile: similarities = anchors * pixels, and gradient = anchors^T * dS. Both multiply packed
// blocks of up to kMaxRows rows with a [length][kTile] matrix; a block's sums stay in registers.
#pragma once

#include "tile.h"
#include "tile_unit.h"

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

// Equation (1): the similarities of a tile, [K][kTile], to work.s. scale[i] = unit[i] / tau.
template <class T>
static void similarities(const AnchorView& anchors, int64_t num_classes, int64_t channels, const T* x, const T* scale,
                         const Workspace& work) {
  T* s = static_cast<T*>(work.s);
  if constexpr (kHasTileUnit && sizeof(T) == 4) {
    if (anchors.pixel_parts) {
      const int64_t steps = tile_steps(channels);
      pair_rows(x, channels, anchors.pixel_parts, work.pairs);
      for (int64_t k = 0; k < num_classes; k += 2 * kTileRows) {
        const uint16_t* a = anchors.class_tiles + k * steps * 2 * kTileStep;
        multiply_some_rows(a, num_classes - k, steps, work.pairs, anchors.pixel_parts, s + k * kTile);
      }
      for (int64_t k = 0; k < num_classes; ++k, s += kTile) {
        for (int i = 0; i < kTile; i += kLanes<T>) store<T>(s + i, load(s + i) * load(scale + i));
      }
      return;
    }
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
  PROAC_MEMBER void write(Vec<T> sum0, Vec<T> sum1, const T* x, F* out) const {
    const Vec<T> value0 = sum0 * along[0] - load(x) * back[0], value1 = sum1 * along[1] - load(x + kLanes<T>) * back[1];
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
        last.template write<stream>(sum[r][v], sum[r][v + 1], x + r * kTile + j, out + r * stride + j);
      }
    }
  }
}

// Equation (11) for a tile. `out` may be `x` itself, with stride kTile.
template <class F, class T, bool stream>
static void gradient_rows(const AnchorView& anchors, int64_t num_classes, int64_t channels, const T* ds, const T* x,
                          const T* along, const T* back, const T* alive, uint32_t* pairs, F* out, int64_t stride) {
  if constexpr (kHasTileUnit && sizeof(T) == 4) {
    if (anchors.pixel_parts) {
      constexpr int most = 2 * kTileRows, lanes = kLanes<T>;
      const int64_t steps = tile_steps(num_classes);
      alignas(64) T product[most * kTile];
      pair_rows(ds, num_classes, 2, pairs);
      for (int64_t d = 0; d < channels; d += most) {
        const int64_t rows = channels - d < most ? channels - d : most;
        multiply_some_rows(anchors.channel_tiles + d * steps * 2 * kTileStep, rows, steps, pairs, 2, product);
        for (int i = 0; i < kTile; i += 2 * lanes) {
          const LastStep<T> last(along + i, back + i, alive + i);
          for (int64_t r = 0; r < rows; ++r) {
            const T* sum = product + r * kTile + i;
            last.template write<stream>(load(sum), load(sum + lanes), x + (d + r) * kTile + i,
                                        out + (d + r) * stride + i);
          }
        }
      }
      return;
    }
  }
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
