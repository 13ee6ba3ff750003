// Stage (i): what each class needs to know of the pixels, equations (1), (3) and (5), out of one reading of the features.
#pragma once

#include "sampled.h"

namespace proac::PROAC_ISA {

// w exp(S - 1/tau) can neither overflow nor underflow while 2/tau is at most this and |log w| at most kUsualLogWeight: no
// running maximum is needed.
template <class T>
constexpr double kFixedMaximumRange = sizeof(T) == 4 ? 60 : 600;
// Where a running maximum starts: below every similarity, and far above kExcluded, so that exp(kExcluded - it) is 0.
template <class T>
constexpr T kLowest = kExcluded<T> / 2;
constexpr int kTilesPerFlush = 32;  // tiles whose sums are kept in vector lanes of the compute type

template <class T>
PROAC_INLINE T as(const void* p, int64_t i) {
  return static_cast<const T*>(p)[i];
}

// What the tiles of a chunk share.
template <class T>
struct StatisticsState {
  const StatisticsCall& call;
  const Workspace& work;
  int64_t classes;
  bool running;  // a running maximum for each class, in `lane_max`
  T maximum;     // else this one for all
  double* row;   // (kNumStatistics, K) of the chunk; row kLogZ holds sums relative to class_max until the end
  int pending;   // tiles since the last flush
};

// Takes the value of each pixel's own class out of the similarities, where it then counts as excluded.
template <class T>
PROAC_INLINE void take_own(const PixelTile<T>& tile, T* s, T* own) {
  for (int i = 0; i < kTile; ++i) {
    own[i] = 0;
    if (tile.label[i] < 0) continue;
    T* entry = s + static_cast<int64_t>(tile.label[i]) * kTile + i;
    own[i] = *entry;
    *entry = kExcluded<T>;
  }
}

// logsumexp_c S_ci of each pixel of a tile, the own class having been taken out: equations (5) and (10).
template <class T>
static void pixel_log_z(const T* s, int64_t classes, const T* own, T* log_z) {
  constexpr int lanes = kLanes<T>;
  for (int i = 0; i < kTile; i += lanes) {
    const Vec<T> mine = load(own + i);
    Vec<T> top = mine;
    for (int64_t k = 0; k < classes; ++k) top = larger<T>(load(s + k * kTile + i), top);
    Vec<T> sum = exp<T>(mine - top);
    for (int64_t k = 0; k < classes; ++k) sum += exp<T>(load(s + k * kTile + i) - top);
    store<T>(log_z + i, top + log<T>(sum));
  }
}

// Adds exp(S + log w) of the negatives of a tile to the sums of each class, equation (3).
template <class T, bool running, bool sampled, bool hardest>
static void add_negatives(const StatisticsState<T>& state, const PixelTile<T>& tile, const T* s) {
  constexpr int lanes = kLanes<T>, vectors = kTile / lanes;
  T* lane_sum = static_cast<T*>(state.work.lane_sum);
  T* lane_max = static_cast<T*>(state.work.lane_max);
  T* lane_hardest = static_cast<T*>(state.work.lane_hardest);
  T* lane_weight = static_cast<T*>(state.work.lane_weight);
  const T* rank = static_cast<const T*>(state.call.sample.rank);
  const Vec<T> excluded = broadcast(kExcluded<T>);
  for (int64_t k = 0; k < state.classes; ++k, s += kTile) {
    Vec<T> value[vectors], sum[vectors], top{}, weight{}, largest = excluded;
    if (running) top = load(lane_max + k * lanes);
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) {
      const int i = v * lanes;
      Vec<T> member = load(s + i);
      if (sampled) {
        const auto is_member = load(tile.level + i) <= rank[k];
        // Of the pixel's own class, S is excluded already, and its weight must not count either.
        weight += (is_member & (member != excluded)) ? load(tile.weight + i) : Vec<T>{};
        member = is_member ? member : excluded;
      }
      const Vec<T> log_weight = load(tile.log_weight + i);
      if (hardest) {
        const Vec<T> candidate = log_weight > -kInfinity<T> ? member : excluded;
        largest = ((candidate <= largest) | (largest != largest)) ? largest : candidate;  // a NaN stays
      }
      value[v] = member + log_weight;
      if (running) top = larger<T>(value[v], top);
    }
#pragma GCC unroll 16
    for (int v = 0; v < vectors; ++v) sum[v] = exp<T>(value[v] - (running ? top : broadcast(state.maximum)));
#pragma GCC unroll 16
    for (int width = vectors / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
      for (int v = 0; v < width; ++v) sum[v] += sum[v + width];
    }
    Vec<T> total = load(lane_sum + k * lanes);
    if (running) {
      total *= exp<T>(load(lane_max + k * lanes) - top);
      store(lane_max + k * lanes, top);
    }
    store<T>(lane_sum + k * lanes, total + sum[0]);
    if (hardest) {
      const Vec<T> before = load(lane_hardest + k * lanes);
      store<T>(lane_hardest + k * lanes, ((largest <= before) | (before != before)) ? before : largest);
    }
    if (sampled) store<T>(lane_weight + k * lanes, load(lane_weight + k * lanes) + weight);
  }
}

template <class T>
static void add_negatives(const StatisticsState<T>& state, const PixelTile<T>& tile, const T* s) {
  const bool sampled = state.call.sample.rank, hardest = state.call.hardest_negative;
  if (state.running) {
    if (sampled)
      return hardest ? add_negatives<T, true, true, true>(state, tile, s)
                     : add_negatives<T, true, true, false>(state, tile, s);
    return hardest ? add_negatives<T, true, false, true>(state, tile, s)
                   : add_negatives<T, true, false, false>(state, tile, s);
  }
  if (sampled)
    return hardest ? add_negatives<T, false, true, true>(state, tile, s)
                   : add_negatives<T, false, true, false>(state, tile, s);
  return hardest ? add_negatives<T, false, false, true>(state, tile, s)
                 : add_negatives<T, false, false, false>(state, tile, s);
}

template <class T>
static void clear_lanes(const StatisticsState<T>& state) {
  const int64_t size = state.classes * kLanes<T>;
  memset(state.work.lane_sum, 0, size * sizeof(T));
  memset(state.work.lane_weight, 0, size * sizeof(T));
  for (int64_t i = 0; i < size; ++i) {
    static_cast<T*>(state.work.lane_max)[i] = kLowest<T>;
    static_cast<T*>(state.work.lane_hardest)[i] = kExcluded<T>;
  }
}

// Moves the lanes' sums to the chunk's, in double and lane by lane.
template <class T>
static void flush(StatisticsState<T>* state) {
  constexpr int lanes = kLanes<T>;
  const int64_t classes = state->classes;
  double *log_z = state->row + kLogZ * classes, *hardest = state->row + kHardest * classes;
  double *weight = state->row + kNegativeWeight * classes, *top = state->work.class_max;
  for (int64_t k = 0; k < classes; ++k) {
    for (int l = 0; l < lanes; ++l) {
      const int64_t at = k * lanes + l;
      const double sum = as<T>(state->work.lane_sum, at), largest = as<T>(state->work.lane_hardest, at);
      if (state->running && sum != 0) {
        const double lane_top = as<T>(state->work.lane_max, at), new_top = lane_top > top[k] ? lane_top : top[k];
        log_z[k] = log_z[k] * __builtin_exp(top[k] - new_top) + sum * __builtin_exp(lane_top - new_top);
        top[k] = new_top;
      } else {
        log_z[k] += sum;
      }
      weight[k] += as<T>(state->work.lane_weight, at);
      if (!(largest <= hardest[k]) && hardest[k] == hardest[k] && largest != kExcluded<T>) hardest[k] = largest;
    }
  }
  clear_lanes(*state);
  state->pending = 0;
}

// From a fixed maximum to running ones, where weights are extreme.
template <class T>
static __attribute__((noinline)) void start_running(StatisticsState<T>* state) {
  flush(state);
  state->running = true;
  for (int64_t k = 0; k < state->classes; ++k) {
    if (state->row[kLogZ * state->classes + k] == 0) state->work.class_max[k] = kLowest<T>;
  }
}

// The parts of a tile that belong to the pixels' own classes: W_k, sum w S, the twin, and S_{y_i,i} itself.
template <class T>
static void add_positives(StatisticsState<T>* state, const PixelTile<T>& tile, const T* own, const T* log_z) {
  const int64_t classes = state->classes;
  T* positive = static_cast<T*>(state->call.positive) + tile.first;
  for (int i = 0; i < tile.count; ++i) {
    positive[i] = own[i];
    if (tile.label[i] < 0) continue;
    const double weight = tile.weight[i];
    double* row = state->row + tile.label[i];
    row[kWeight * classes] += weight;
    row[kPositiveSum * classes] += weight * own[i];
    if (log_z) row[kPixelLossSum * classes] += weight * (log_z[i] - own[i]);
  }
}

template <class T, class X>
static void add_dense_tile(StatisticsState<T>* state, const PixelTile<T>& tile, const X& x, const PixelScale<T>& scale,
                           bool with_positives) {
  const StatisticsCall& call = state->call;
  alignas(64) T tau_scale[kTile], own[kTile], log_z[kTile];
  T* s = static_cast<T*>(state->work.s);
  for (int i = 0; i < kTile; ++i) tau_scale[i] = static_cast<T>(scale.unit[i] / call.temperature);
  similarities<T>(call.anchors, state->classes, call.features.channels, x, tau_scale, state->work);
  take_own<T>(tile, s, own);
  if (call.pixel_anchor) pixel_log_z<T>(s, state->classes, own, log_z);
  add_negatives<T>(*state, tile, s);
  if (with_positives) add_positives<T>(state, tile, own, call.pixel_anchor ? log_z : nullptr);
  if (++state->pending == kTilesPerFlush) flush(state);
}

// Stage (i) for the pixels of one chunk, which are packed into x.
template <class F, class X>
static void class_statistics_in(const X& x, const StatisticsCall& call, Range range, int64_t chunk,
                                const Workspace& work) {
  using T = Compute<F>;
  const int64_t classes = call.pixels.num_classes;
  StatisticsState<T> state{
      call, work, classes, false, static_cast<T>(1 / call.temperature), call.partial + chunk * kNumStatistics * classes,
      0};
  state.running = 2 / call.temperature > kFixedMaximumRange<T>;
  for (int64_t i = 0; i < kNumStatistics * classes; ++i) state.row[i] = 0;
  for (int64_t k = 0; k < classes; ++k) {
    state.row[kHardest * classes + k] = -__builtin_inf();
    work.class_max[k] = state.running ? double(kLowest<T>) : double(state.maximum);
  }
  clear_lanes(state);
  Diagnostics* bad = call.diagnostics + chunk;
  *bad = {0, 0, 0, 0};

  const TileUnit tile_unit(call.anchors.tile_use.pixel_parts);
  PixelTile<T> tile;
  PixelScale<T> scale;
  SampledTile<T> sampled(call.sample, call.pixels, call.features.channels, work, call.pixel_anchor);
  for (int64_t first = range.begin; first < range.end; first += kTile) {
    const int64_t left = range.end - first;
    read_pixels<T>(call.pixels, first, left < kTile ? static_cast<int>(left) : kTile, &tile, bad);
    if (tile.kept == 0) {
      memset(static_cast<T*>(call.positive) + first, 0, tile.count * sizeof(T));
      continue;
    }
    if (tile.extreme && !state.running) start_running(&state);
    pack_tile<F>(call.features, tile, x, &scale);
    const int members = call.sample.rank ? read_levels<T>(call.sample, classes, &tile) : 0;
    if (!sampled.wants(members)) {
      add_dense_tile<T>(&state, tile, x, scale, true);
      continue;
    }
    if constexpr (!kIsPairs<X>) {
      alignas(64) T own[kTile];
      own_similarities<T>(call.anchors, classes, call.features.channels, tile, x.data, scale, call.temperature, own);
      add_positives<T>(&state, tile, own, nullptr);
      if (sampled.full(members)) {
        add_dense_tile<T>(&state, sampled.tile, PixelFloats<T>{sampled.x}, sampled.scale, false);
        sampled.clear();
      }
      sampled.append(tile, x.data, scale, classes);
    }
  }
  if (sampled.tile.kept) add_dense_tile<T>(&state, sampled.tile, PixelFloats<T>{sampled.x}, sampled.scale, false);
  flush(&state);
  for (int64_t k = 0; k < classes; ++k) {
    double& log_z = state.row[kLogZ * classes + k];
    log_z = work.class_max[k] + __builtin_log(log_z);
  }
}

template <class F>
static void class_statistics(const StatisticsCall& call, Range range, int64_t chunk, const Workspace& work) {
  with_packed_pixels<F>(call.anchors, call.features.channels, work,
                        [&](const auto& x) { class_statistics_in<F>(x, call, range, chunk, work); });
}

}  // namespace proac::PROAC_ISA
