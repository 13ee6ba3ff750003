// Stage (i) on the fast path, (1), (3) and (5).
#pragma once
#include "fast_similarities.cuh"

namespace proac::cuda {

// What a warp finds for one class over its pixels. Aligned, so that it is one access to shared memory.
struct alignas(16) WarpPart {
  float maximum, sum, weight, hardest;
};

// Marks own classes and pixels outside V.
template <class T, int kEights>
__device__ __forceinline__ void exclude_own(const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                            Accumulators<T, kEights>& s) {
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      int k = mine.label[f][j] - 2 * static_cast<int>(threadIdx.x & 3);
      bool outside = mine.label[f][j] < 0;
      if (__any_sync(kAllLanes, outside)) {
#pragma unroll
        for (int n = 0; n < kEights; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (outside) s[f][n][2 * j + c] = kExcluded;
      }
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (k == n * 8 + c) s[f][n][2 * j + c] = kExcluded;
    }
}

// Marks what was not drawn.
template <class T, int kEights>
__device__ __forceinline__ void exclude_undrawn(const FastArguments& a, const TilePlace& place,
                                                const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                Accumulators<T, kEights>& s) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
#pragma unroll
  for (int first = 0; first < kEights; first += 16) {
    Drawn<kFragments> drawn(a, place, mine, first);
#pragma unroll
    for (int n = first; n < first + 16 && n < kEights; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (!drawn.of(f, j, n, c)) s[f][n][2 * j + c] = kExcluded;
  }
}

// Sums 8 values of each thread over the 8 threads that differ in g; thread g has the sum of value g. Each exchange halves
// what is left.
__device__ __forceinline__ float sum_over_g(float (&v)[8]) {
#pragma unroll
  for (int half = 4; half; half >>= 1) {
    bool upper = threadIdx.x >> 2 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = keep + __shfl_xor_sync(kAllLanes, send, 4 * half);
    }
  }
  return v[0];
}

// The sums of (3) over the warp's pixels, where one maximum fits all: |S| <= 1/tau, and no weight is extreme.
template <class T, int kEights>
__device__ __forceinline__ void reduce_relative_to(float maximum, float to_log2, int num_classes,
                                                   const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                   const Accumulators<T, kEights>& s, WarpPart* parts) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  Lane my;
  float shift = maximum * static_cast<float>(kLog2E), offset[kFragments][2];
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) offset[f][j] = mine.log_weight[f][j] - shift;
#pragma unroll
  for (int first = 0; first < kEights; first += 4) {
    if (first * 8 >= num_classes) break;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 0.f;
      if (first + i / 2 < kEights) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            v[i] += exp2_approx(fmaf(s[f][first + i / 2 < kEights ? first + i / 2 : 0][2 * j + i % 2], to_log2,
                                     offset[f][j]));
      }
    }
    float sum = sum_over_g(v);
    int k = (first + my.g / 2) * 8 + my.q * 2 + my.g % 2;
    if (k < num_classes) parts[k] = {maximum, sum, 0.f, minus_infinity()};
  }
}

// The same for every temperature and weight, with a maximum for each class; and what only some calls ask for.
template <class T, int kEights>
__device__ __forceinline__ void reduce_each(const FastStatistics& job, float to_log2,
                                            const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                            const Accumulators<T, kEights>& s, WarpPart* parts) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  bool sampled = job.common.sampling.thresholds, hardest_negative = job.hardest_negative;
  Lane my;
  int num_classes = static_cast<int>(job.common.pixels.num_classes);
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    if (n * 8 >= num_classes) break;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float v[kFragments][2], maximum = minus_infinity(), sum = 0.f, weight = 0.f, hardest = minus_infinity();
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float cosine = s[f][n][2 * j + c];
          bool excluded = cosine <= kExcluded;
          v[f][j] = excluded ? minus_infinity() : fmaf(cosine, to_log2, mine.log_weight[f][j]);
          maximum = fmaxf(maximum, v[f][j]);
          if (!excluded) weight += mine.weight[f][j];
          if (!excluded && hardest_negative) hardest = larger(hardest, cosine);
        }
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, o));
      float shift = shift_of(maximum);
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) sum += exp2_approx(v[f][j] - shift);
#pragma unroll
      for (int o = 4; o < 32; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
      if (sampled) {
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) weight += __shfl_xor_sync(kAllLanes, weight, o);
      }
      if (hardest_negative) {
#pragma unroll
        for (int o = 4; o < 32; o <<= 1) hardest = larger(hardest, __shfl_xor_sync(kAllLanes, hardest, o));
      }
      int k = n * 8 + my.q * 2 + c;
      if (my.g == 0 && k < num_classes)
        parts[k] = {maximum * static_cast<float>(1 / kLog2E), sum, weight,
                    hardest * static_cast<float>(1 / job.common.temperature)};
    }
  }
}

// Whether all weights of the warp's pixels lie within e^20 and e^-20, or are 0.
template <int kFragments>
__device__ __forceinline__ bool weights_are_ordinary(const MyPixels<kFragments>& mine) {
  bool ordinary = true;
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      ordinary = ordinary && (mine.label[f][j] < 0 || fabsf(mine.log_weight[f][j]) < 20 * static_cast<float>(kLog2E));
  return __all_sync(kAllLanes, ordinary);
}

// Load a tile -> S in registers -> reduce over pixels -> the block's sums, which are written once at the end.
template <class T, int kEights, bool kRows>
__global__ void __launch_bounds__(Shape<T, kEights>::kMostThreads, Shape<T, kEights>::kBlocks)
    fast_statistics_kernel(const __grid_constant__ FastStatistics job) {
  using S = Shape<T, kEights>;
  constexpr int kFragments = S::kFragments;
  DYNAMIC_SHARED(memory);
  const FastArguments& a = job.common;
  T* tile = reinterpret_cast<T*>(memory);
  WarpPart* parts = reinterpret_cast<WarpPart*>(memory + a.plan.scratch_offset);
  PixelArrays arrays = pixel_arrays(memory + a.plan.arrays_offset, a.plan.tile_pixels);
  Diagnostics& diagnostics = *reinterpret_cast<Diagnostics*>(arrays.excess + a.plan.tile_pixels);
  float* sums = reinterpret_cast<float*>(&diagnostics + 1);  // (kPartialRows, K)
  int t = threadIdx.x, warp = t >> 5, warps = blockDim.x >> 5, num_classes = static_cast<int>(a.pixels.num_classes);
  float inverse_tau = static_cast<float>(1.0 / a.temperature), to_log2 = static_cast<float>(kLog2E / a.temperature);
  bool one_maximum = 2 / a.temperature <= 60 && !a.sampling.thresholds && !job.hardest_negative;
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x)
    sums[i] = i < (kMaximum + 1) * num_classes || i >= kHardest * num_classes ? minus_infinity() : 0.f;
  if (t == 0) clear(diagnostics);
  for (int64_t n = blockIdx.x; n < a.plan.tiles; n += gridDim.x) {
    TilePlace place = place_of(a, n);
    SYNC_THREADS(tile_is_free);
    read_pixels(a, place, arrays, &diagnostics);
    float s[kFragments][kEights][4], inverse[kFragments][2], own[kFragments][2], all_classes[kFragments][2] = {};
    bool with_prototypes = !a.plan.resident || n == blockIdx.x;
    similarities<T, kEights, kRows>(a, place, tile, shared_address(memory + a.plan.tile_bytes), with_prototypes, s,
                                    inverse);
    MyPixels<kFragments> mine(arrays);
    own_cosines<T, kEights>(mine, s, own);
    if (a.pixel_anchor) pixel_log_z<T, kEights>(to_log2, s, all_classes);
    exclude_own<T, kEights>(mine, s);
    if (a.sampling.thresholds) exclude_undrawn<T, kEights>(a, place, mine, s);
    SYNC_THREADS(ring_is_free);
    WarpPart* mine_parts = parts + warp * a.plan.rows;
    if (one_maximum && weights_are_ordinary(mine))
      reduce_relative_to<T, kEights>(inverse_tau, to_log2, num_classes, mine, s, mine_parts);
    else
      reduce_each<T, kEights>(job, to_log2, mine, s, mine_parts);
    if ((t & 3) == 0) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int p = mine.place[f][j];
          float positive = own[f][j] * inverse_tau;
          arrays.positive[p] = positive;
          arrays.weighted[p] = mine.weight[f][j] * positive;
          arrays.excess[p] = a.pixel_anchor
                                 ? mine.weight[f][j] * (all_classes[f][j] * static_cast<float>(1 / kLog2E) - positive)
                                 : 0.f;
        }
    }
    SYNC_THREADS(parts_are_written);
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
  SYNC_THREADS(block_is_done);
  if (t == 0) static_cast<Diagnostics*>(job.diagnostics)[blockIdx.x] = diagnostics;
  float* partial = static_cast<float*>(job.partial) + static_cast<int64_t>(blockIdx.x) * kPartialRows * num_classes;
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x) {
    float v = sums[i];
    if (!a.sampling.thresholds &&
        i / num_classes == kNegativeWeight) {  // every pixel of another class; no difference of sums
      v = 0.f;
      for (int k = 0; k < num_classes; ++k) v += k == i % num_classes ? 0.f : sums[kWeight * num_classes + k];
    }
    partial[i] = v;
  }
}

template <class T, int kEights>
cudaError_t fast_statistics_of(const FastStatistics& job, cudaStream_t stream) {
  const FastPlan& plan = job.common.plan;
  auto kernel =
      plan.pixels_first ? fast_statistics_kernel<T, kEights, true> : fast_statistics_kernel<T, kEights, false>;
  return launch<FastStatistics>(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, job);
}
template <class T>
cudaError_t fast_statistics_as(const FastStatistics& job, cudaStream_t stream) {
  return with_eights(job.common.plan.classes / 8,
                     [&](auto eights) { return fast_statistics_of<T, decltype(eights)::value>(job, stream); });
}

}  // namespace proac::cuda
