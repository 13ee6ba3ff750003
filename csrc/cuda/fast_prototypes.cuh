// Stage (iii) on the fast path, for prototypes that require a gradient: sum_i dL/dS_ki / tau xhat_i over the pixels of a tile.
//
// (channels x pixels) (pixels x classes) on the tensor cores, in TF32: it has the range of float32, which coefficients divided by
// the norms of pixels need, and 16-bit features are exact in it. The coefficients are split in two parts, float32 features
// too. They pass through shared memory, 16 or 24 classes at a time, since a warp takes 16 channels of all the tile's pixels.
// The order of pixels within a product is free: column q of operand A is pixel 2 q, column q + 4 pixel 2 q + 1.
#pragma once
#include "fast_similarities.cuh"

namespace proac::cuda {

// Classes that pass through shared memory together, and floats from a pixel to the next one there: few beside an S of many.
constexpr int class_group(int classes) { return classes < 32 ? classes : 16; }
constexpr int class_group_pitch(int classes) { return class_group(classes) + 4; }

template <int kEights>
struct ClassGroup {
  static constexpr int kSize = class_group(8 * kEights) / 8;  // in eights
  static constexpr int kPitch = class_group_pitch(8 * kEights);
};

// 16 channels x 8 pixels of the tile as operand A: x[h + 2 u] is the channel below for h, of pixel 2 q + u.
template <bool kRows>
__device__ __forceinline__ int channel_of(int h) {
  int g = (threadIdx.x & 31) >> 2;
  return kRows ? 2 * g + h : g + 8 * h;
}
template <class T, bool kRows>
__device__ __forceinline__ void load_channels(float (&x)[4], const T* tile, const TileLayout<T, kRows>& layout,
                                              int pixel, int channel) {
  Lane my;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const T* p = tile + (kRows ? layout(pixel + 2 * my.q + i, channel + 2 * my.g)
                               : layout(pixel + 2 * my.q, channel + my.g + 8 * i));
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
template <class T, int kEights>
__device__ __forceinline__ void store_coefficients(const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                   const Accumulators<T, kEights>& s,
                                                   const float (&inverse)[Shape<T, kEights>::kFragments][2], int group,
                                                   float* out) {
  using Group = ClassGroup<kEights>;
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      bool ignored = mine.label[f][j] < 0;
      int bits = __float_as_int(inverse[f][j] * kLift);
      asm volatile(""
                   : "+r"(bits));  // or all products would be made before the loop over groups, and take its registers
      float factor = __int_as_float(bits);
      float* row = out + mine.place(f, j) * Group::kPitch + (threadIdx.x & 3);
#pragma unroll
      for (int n = 0; n < kEights; ++n)
        if (n / Group::kSize == group)
          for (int c = 0; c < 2; ++c) row[n % Group::kSize * 8 + 4 * c] = ignored ? 0.f : s[f][n][2 * j + c] * factor;
    }
}

// Nothing of a pixel outside V may reach the product: 0 times NaN is NaN. Its gradient is 0 whatever stands here.
template <class T, bool kRows>
__device__ __forceinline__ void clear_ignored(const FastPlan& plan, const PixelArrays& arrays, T* tile, int pixels) {
  TileLayout<T, kRows> layout = tile_layout<T, kRows>(plan);
  int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * pixels;
  for (int pixel = first; pixel < first + pixels; ++pixel)
    if (arrays.label[pixel] < 0)
      for (int d = lane; d < plan.channels; d += 32) tile[layout(pixel, d)] = narrow<T>(0.f);
}

// `s` holds dL/dS / tau, `scratch` has room for a group of classes. The caller puts a barrier behind.
template <class T, int kEights, bool kRows>
__device__ __forceinline__ void add_prototype_gradient(const FastGradients& job,
                                                       const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                                       const PixelArrays& arrays, const Accumulators<T, kEights>& s,
                                                       const float (&inverse)[Shape<T, kEights>::kFragments][2],
                                                       T* tile, float* scratch) {
  using Group = ClassGroup<kEights>;
  constexpr int kTogether = 32;  // pixels that the tensor cores sum: they truncate
  const FastPlan& plan = job.common.plan;
  TileLayout<T, kRows> layout = tile_layout<T, kRows>(plan);
  int num_classes = static_cast<int>(job.common.pixels.num_classes), eights = (num_classes + 7) / 8;
  int channels = static_cast<int>(job.common.features.channels), warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  Lane my;
  const float* scales = static_cast<const float*>(job.factors) + kSumScale * num_classes;
#pragma unroll 1
  for (int group = 0; group * Group::kSize < eights; ++group) {
    SYNC_THREADS(scratch_is_free);
    if (group == 0) clear_ignored<T, kRows>(plan, arrays, tile, Shape<T, kEights>::kWarpPixels);
    store_coefficients<T, kEights>(mine, s, inverse, group, scratch);
    SYNC_THREADS(coefficients_are_written);
    int eights_left = eights - group * Group::kSize;
#pragma unroll 1
    for (int channel = warp * 16; channel < plan.channels; channel += warps * 16) {
      float sum[Group::kSize][4] = {};
#pragma unroll 1
      for (int first = 0; first < plan.tile_pixels; first += kTogether) {
        float part[Group::kSize][4] = {};
#pragma unroll 1
        for (int pixel = first; pixel < first + kTogether && pixel < plan.tile_pixels; pixel += 8) {
          float x[4];
          uint32_t high[4], low[4];
          load_channels<T, kRows>(x, tile, layout, pixel, channel);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            high[i] = __float_as_uint(x[i]);
            if constexpr (sizeof(T) == 4) split_tf32(high[i], high[i], low[i]);
          }
          const float* b = scratch + (pixel + 2 * my.q) * Group::kPitch + my.g;
#pragma unroll
          for (int n = 0; n < Group::kSize; ++n) {
            if (n >= eights_left) break;
            uint32_t b0, b1, c0, c1;
            split_tf32(__float_as_uint(b[n * 8]), b0, c0);
            split_tf32(__float_as_uint(b[n * 8 + Group::kPitch]), b1, c1);
            if constexpr (sizeof(T) == 4) mma(0.f, part[n], low, b0, b1);
            mma(0.f, part[n], high, c0, c1);
            mma(0.f, part[n], high, b0, b1);
          }
        }
#pragma unroll
        for (int n = 0; n < Group::kSize; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[n][e] += part[n][e];
      }
      int k = group * Group::kSize * 8 + my.q % 2 * 4 + my.q / 2, d = channel + channel_of<kRows>(0);
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
