#include "device.h"
#include "generic.cuh"

namespace proac::cuda {

// Stage (i), (1), (3) and (5): load a tile -> S of 64 classes -> reduce over the tile's pixels into the block's partial rows.
template <class T>
__global__ void __launch_bounds__(kGenericThreads, 1) generic_statistics_kernel(GenericStatistics a) {
  using C = Compute<T>;
  SHARED(GenericTile<C>, tile);
  SHARED(C[kGenericPixels], positive);
  SHARED(C[kGenericPixels], excess);
  SHARED(Diagnostics, diagnostics);
  SHARED(int, is_last);
  int t = threadIdx.x, num_classes = static_cast<int>(a.pixels.num_classes);
  C inverse_tau = static_cast<C>(1.0 / a.temperature), none = static_cast<C>(minus_infinity());
  const C* unit = static_cast<const C*>(a.unit);
  C* partial = static_cast<C*>(a.merge.partial) + static_cast<int64_t>(blockIdx.x) * kPartialRows * num_classes;
  for (int i = t; i < kPartialRows * num_classes; i += kGenericThreads) {
    int row = i / num_classes;
    partial[i] = row == kMaximum || row == kHardest ? none : C(0);
  }
  if (t == 0) diagnostics = {};
  for (int64_t n = blockIdx.x; n < a.tiling.count; n += gridDim.x) {
    TilePlace place = place_of(a.tiling, a.features, n);
    SYNC_THREADS(generic_pixels_are_free);
    read_generic_tile<C, T>(tile, a.features, a.pixels, a.sampling, place, &diagnostics);
    LogSum<C> all_classes = empty_sum<C>();  // of pixel t
    C own = C(0);
    for (int k0 = 0; k0 < num_classes; k0 += kGenericClasses) {
      similarities<C, T>(tile, a.features, unit, num_classes, place, k0, inverse_tau);
      // four threads to a class
      int row = t / 4, k = k0 + row;
      LogSum<C> sum = empty_sum<C>();
      C weight = C(0), hardest = none;
      for (int p = t % 4; k < num_classes && p < kGenericPixels; p += 4) {
        if (!is_negative(tile, a.sampling, p, k)) continue;
        sum = merge(sum, LogSum<C>{tile.s[row][p] + tile.log_weight[p], C(1)});
        weight += tile.weight[p];
        if (a.hardest_negative) hardest = larger(hardest, tile.s[row][p]);
      }
      for (int o = 1; o < 4; o <<= 1) {
        C m = __shfl_xor_sync(kAllLanes, sum.maximum, o), s = __shfl_xor_sync(kAllLanes, sum.sum, o);
        sum = merge(sum, LogSum<C>{m, s});
        weight += __shfl_xor_sync(kAllLanes, weight, o);
        hardest = larger(hardest, __shfl_xor_sync(kAllLanes, hardest, o));
      }
      if (t % 4 == 0 && k < num_classes) {
        C* mine = partial + k;
        sum = merge(LogSum<C>{mine[kMaximum * num_classes], mine[kExpSum * num_classes]}, sum);
        mine[kMaximum * num_classes] = sum.maximum, mine[kExpSum * num_classes] = sum.sum;
        mine[kNegativeWeight * num_classes] += weight;
        mine[kHardest * num_classes] = larger(mine[kHardest * num_classes], hardest);
      }
      // one thread to a pixel
      if (t < kGenericPixels) {
        int label = tile.label[t];
        if (label >= k0 && label < k0 + kGenericClasses) own = tile.s[label - k0][t];
        if (a.pixel_anchor)
          for (int r = 0; r < kGenericClasses && k0 + r < num_classes; ++r)
            all_classes = merge(all_classes, LogSum<C>{tile.s[r][t], C(1)});
      }
    }
    if (t < kGenericPixels) {
      int64_t i = place.image * a.features.pixels + place.first + t;
      if (t < place.pixels) static_cast<C*>(a.positive)[i] = own;
      positive[t] = tile.weight[t] * own;
      excess[t] = a.pixel_anchor ? tile.weight[t] * (value(all_classes) - own) : C(0);
    }
    SYNC_THREADS(generic_terms_are_written);
    add_by_class<3, C>(
        kGenericPixels, tile.label, {tile.weight, positive, excess},
        {partial + kWeight * num_classes, partial + kPositiveSum * num_classes, partial + kPixelLossSum * num_classes});
  }
  merge_statistics<C>(a.merge, a.pixels, false, diagnostics, &is_last);
}

// Few where K makes a block's own memory large.
int generic_blocks(const Features& x, int64_t num_classes) {
  return static_cast<int>(few_blocks(tile_pixels(x, kGenericPixels).count, num_classes > 512 ? 64 : 256));
}

cudaError_t generic_statistics(const GenericStatistics& a, int blocks, cudaStream_t stream) {
  switch (a.features.type) {
    case Type::float16:
      return launch(generic_statistics_kernel<__half>, blocks, kGenericThreads, 0, stream, a);
    case Type::bfloat16:
      return launch(generic_statistics_kernel<__nv_bfloat16>, blocks, kGenericThreads, 0, stream, a);
    case Type::float32:
      return launch(generic_statistics_kernel<float>, blocks, kGenericThreads, 0, stream, a);
    default:
      return launch(generic_statistics_kernel<double>, blocks, kGenericThreads, 0, stream, a);
  }
}

}  // namespace proac::cuda
