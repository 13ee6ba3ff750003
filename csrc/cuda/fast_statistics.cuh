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

// Combines 2 or 8 values of each thread over the 8 threads that differ in g. Each exchange halves what is left, until a thread has
// one: that of value g, or g / 4.
template <int kValues, class Combine>
__device__ __forceinline__ float over_g(float (&v)[kValues], Combine combine) {
#pragma unroll
  for (int lanes = 16, half = kValues / 2; lanes >= 4; lanes >>= 1, half >>= 1) {
    bool upper = threadIdx.x & lanes;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      float send = upper ? v[i] : v[i + half], keep = upper ? v[i + half] : v[i];
      v[i] = combine(keep, __shfl_xor_sync(kAllLanes, send, lanes));
    }
    if (half == 0) v[0] = combine(v[0], __shfl_xor_sync(kAllLanes, v[0], lanes));
  }
  return v[0];
}
__device__ __forceinline__ float add(float a, float b) { return a + b; }

// The sums of (3) over the warp's pixels where every one of them is taken and no weight is extreme, so that one maximum fits all:
// |S| <= 1/tau. 4 eights of classes at a time: value 2 n + c of a thread is of class 8 n + 2 q + c.
template <class T, int kEights>
__device__ __forceinline__ void sum_over_pixels(int num_classes, float to_log2,
                                                const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                const Accumulators<T, kEights>& s, WarpPart* parts) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  Lane my;
  float shifted[kFragments][2];  // so that an exponent is one multiply-add
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) shifted[f][j] = mine.log_weight[f][j] - to_log2;
#pragma unroll
  for (int first = 0; first < kEights; first += 4) {
    if (first * 8 >= num_classes) break;
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 0.f;
      int n = first + i / 2;
      if (n < kEights) {
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            v[i] += exp2_approx(fmaf(s[f][n < kEights ? n : 0][2 * j + i % 2], to_log2, shifted[f][j]));
      }
    }
    float sum = over_g(v, add);
    int k = (first + my.g / 2) * 8 + my.q * 2 + my.g % 2;
    if (k < num_classes) parts[k] = {to_log2 * static_cast<float>(1 / kLog2E), sum, 0.f, minus_infinity()};
  }
}

// The same for any weights, with what sampled sets and the hardest negatives ask for. An eight of classes at a time, by a loop that is
// not unrolled: of all this code in as many copies as there are eights, most of the time to compile the kernel would go.
template <class T, int kEights>
__device__ __forceinline__ void reduce_over_pixels(const FastStatistics& job, int tile_number, bool one_maximum,
                                                   float to_log2, const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                   const Accumulators<T, kEights>& s, WarpPart* parts) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  const FastArguments& a = job.common;
  Lane my;
  int num_classes = static_cast<int>(a.pixels.num_classes);
  TilePlace place = place_of(a, anew(tile_number));
  int64_t first_index = 0;
  uint32_t key[kFragments][2] = {};
  if (a.sampling.thresholds) {
    first_index = place.image * a.features.pixels + place.first + a.sampling.rng[1];
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) key[f][j] = philox_key(a.sampling.rng[0], first_index + mine.place(f, j));
  }
#pragma unroll 1
  for (int n = 0; n * 8 < num_classes; ++n) {
    float cosine[kFragments][4];
#pragma unroll
    for (int m = 0; m < kEights; ++m)  // registers have no index
      if (m == n) {
        asm volatile("");  // a branch, or the eights would be chosen from one by one
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
#pragma unroll
          for (int e = 0; e < 4; ++e) cosine[f][e] = s[f][m][e];
      }
    float maxima[2], sums[2], weights[2], largest[2];  // of classes 8 n + 2 q and the next
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      maxima[c] = largest[c] = minus_infinity(), sums[c] = weights[c] = 0.f;
      int k = n * 8 + my.q * 2 + c;
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& value = cosine[f][2 * j + c];
          if (a.sampling.thresholds && k < num_classes &&
              !is_drawn(a.sampling, k, key[f][j], first_index + mine.place(f, j)))
            value = kExcluded;
          if (value <= kExcluded) continue;
          maxima[c] = fmaxf(maxima[c], fmaf(value, to_log2, mine.log_weight[f][j]));
          weights[c] += mine.weight[f][j];
          largest[c] = larger(largest[c], value);
        }
    }
    float maximum = to_log2, shift[2] = {to_log2, to_log2};
    if (!one_maximum) {
      maximum = over_g(maxima, [](float x, float y) { return fmaxf(x, y); });
#pragma unroll
      for (int c = 0; c < 2; ++c) shift[c] = shift_of(__shfl_sync(kAllLanes, maximum, 16 * c + my.q));
    }
#pragma unroll
    for (int c = 0; c < 2; ++c)
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          sums[c] += exp2_approx(fmaf(cosine[f][2 * j + c], to_log2, mine.log_weight[f][j]) - shift[c]);
    float sum = over_g(sums, add), weight = 0.f, hardest = minus_infinity();
    if (a.sampling.thresholds) weight = over_g(weights, add);
    if (job.hardest_negative) hardest = over_g(largest, larger<float>) * static_cast<float>(1 / a.temperature);
    int k = n * 8 + my.q * 2 + my.g / 4;
    if (my.g % 4 == 0 && k < num_classes) parts[k] = {maximum * static_cast<float>(1 / kLog2E), sum, weight, hardest};
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
    SYNC_THREADS(ring_is_free);
    bool one_maximum = warm && weights_are_ordinary(mine);
    if (one_maximum && !a.sampling.thresholds && !job.hardest_negative)
      sum_over_pixels<T, kEights>(num_classes, to_log2, mine, s, parts + warp * a.plan.rows);
    else
      reduce_over_pixels<T, kEights>(job, n, one_maximum, to_log2, mine, s, parts + warp * a.plan.rows);
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
