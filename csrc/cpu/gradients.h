// Stage (iii): the gradients of features and prototypes, equations (7) to (11). The similarities are computed again from
// the packed tile and replaced in place by dL/dS; features are read once and their gradient is written once.
#pragma once

#include "statistics.h"

namespace proac::PROAC_ISA {

// Per-pixel factors of the last step of equation (11), dx = along * sum_k dS phat_k - back * x.
template <class T>
struct alignas(64) GradientScale {
  T along[kTile];  // 1 / (tau |x|)
  T back[kTile];   // <g, xhat> / |x|, times what makes xhat of x
};

// Equations (8) and (10) for the pixels' own classes: dL/dS_{y_i,i}, given S_{y_i,i} and, with the twin, the others' sum
// of softmax. That is 1 - softmax of the own class, of which a difference would leave nothing where it is near 1.
template <class T>
static void own_gradient(const GradientCall& call, const PixelTile<T>& tile, const T* own, const T* others, T* ds) {
  constexpr int lanes = kLanes<T>;
  alignas(64) T margin[kTile], factor[kTile];
  for (int i = 0; i < kTile; ++i) {
    const int32_t k = tile.label[i];
    margin[i] = k < 0 ? T(0) : as<T>(call.contrast, k) - own[i];
    factor[i] = k < 0 ? T(0) : -as<T>(call.positive_scale, k) * tile.weight[i];
  }
  for (int i = 0; i < kTile; i += lanes) {
    Vec<T> softplus, sigmoid;
    softplus_and_sigmoid<T>(load(margin + i), &softplus, &sigmoid);
    Vec<T> result = load(factor + i) * sigmoid;
    if (others) result -= static_cast<T>(call.pixel_scale) * load(tile.weight + i) * load(others + i);
    store(ds + i, result);
  }
}

// Equations (9) and (10) for all other classes, in place of S; `dot[i]` gets sum_k dS_ki S_ki, and `others[i]`, with the
// twin, the sum of their softmax.
template <class T, bool sampled, bool twin>
static void other_gradients(const GradientCall& call, const PixelTile<T>& tile, const T* pixel_log_z, T* s, T* dot,
                            T* others) {
  constexpr int lanes = kLanes<T>, vectors = kTile / lanes;
  const T *log_z = static_cast<const T*>(call.log_z), *scale = static_cast<const T*>(call.negative_scale);
  const T* rank = static_cast<const T*>(call.sample.rank);
  const T pixel_scale = static_cast<T>(call.pixel_scale);
  Vec<T> sum[vectors] = {}, softmax_sum[vectors] = {};
  for (int64_t k = 0; k < call.pixels.num_classes; ++k, s += kTile) {
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const int i = v * lanes;
      const Vec<T> similarity = load(s + i);
      Vec<T> member = similarity;
      if (sampled) member = load(tile.level + i) <= rank[k] ? similarity : broadcast(kExcluded<T>);
      Vec<T> ds = scale[k] * exp<T>(member + load(tile.log_weight + i) - log_z[k]);
      if (twin) {
        const Vec<T> softmax = exp<T>(similarity - load(pixel_log_z + i));
        ds += pixel_scale * load(tile.weight + i) * softmax;
        softmax_sum[v] += softmax;
      }
      sum[v] += ds * similarity;
      store(s + i, ds);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    store(dot + v * lanes, sum[v]);
    if (twin) store(others + v * lanes, softmax_sum[v]);
  }
}

PROAC_INLINE int64_t padded_classes(int64_t classes) { return (classes + kClassPad - 1) / kClassPad * kClassPad; }

// The prototypes' gradient: total[d][k] += sum_i x[d][i] unit[i] dS_ki. Vectors run over classes, so dS is transposed.
template <class T, int rows, int vectors>
static void anchor_block(const T* x, const T* ds, int64_t padded, double* total) {
  constexpr int lanes = kLanes<T>;
  Vec<T> sum[rows][vectors] = {};
  for (int i = 0; i < kTile; ++i) {
    Vec<T> value[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) value[v] = load(ds + i * padded + v * lanes);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<T> pixel = broadcast(x[r * kTile + i]);
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] += pixel * value[v];
    }
  }
  for (int r = 0; r < rows; ++r) {
    for (int v = 0; v < vectors; ++v) {
      alignas(64) T value[lanes];
      store<T>(value, sum[r][v]);
      for (int l = 0; l < lanes; ++l) total[r * padded + v * lanes + l] += value[l];
    }
  }
}

template <class T>
static void add_anchor_gradient(const GradientCall& call, const T* x, const PixelScale<T>& scale, const T* ds,
                                T* transposed, double* total) {
  constexpr int lanes = kLanes<T>;
  const int64_t classes = call.pixels.num_classes, padded = padded_classes(classes);
  for (int64_t k = 0; k < padded; ++k) {
    for (int i = 0; i < kTile; ++i) {
      // A pixel outside V must not spread a NaN of dS, which 0 times it would.
      const bool counts = k < classes && scale.unit[i] != 0;
      transposed[i * padded + k] = counts ? ds[k * kTile + i] * scale.unit[i] : T(0);
    }
  }
  constexpr int rows = 4;
  for (int64_t d = 0; d < call.features.channels;) {
    const bool whole = d + rows <= call.features.channels;
    for (int64_t k = 0; k < classes;) {
      const bool wide = k + 4 * lanes <= padded;
      const T *pixels = x + d * kTile, *block = transposed + k;
      double* out = total + d * padded + k;
      if (whole && wide)
        anchor_block<T, rows, 4>(pixels, block, padded, out);
      else if (whole)
        anchor_block<T, rows, 1>(pixels, block, padded, out);
      else if (wide)
        anchor_block<T, 1, 4>(pixels, block, padded, out);
      else
        anchor_block<T, 1, 1>(pixels, block, padded, out);
      k += (wide ? 4 : 1) * lanes;
    }
    d += whole ? rows : 1;
  }
}

template <class T>
PROAC_INLINE void gradient_scale(const PixelScale<T>& scale, const T* dot, double temperature, GradientScale<T>* out) {
  for (int i = 0; i < kTile; ++i) {
    out->along[i] = static_cast<T>(scale.inverse_norm[i] / temperature);
    out->back[i] = dot[i] * scale.unit[i] * scale.inverse_norm[i];
  }
}

// dL/dS of a whole tile, [K][kTile] in work.s, and what the last step of equation (11) needs beside it.
template <class T, class X>
static void dense_gradient(const GradientCall& call, const Workspace& work, const PixelTile<T>& tile, const X& x,
                           const PixelScale<T>& scale, GradientScale<T>* last) {
  const int64_t classes = call.pixels.num_classes;
  T* s = static_cast<T*>(work.s);
  alignas(64) T tau_scale[kTile], own[kTile], own_ds[kTile], dot[kTile], log_z[kTile], others[kTile];
  for (int i = 0; i < kTile; ++i) tau_scale[i] = static_cast<T>(scale.unit[i] / call.temperature);
  similarities<T>(call.anchors, classes, call.features.channels, x, tau_scale, work);
  take_own<T>(tile, s, own);
  if (call.pixel_anchor) pixel_log_z<T>(s, classes, own, log_z);
  const bool sampled = call.sample.rank;
  if (call.pixel_anchor) {
    sampled ? other_gradients<T, true, true>(call, tile, log_z, s, dot, others)
            : other_gradients<T, false, true>(call, tile, log_z, s, dot, others);
  } else {
    sampled ? other_gradients<T, true, false>(call, tile, nullptr, s, dot, nullptr)
            : other_gradients<T, false, false>(call, tile, nullptr, s, dot, nullptr);
  }
  own_gradient<T>(call, tile, own, call.pixel_anchor ? others : nullptr, own_ds);
  for (int i = 0; i < kTile; ++i) {
    if (tile.label[i] < 0) continue;
    s[static_cast<int64_t>(tile.label[i]) * kTile + i] = own_ds[i];
    dot[i] += own_ds[i] * own[i];
  }
  gradient_scale<T>(scale, dot, call.temperature, last);
}

// Equation (11) for a tile whose pixels are in no sampled set: g_i has the part of the own class only. In place of x.
template <class T>
static void own_rows(const GradientCall& call, const PixelTile<T>& tile, T* x, const PixelScale<T>& scale) {
  constexpr int lanes = kLanes<T>;
  const int64_t classes = call.pixels.num_classes;
  const T* anchor = static_cast<const T*>(call.anchors.transposed);
  alignas(64) T own[kTile], ds[kTile], dot[kTile];
  alignas(64) int32_t label[kTile];
  GradientScale<T> last;
  own_similarities<T>(call.anchors, classes, call.features.channels, tile, x, scale, call.temperature, own);
  own_gradient<T>(call, tile, own, nullptr, ds);
  for (int i = 0; i < kTile; ++i) {
    dot[i] = ds[i] * own[i];
    label[i] = tile.label[i] < 0 ? 0 : tile.label[i];
  }
  gradient_scale<T>(scale, dot, call.temperature, &last);
  for (int64_t d = 0; d < call.features.channels; ++d) {
#pragma GCC unroll 16
    for (int i = 0; i < kTile; i += lanes) {
      const Vec<T> along = load(last.along + i) * load(ds + i);
      const Vec<T> value =
          gather<T>(anchor + d * classes, label + i) * along - load(x + d * kTile + i) * load(last.back + i);
      store<T>(x + d * kTile + i, load(scale.inverse_norm + i) != T(0) ? value : Vec<T>{});
    }
  }
}

// Computes the gradients of a tile of gathered members and writes each where it belongs.
template <class F, class T>
static void write_sampled(const GradientCall& call, const Workspace& work, SampledTile<T>* sampled) {
  const FeatureView& view = call.gradient;
  T* x = sampled->x;
  const PixelFloats<T> pixels{x};
  GradientScale<T> last;
  dense_gradient<T>(call, work, sampled->tile, pixels, sampled->scale, &last);
  gradient_rows<T, T, false>(call.anchors, call.pixels.num_classes, view.channels, static_cast<T*>(work.s), pixels,
                             last.along, last.back, sampled->scale.inverse_norm, work.tiles, x, kTile);
  for (int i = 0; i < sampled->tile.kept; ++i) {
    F* out = static_cast<F*>(view.data) + sampled->index[i] / view.pixels * view.batch_stride +
             sampled->index[i] % view.pixels * view.pixel_stride;
    for (int64_t d = 0; d < view.channels; ++d) narrow(x[d * kTile + i], out + d * view.channel_stride);
  }
  memset(x, 0, sizeof(T) * view.channels * kTile);
  sampled->clear();
}

// Stage (iii) for the pixels of one chunk, which are packed into x.
template <class F, class X>
static void loss_gradients_in(const X& x, const GradientCall& call, Range range, int64_t chunk, const Workspace& work) {
  using T = Compute<F>;
  const FeatureView& view = call.gradient;
  const int64_t classes = call.pixels.num_classes, channels = call.features.channels;
  const int64_t padded = padded_classes(classes);
  T *gradient = static_cast<T*>(work.x), *s = static_cast<T*>(work.s);  // the gradient takes the floats' place
  PixelTile<T> tile;
  PixelScale<T> scale;
  GradientScale<T> last;
  const TileUnit tile_unit(call.anchors.tile_use.pixel_parts);
  SampledTile<T> sampled(call.sample, call.pixels, channels, work, call.pixel_anchor || call.anchor_gradient);
  for (int64_t first = range.begin; first < range.end; first += kTile) {
    const int64_t left = range.end - first;
    read_pixels<T>(call.pixels, first, left < kTile ? static_cast<int>(left) : kTile, &tile, nullptr);
    if (tile.kept == 0) {
      if (!view.data) continue;
      memset(gradient, 0, sizeof(T) * channels * kTile);
      unpack_tile<F, T>(view, tile, gradient);
      continue;
    }
    pack_tile<F>(call.features, tile, x, &scale);
    const int members = call.sample.rank ? read_levels<T>(call.sample, classes, &tile) : 0;
    if constexpr (!kIsPairs<X>) {
      if (sampled.wants(members)) {
        if (sampled.full(members)) write_sampled<F, T>(call, work, &sampled);
        sampled.append(tile, x.data, scale, classes);
        own_rows<T>(call, tile, x.data, scale);
        unpack_tile<F, T>(view, tile, gradient);
        continue;
      }
    }
    dense_gradient<T>(call, work, tile, x, scale, &last);
    if constexpr (!kIsPairs<X>) {
      if (call.anchor_gradient) {
        add_anchor_gradient<T>(call, x.data, scale, s, static_cast<T*>(work.transposed_s),
                               call.anchor_gradient + chunk * channels * padded);
      }
    }
    if (!view.data) continue;
    const int64_t image = first / view.pixels, pixel = first % view.pixels;
    if (view.pixel_stride == 1 && pixel + kTile <= view.pixels) {
      F* out = static_cast<F*>(view.data) + image * view.batch_stride + pixel;
      const bool aligned = (reinterpret_cast<uintptr_t>(out) | (sizeof(F) * view.channel_stride)) % 64 == 0;
      const auto write =
          kHasStream && call.stream && aligned ? gradient_rows<F, T, true, X> : gradient_rows<F, T, false, X>;
      write(call.anchors, classes, channels, s, x, last.along, last.back, scale.inverse_norm, work.tiles, out,
            view.channel_stride);
    } else {
      gradient_rows<T, T, false>(call.anchors, classes, channels, s, x, last.along, last.back, scale.inverse_norm,
                                 work.tiles, gradient, kTile);
      unpack_tile<F, T>(view, tile, gradient);
    }
  }
  if (sampled.tile.kept) write_sampled<F, T>(call, work, &sampled);
  stream_fence();
}

template <class F>
static void loss_gradients(const GradientCall& call, Range range, int64_t chunk, const Workspace& work) {
  with_packed_pixels<F>(call.anchors, call.features.channels, work,
                        [&](const auto& x) { loss_gradients_in<F>(x, call, range, chunk, work); });
}

}  // namespace proac::PROAC_ISA
