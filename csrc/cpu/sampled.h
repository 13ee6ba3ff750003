// Sampled sets: most pixels of a tile are then in no N_k. Those need the similarity to their own class only; the members
// are gathered into dense tiles of their own.
#pragma once

#include "product.h"

namespace proac::PROAC_ISA {

// Below this number of classes the whole product costs no more than the lookups of each pixel's own prototype.
constexpr int64_t kFewClasses = 32;

// S_{y_i,i} of each pixel of a tile; 0 outside V.
template <class T>
static void own_similarities(const AnchorView& anchors, int64_t num_classes, int64_t channels, const PixelTile<T>& tile,
                             const T* x, const PixelScale<T>& scale, double temperature, T* own) {
  constexpr int lanes = kLanes<T>;
  const T* anchor = static_cast<const T*>(anchors.transposed);
  alignas(64) int32_t label[kTile];
  for (int i = 0; i < kTile; ++i) label[i] = tile.label[i] < 0 ? 0 : tile.label[i];
  Vec<T> total[kTile / lanes] = {};
  for (int64_t begin = 0; begin < channels; begin += 256) {
    const int64_t end = begin + 256 < channels ? begin + 256 : channels;
    Vec<T> sum[kTile / lanes] = {};
    for (int64_t d = begin; d < end; ++d) {
#pragma GCC unroll 16
      for (int v = 0; v < kTile / lanes; ++v) {
        sum[v] += gather<T>(anchor + d * num_classes, label + v * lanes) * load(x + d * kTile + v * lanes);
      }
    }
    for (int v = 0; v < kTile / lanes; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < kTile / lanes; ++v) store(own + v * lanes, total[v]);
  for (int i = 0; i < kTile; ++i) {
    own[i] = tile.label[i] < 0 ? T(0) : own[i] * static_cast<T>(scale.unit[i] / temperature);
  }
}

// Members of sampled sets, gathered until they fill a tile. tile.kept counts them; they need not be consecutive.
template <class T>
struct SampledTile {
  PixelTile<T> tile;
  PixelScale<T> scale;
  int64_t index[kTile];
  T* x;
  int64_t channels;
  bool possible;

  SampledTile(const SampleView& sample, const PixelView& pixels, int64_t num_channels, const Workspace& work,
              bool all_pixels_need_all_classes)
      : x(static_cast<T*>(work.sampled_x)),
        channels(num_channels),
        possible(sample.rank && !all_pixels_need_all_classes && pixels.num_classes > kFewClasses) {
    if (possible) memset(x, 0, sizeof(T) * channels * kTile);
    clear();
  }

  void clear() {
    tile.kept = 0;
    tile.count = kTile;
    for (int i = 0; i < kTile; ++i) {
      tile.label[i] = -1;
      tile.weight[i] = 0;
      tile.log_weight[i] = -kInfinity<T>;
      tile.level[i] = kInfinity<T>;
      scale.unit[i] = scale.inverse_norm[i] = 0;
    }
  }

  // Whether a tile with so few members is better taken apart.
  bool wants(int members) const { return possible && members <= kTile / 2; }

  // Whether so many more do not fit.
  bool full(int members) const { return tile.kept + members > kTile; }

  // Appends the members of a tile.
  void append(const PixelTile<T>& from, const T* from_x, const PixelScale<T>& from_scale, int64_t num_classes) {
    for (int i = 0; i < from.count; ++i) {
      if (from.label[i] < 0 || from.level[i] >= num_classes) continue;
      const int at = tile.kept++;
      tile.label[at] = from.label[i];
      tile.weight[at] = from.weight[i];
      tile.log_weight[at] = from.log_weight[i];
      tile.level[at] = from.level[i];
      scale.unit[at] = from_scale.unit[i];
      scale.inverse_norm[at] = from_scale.inverse_norm[i];
      index[at] = from.first + i;
      for (int64_t d = 0; d < channels; ++d) x[d * kTile + at] = from_x[d * kTile + i];
    }
  }
};

}  // namespace proac::PROAC_ISA
