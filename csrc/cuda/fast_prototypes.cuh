// Stage (iii) on the fast path, for prototypes that require a gradient: sum_i dL/dS_ki / tau xhat_i over the pixels of a tile.
//
// (channels x pixels) (pixels x classes) on the tensor cores, in TF32: it has the range of float32, which coefficients divided by
// the norms of pixels need, and 16-bit features are exact in it. The coefficients are split in two parts, float32 features
// too. They pass through shared memory, up to 32 classes at a time, since a warp takes 16 channels of all the tile's pixels.
// The order of pixels within a product is free: column q of operand A is pixel 2 q, column q + 4 pixel 2 q + 1.
#pragma once
#include "fast_tile.cuh"

namespace proac::cuda {

template <int kTiles>
struct ClassGroup {
  static constexpr int kSize = kTiles < 4 ? kTiles : 4;  // in eights of classes
  static constexpr int kPitch = class_group_pitch(8 * kTiles);
};

// 16 channels x 8 pixels of the tile as operand A: x[h + 2 u] is the channel below for h, of pixel 2 q + u.
template <bool kRows>
__device__ __forceinline__ int channel_of(int h) {
  int g = (threadIdx.x & 31) >> 2;
  return kRows ? 2 * g + h : g + 8 * h;
}
template <class T, bool kRows>
__device__ __forceinline__ void load_channels(float (&x)[4], const T* tile, int pitch, int pixel, int channel) {
  int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T* p = kRows ? tile + (pixel + 2 * q + i) * pitch + channel + 2 * g
                       : tile + (channel + g + 8 * i) * pitch + pixel + 2 * q;
    float2 pair;
    if constexpr (sizeof(T) == 4)
      pair = *reinterpret_cast<const float2*>(p);
    else
      pair = Split<T>::unpack(*reinterpret_cast<const uint32_t*>(p));
    x[kRows ? 2 * i : i] = pair.x, x[kRows ? 2 * i + 1 : i + 2] = pair.y;
  }
}

// The warp's coefficients of a group of classes, over |x_i|, to [pixel][kPitch]. Class 8 n + 2 q + c stands in column 8 n + q +
// 4 c, which keeps the stores free of bank conflicts.
constexpr float kLift = 0x1p20f;  // keeps coefficients over the largest norms above float32's subnormals
template <int kTiles>
__device__ __forceinline__ void store_coefficients(const MyPixels<kTiles>& mine, const float (&s)[kTiles][4],
                                                   const float (&inverse)[2], int group, float* out) {
  using Group = ClassGroup<kTiles>;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float factor = mine.label[j] < 0 ? 0.f : inverse[j] * kLift;
    float* row = out + mine.place[j] * Group::kPitch + (threadIdx.x & 3);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      if (n / Group::kSize == group)
        for (int c = 0; c < 2; ++c) row[n % Group::kSize * 8 + 4 * c] = s[n][2 * j + c] * factor;
  }
}

// Nothing of a pixel outside V may reach the product: 0 times NaN is NaN. Its gradient is 0 whatever stands here.
template <class T, bool kRows>
__device__ __forceinline__ void clear_ignored(const FastPlan& plan, const PixelArrays& arrays, T* tile) {
  int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * kWarpPixels;
  for (int pixel = first; pixel < first + kWarpPixels; ++pixel)
    if (arrays.label[pixel] < 0)
      for (int d = lane; d < plan.channels; d += 32) tile[at<kRows>(plan.tile_pitch, pixel, d)] = narrow<T>(0.f);
}

// `s` holds dL/dS / tau, `scratch` has room for a group of classes. The caller puts a barrier behind.
template <class T, int kTiles, bool kRows>
__device__ __forceinline__ void add_prototype_gradient(const FastGradients& job, const MyPixels<kTiles>& mine,
                                                       const PixelArrays& arrays, const float (&s)[kTiles][4],
                                                       const float (&inverse)[2], T* tile, float* scratch) {
  using Group = ClassGroup<kTiles>;
  const FastPlan& plan = job.common.plan;
  int num_classes = static_cast<int>(job.common.pixels.num_classes), tiles = (num_classes + 7) / 8;
  int channels = static_cast<int>(job.common.features.channels), warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  int g = (threadIdx.x & 31) >> 2, q = threadIdx.x & 3;
  const float* scales = static_cast<const float*>(job.factors) + kSumScale * num_classes;
#pragma unroll 1
  for (int group = 0; group * Group::kSize < tiles; ++group) {
    SYNC_THREADS(43);  // nobody reads the ring, or the last group, any more
    if (group == 0) clear_ignored<T, kRows>(plan, arrays, tile);
    store_coefficients(mine, s, inverse, group, scratch);
    SYNC_THREADS(44);
    int eights = tiles - group * Group::kSize;
#pragma unroll 1
    for (int channel = warp * 16; channel < plan.channels; channel += warps * 16) {
      float sum[Group::kSize][4] = {};
#pragma unroll 1
      for (int pixel = 0; pixel < plan.tile_pixels; pixel += 8) {
        float x[4];
        uint32_t high[4], low[4];
        load_channels<T, kRows>(x, tile, plan.tile_pitch, pixel, channel);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          high[i] = __float_as_uint(x[i]);
          if constexpr (sizeof(T) == 4) split_tf32(high[i], high[i], low[i]);
        }
        const float* b = scratch + (pixel + 2 * q) * Group::kPitch + g;
#pragma unroll
        for (int n = 0; n < Group::kSize; ++n) {
          if (n >= eights) break;
          uint32_t b0, b1, c0, c1;
          split_tf32(__float_as_uint(b[n * 8]), b0, c0);
          split_tf32(__float_as_uint(b[n * 8 + Group::kPitch]), b1, c1);
          if constexpr (sizeof(T) == 4) mma(0.f, sum[n], low, b0, b1);
          mma(0.f, sum[n], high, c0, c1);
          mma(0.f, sum[n], high, b0, b1);
        }
      }
      int k = group * Group::kSize * 8 + q % 2 * 4 + q / 2, d = channel + channel_of<kRows>(0);
      asm volatile(""
                   : "+r"(k), "+r"(d));  // or the addresses below would be made before the loop, and take its registers
#pragma unroll
      for (int n = 0; n < 2 * Group::kSize; ++n, k += n % 2 ? 2 : 6) {
        if (k >= num_classes) continue;
        float scale = scales[k] / kLift;
        if (d < channels) add_term(job.sums, channels, k, d, sum[n / 2][n % 2] * scale);
        constexpr int kNext = kRows ? 1 : 8;
        if (d + kNext < channels) add_term(job.sums, channels, k, d + kNext, sum[n / 2][2 + n % 2] * scale);
      }
    }
  }
}

}  // namespace proac::cuda
