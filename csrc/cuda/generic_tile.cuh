// The plain path's tile: 64 pixels x 64 classes of S by fused multiply-adds, any D and K, any dtype. Also what both paths
// ask of a tile of pixels. Here "right" comes first: features are read once more for their norms and for every 64 classes.
#pragma once
#include "math.cuh"
#include "pixels.cuh"

namespace proac::cuda {

// Tiles of consecutive pixels, none crossing from one image to the next.
struct Tiling {
  int64_t per_image, count;
  int pixels;  // of a tile
};
inline Tiling tile_pixels(const Features& x, int pixels) {
  int64_t per_image = (x.pixels + pixels - 1) / pixels;
  return {per_image, per_image * x.batch, pixels};
}
struct TilePlace {
  int64_t image, first;  // first pixel of the tile in its image
  int pixels;            // those that exist
};
__device__ __forceinline__ TilePlace place_of(const Tiling& tiling, const Features& x, int64_t tile) {
  TilePlace place;
  int64_t within;
  place.image = divide(tile, tiling.per_image, within);
  place.first = within * tiling.pixels;
  int64_t rest = x.pixels - place.first;
  place.pixels = static_cast<int>(rest < tiling.pixels ? rest : tiling.pixels);
  return place;
}

constexpr int kGenericThreads = 256, kGenericPixels = 64, kGenericClasses = 64, kGenericDepth = 8;

template <class C>
struct GenericTile {
  C x[kGenericDepth][kGenericPixels], p[kGenericDepth][kGenericClasses];
  C s[kGenericClasses][kGenericPixels + 1];
  C inverse_norm[kGenericPixels];  // 0 for a zero vector
  int label[kGenericPixels];
  C weight[kGenericPixels], log_weight[kGenericPixels];
  uint32_t key[kGenericPixels];
  int64_t index[kGenericPixels];
};

template <class C, class T>
__device__ __forceinline__ C load(const Features& x, int64_t image, int64_t channel, int64_t pixel) {
  return widen<C>(
      static_cast<const T*>(x.data)[image * x.stride_batch + channel * x.stride_channel + pixel * x.stride_pixel]);
}

// Labels, weights, keys and norms of a tile, to be read after the next barrier.
template <class C, class T>
__device__ void read_generic_tile(GenericTile<C>& tile, const Features& x, const Pixels& pixels,
                                  const Sampling& sampling, const TilePlace& place, Diagnostics* diagnostics) {
  int t = threadIdx.x, p = t % kGenericPixels, part = t / kGenericPixels;
  constexpr int kParts = kGenericThreads / kGenericPixels;
  if (t < kGenericPixels) {
    int64_t i = place.image * x.pixels + place.first + t;
    Pixel<C> pixel = {-1, C(0), false, false};
    if (t < place.pixels) pixel = read_pixel<C>(pixels, i);
    if (diagnostics) record(*diagnostics, pixel, i);
    tile.label[t] = pixel.label, tile.weight[t] = pixel.weight, tile.log_weight[t] = log(pixel.weight);
    if (sampling.thresholds) {
      tile.index[t] = i + sampling.rng[1];
      tile.key[t] = philox_key(sampling.rng[0], tile.index[t]);
    }
  }
  C largest = C(0), sum = C(0);
  if (p < place.pixels)
    for (int64_t d = part; d < x.channels; d += kParts)
      largest = larger(largest, static_cast<C>(fabs(load<C, T>(x, place.image, d, place.first + p))));
  tile.s[part][p] = largest;
  SYNC_THREADS(generic_maxima_are_written);
  for (int other = 0; other < kParts; ++other) largest = larger(largest, tile.s[other][p]);
  if (largest == C(0)) largest = C(1);
  if (p < place.pixels)
    for (int64_t d = part; d < x.channels; d += kParts) {
      C v = load<C, T>(x, place.image, d, place.first + p) / largest;
      sum += v * v;
    }
  tile.s[kParts + part][p] = sum;
  SYNC_THREADS(generic_squares_are_written);
  if (part == 0) {
    for (int other = 1; other < kParts; ++other) sum += tile.s[kParts + other][p];
    C norm = largest * sqrt(sum);
    tile.inverse_norm[p] = isinf(norm)                    ? static_cast<C>(not_a_number())
                           : norm <= static_cast<C>(kEps) ? C(0)
                                                          : C(1) / norm;
  }
}

// S of 64 classes from first_class on. Barriers before and after; tile.s of classes beyond the last is 0.
template <class C, class T>
__device__ void similarities(GenericTile<C>& tile, const Features& x, const C* unit, int num_classes,
                             const TilePlace& place, int first_class, C inverse_tau) {
  int t = threadIdx.x, row = t / 16 * 4, column = t % 16 * 4;
  C total[4][4] = {};
  bool planes = x.stride_pixel == 1;
  for (int64_t d0 = 0; d0 < x.channels; d0 += kGenericDepth) {
    SYNC_THREADS(generic_slices_are_free);
    for (int i = t; i < kGenericDepth * kGenericPixels; i += kGenericThreads) {
      int d = planes ? i / kGenericPixels : i % kGenericDepth, p = planes ? i % kGenericPixels : i / kGenericDepth;
      bool inside = d0 + d < x.channels && p < place.pixels;
      tile.x[d][p] = inside ? load<C, T>(x, place.image, d0 + d, place.first + p) : C(0);
    }
    for (int i = t; i < kGenericDepth * kGenericClasses; i += kGenericThreads) {
      int d = i % kGenericDepth, k = i / kGenericDepth;
      bool inside = d0 + d < x.channels && first_class + k < num_classes;
      tile.p[d][k] = inside ? unit[(first_class + k) * x.channels + d0 + d] : C(0);
    }
    SYNC_THREADS(generic_slices_are_filled);
    C part[4][4] = {};  // short sums, added up: half the rounding of one long sum
#pragma unroll
    for (int d = 0; d < kGenericDepth; ++d)
      for (int a = 0; a < 4; ++a)
        for (int b = 0; b < 4; ++b) part[a][b] += tile.p[d][row + a] * tile.x[d][column + b];
    for (int a = 0; a < 4; ++a)
      for (int b = 0; b < 4; ++b) total[a][b] += part[a][b];
  }
  for (int a = 0; a < 4; ++a)
    for (int b = 0; b < 4; ++b) tile.s[row + a][column + b] = total[a][b] * tile.inverse_norm[column + b] * inverse_tau;
  SYNC_THREADS(generic_similarities_are_written);
}

// i in N_k?
template <class C>
__device__ __forceinline__ bool is_negative(const GenericTile<C>& tile, const Sampling& sampling, int p, int k) {
  if (tile.label[p] < 0 || tile.label[p] == k) return false;
  return !sampling.thresholds || is_drawn(sampling, k, tile.key[p], tile.index[p]);
}

}  // namespace proac::cuda
