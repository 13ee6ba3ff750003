// Stage (i) on the fast path, (1), (3) and (5).
#pragma once
#include "fast_tile.cuh"

namespace proac::cuda {

template <int kTiles>
constexpr int kForwardChunkBytes = kTiles <= 8 ? 64 : 32;

// What a warp finds for one class over its 16 pixels. Aligned, so that it is one access to shared memory.
struct alignas(16) WarpPart {
  float maximum, sum, weight, hardest;
};

// Reduces the warp's registers over its pixels; lanes 0 to 3 write parts[k].
template <int kTiles>
__device__ __forceinline__ void reduce_over_pixels(const FastStatistics& job, const MyPixels<kTiles>& mine,
                                                   const float (&s)[kTiles][4], WarpPart* parts) {
  bool sampled = job.common.sampling.thresholds, hardest_negative = job.hardest_negative;
  int lane = threadIdx.x & 31, num_classes = static_cast<int>(job.common.pixels.num_classes);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n * 8 >= num_classes) break;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      bool in[2] = {mine.is_negative(0, n, c), mine.is_negative(1, n, c)};
      float v[2], weight = 0.f, hardest = minus_infinity();
#pragma unroll
      for (int j = 0; j < 2; ++j) v[j] = in[j] ? s[n][2 * j + c] + mine.log_weight[j] : minus_infinity();
      float maximum = fmaxf(v[0], v[1]);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, o));
      float shift = shift_of(maximum), sum = expf(v[0] - shift) + expf(v[1] - shift);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
      if (sampled) {
        weight = (in[0] ? mine.weight[0] : 0.f) + (in[1] ? mine.weight[1] : 0.f);
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) weight += __shfl_xor_sync(kAllLanes, weight, o);
      }
      if (hardest_negative) {
#pragma unroll
        for (int j = 0; j < 2; ++j) hardest = in[j] ? larger(hardest, s[n][2 * j + c]) : hardest;
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) hardest = larger(hardest, __shfl_xor_sync(kAllLanes, hardest, o));
      }
      if (lane < 4) parts[n * 8 + lane * 2 + c] = {maximum, sum, weight, hardest};  // rows, a multiple of 8, has room
    }
  }
}

// Load a tile -> S in registers -> reduce over pixels -> the block's sums, which are written once at the end.
template <class T, int kTiles, bool kRows>
__global__ void __launch_bounds__(256, kTiles <= 8 ? 2 : 1)
    fast_statistics_kernel(const __grid_constant__ FastStatistics job) {
  constexpr int kChunkBytes = kForwardChunkBytes<kTiles>;
  DYNAMIC_SHARED(memory);
  const FastArguments& a = job.common;
  T* tile = reinterpret_cast<T*>(memory);
  char* ring = memory + a.plan.tile_bytes;
  WarpPart* parts = reinterpret_cast<WarpPart*>(memory + a.plan.scratch_offset);
  PixelArrays arrays = pixel_arrays(memory + a.plan.arrays_offset, a.plan.tile_pixels);
  Diagnostics& diagnostics = *reinterpret_cast<Diagnostics*>(arrays.excess + a.plan.tile_pixels);
  float* sums = reinterpret_cast<float*>(&diagnostics + 1);  // (kPartialRows, K)
  int t = threadIdx.x, warp = t >> 5, warps = blockDim.x >> 5, num_classes = static_cast<int>(a.pixels.num_classes);
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x)
    sums[i] = i / num_classes == kMaximum || i / num_classes == kHardest ? minus_infinity() : 0.f;
  if (t == 0) clear(diagnostics);
  for (int64_t n = blockIdx.x; n < a.plan.tiles; n += gridDim.x) {
    TilePlace place = place_of(a, n);
    SYNC_THREADS(34);  // the last tile is done with
    read_pixels(a, place, arrays, &diagnostics);
    float s[kTiles][4], inverse[2];
    bool with_prototypes = !a.plan.resident || n == blockIdx.x;
    similarities<T, kTiles, kChunkBytes, kRows>(a, place, tile, ring, with_prototypes, s, inverse);
    MyPixels<kTiles> mine = my_pixels<kTiles>(a, place, arrays);
    float own[2], all_classes[2] = {0.f, 0.f};
    own_similarity(mine, s, own);
    if (a.pixel_anchor) pixel_log_z(num_classes, s, all_classes);
    SYNC_THREADS(35);  // nobody reads prototypes any more
    reduce_over_pixels(job, mine, s, parts + warp * a.plan.rows);
    if ((t & 3) == 0)
      for (int j = 0; j < 2; ++j) {
        arrays.positive[mine.place[j]] = own[j];
        arrays.weighted[mine.place[j]] = mine.weight[j] * own[j];
        arrays.excess[mine.place[j]] = a.pixel_anchor ? mine.weight[j] * (all_classes[j] - own[j]) : 0.f;
      }
    SYNC_THREADS(36);
    for (int k = t; k < num_classes; k += blockDim.x) {
      LogSum<float> sum = {sums[kMaximum * num_classes + k], sums[kExpSum * num_classes + k]};
      float weight = sums[kNegativeWeight * num_classes + k], hardest = sums[kHardest * num_classes + k];
      for (int w = 0; w < warps; ++w) {
        WarpPart part = parts[w * a.plan.rows + k];
        sum = merge(sum, LogSum<float>{part.maximum, part.sum});
        weight += part.weight;
        hardest = larger(hardest, part.hardest);
      }
      sums[kMaximum * num_classes + k] = sum.maximum, sums[kExpSum * num_classes + k] = sum.sum;
      sums[kNegativeWeight * num_classes + k] = weight, sums[kHardest * num_classes + k] = hardest;
    }
    if (t < place.pixels)
      static_cast<float*>(job.positive)[place.image * a.features.pixels + place.first + t] = arrays.positive[t];
    add_by_class<3, float>(
        a.plan.tile_pixels, arrays.label, {arrays.weight, arrays.weighted, arrays.excess},
        {sums + kWeight * num_classes, sums + kPositiveSum * num_classes, sums + kPixelLossSum * num_classes});
  }
  SYNC_THREADS(37);
  if (t == 0) static_cast<Diagnostics*>(job.diagnostics)[blockIdx.x] = diagnostics;
  float* partial = static_cast<float*>(job.partial) + static_cast<int64_t>(blockIdx.x) * kPartialRows * num_classes;
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x) {
    float v = sums[i];
    if (!a.sampling.thresholds &&
        i / num_classes == kNegativeWeight)  // every pixel of another class; no difference of sums
      for (int k = 0; k < num_classes; ++k) v += k == i % num_classes ? 0.f : sums[kWeight * num_classes + k];
    partial[i] = v;
  }
}

template <class T, int kTiles>
cudaError_t fast_statistics_of(const FastStatistics& job, cudaStream_t stream) {
  const FastPlan& plan = job.common.plan;
  auto kernel = plan.pixels_first ? fast_statistics_kernel<T, kTiles, true> : fast_statistics_kernel<T, kTiles, false>;
  return launch<FastStatistics>(kernel, plan.blocks, 2 * plan.tile_pixels, plan.shared_bytes, stream, job);
}
template <class T>
cudaError_t fast_statistics_as(const FastStatistics& job, cudaStream_t stream) {
  if (job.common.plan.classes == 24) return fast_statistics_of<T, 3>(job, stream);
  if (job.common.plan.classes == 64) return fast_statistics_of<T, 8>(job, stream);
  return fast_statistics_of<T, 32>(job, stream);
}

}  // namespace proac::cuda
