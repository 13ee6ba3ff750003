// Stage (ii): the sums over P_k of equations (4) and (7), given log Z_k.
#pragma once

#include "statistics.h"

namespace proac::PROAC_ISA {

template <class T>
static void positive_sums(const PositiveCall& call, Range range, int64_t chunk) {
  constexpr int lanes = kLanes<T>;
  const int64_t classes = call.pixels.num_classes;
  const T *positive = static_cast<const T*>(call.positive), *contrast = static_cast<const T*>(call.contrast);
  double* total = call.partial + chunk * 2 * classes;
  for (int64_t k = 0; k < 2 * classes; ++k) total[k] = 0;
  PixelTile<T> tile;
  alignas(64) T margin[kTile], softplus[kTile], sigmoid[kTile];
  for (int64_t first = range.begin; first < range.end; first += kTile) {
    const int64_t left = range.end - first;
    read_pixels<T>(call.pixels, first, left < kTile ? static_cast<int>(left) : kTile, &tile, nullptr);
    if (tile.kept == 0) continue;
    for (int i = 0; i < kTile; ++i)
      margin[i] = tile.label[i] < 0 ? T(0) : contrast[tile.label[i]] - positive[first + i];
    for (int i = 0; i < kTile; i += lanes) {
      Vec<T> log_part, rate;
      softplus_and_sigmoid<T>(load(margin + i), &log_part, &rate);
      store(softplus + i, log_part);
      store(sigmoid + i, rate);
    }
    for (int i = 0; i < kTile; ++i) {
      if (tile.label[i] < 0) continue;
      const double weight = tile.weight[i];
      total[tile.label[i]] += weight * softplus[i];
      total[classes + tile.label[i]] += weight * sigmoid[i];
    }
  }
}

}  // namespace proac::PROAC_ISA
