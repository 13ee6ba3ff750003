// Stage (i) on the fast path, (1), (3) and (5).
#pragma once
#include "fast_similarities.cuh"

namespace proac::cuda {

// What a warp finds for one class over its pixels. Aligned, so that it is one access to shared memory.
struct alignas(16) WarpPart {
  float maximum, sum, weight, hardest;
};

// Marks the pixels outside V.
template <class T, int kEights>
__device__ __forceinline__ void exclude_ignored(const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                Accumulators<T, kEights>& s) {
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      bool outside = mine.label[f][j] < 0;
      if (!__any_sync(kAllLanes, outside)) continue;
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (outside) s[f][n][2 * j + c] = kExcluded;
    }
}

// Marks what was not drawn.
template <class T, int kEights>
__device__ __forceinline__ void exclude_undrawn(const FastArguments& a, int tile_number,
                                                const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                Accumulators<T, kEights>& s) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
#pragma unroll
  for (int first = 0; first < kEights; first += 16) {
    Drawn<kFragments> drawn(a, tile_number, mine, first);
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

// Combines 8 values of each thread over the 8 threads that differ in g; thread g has the result of value g. Each exchange halves
// what is left.
template <class Combine>
__device__ __forceinline__ float over_g(float (&v)[8], Combine combine) {
#pragma unroll
  for (int half = 4; half; half >>= 1) {
    bool upper = threadIdx.x >> 2 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = combine(keep, __shfl_xor_sync(kAllLanes, send, 4 * half));
    }
  }
  return v[0];
}
__device__ __forceinline__ float add(float a, float b) { return a + b; }

// The sums of (3) over the warp's pixels, 4 eights of classes at a time: value 2 n + c of a thread is of class 8 n + 2 q + c. Relative
// to one maximum where that fits all: |S| <= 1/tau, and no weight is extreme.
template <class T, int kEights>
__device__ __forceinline__ void reduce_over_pixels(const FastStatistics& job, bool one_maximum, float to_log2,
                                                   const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                   const Accumulators<T, kEights>& s, WarpPart* parts) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  Lane my;
  int num_classes = static_cast<int>(job.common.pixels.num_classes);
  // v[i] = the combination of term(cosine, f, j) over the thread's pixels
  auto each = [&](int first, float (&v)[8], float none, auto term, auto combine) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = none;
      int n = first + i / 2;
      if (n < kEights) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int j = 0; j < 2; ++j) v[i] = combine(v[i], term(s[f][n < kEights ? n : 0][2 * j + i % 2], i, f, j));
      }
    }
  };
#pragma unroll
  for (int first = 0; first < kEights; first += 4) {
    if (first * 8 >= num_classes) break;
    float v[8], shift[8], weight = 0.f, hardest = minus_infinity(), maximum = to_log2;
    if (!one_maximum) {
      each(
          first, v, minus_infinity(),
          [&](float cosine, int, int f, int j) {
            return cosine <= kExcluded ? minus_infinity() : fmaf(cosine, to_log2, mine.log_weight[f][j]);
          },
          fmaxf);
      maximum = over_g(v, fmaxf);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      shift[i] = one_maximum ? to_log2 : shift_of(__shfl_sync(kAllLanes, maximum, 4 * i + my.q));
    each(
        first, v, 0.f,
        [&](float cosine, int i, int f, int j) {
          return exp2_approx(fmaf(cosine, to_log2, mine.log_weight[f][j]) - shift[i]);
        },
        add);
    float sum = over_g(v, add);
    if (job.common.sampling.thresholds) {
      each(
          first, v, 0.f, [&](float cosine, int, int f, int j) { return cosine <= kExcluded ? 0.f : mine.weight[f][j]; },
          add);
      weight = over_g(v, add);
    }
    if (job.hardest_negative) {
      each(
          first, v, minus_infinity(),
          [&](float cosine, int, int, int) { return cosine <= kExcluded ? minus_infinity() : cosine; }, larger<float>);
      hardest = over_g(v, larger<float>) * static_cast<float>(1 / job.common.temperature);
    }
    int k = (first + my.g / 2) * 8 + my.q * 2 + my.g % 2;
    if (k < num_classes) parts[k] = {maximum * static_cast<float>(1 / kLog2E), sum, weight, hardest};
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

// Load a tile -> S in registers -> reduce over pixels -> the block's sums, which are written once at the end, and merged by the
// last block.
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
  bool warm = 2 / a.temperature <= 60;
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x)
    sums[i] = i < (kMaximum + 1) * num_classes || i >= kHardest * num_classes ? minus_infinity() : 0.f;
  if (t == 0) diagnostics = {};
  for (int n = blockIdx.x; n < a.plan.tiles; n += gridDim.x) {
    TilePlace place = place_of(a, n);
    SYNC_THREADS(tile_is_free);
    read_pixels(a, place, arrays, &diagnostics);
    float s[kFragments][kEights][4], inverse[kFragments][2], own[kFragments][2], all_classes[kFragments][2] = {};
    bool with_prototypes = !a.plan.resident || n == static_cast<int>(blockIdx.x);
    similarities<T, kEights, kRows>(a, place, tile, shared_address(memory + a.plan.tile_bytes), with_prototypes, s,
                                    inverse);
    MyPixels<kFragments> mine(arrays);
    if (a.pixel_anchor) pixel_log_z<T, kEights>(to_log2, s, all_classes);
    exclude_ignored<T, kEights>(mine, s);
    own_cosines<T, kEights, true>(mine, s, own);
    if (a.sampling.thresholds) exclude_undrawn<T, kEights>(a, n, mine, s);
    SYNC_THREADS(ring_is_free);
    reduce_over_pixels<T, kEights>(job, warm && weights_are_ordinary(mine), to_log2, mine, s,
                                   parts + warp * a.plan.rows);
    if ((t & 3) == 0) {
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          int p = mine.place(f, j);
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
  float* partial =
      static_cast<float*>(job.merge.partial) + static_cast<int64_t>(blockIdx.x) * kPartialRows * num_classes;
  for (int i = t; i < kPartialRows * num_classes; i += blockDim.x) partial[i] = sums[i];
  merge_statistics<float>(job.merge, a.pixels, !a.sampling.thresholds, diagnostics, arrays.label);
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
