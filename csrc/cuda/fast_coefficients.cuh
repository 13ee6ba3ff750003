// The coefficients dL/dS / tau of a warp's pixels, (8) to (10), in the registers of S, and their two parts for the tensor cores.
#pragma once
#include "fast_similarities.cuh"

namespace proac::cuda {

// What (9) asks of a class: A_k T_k / tau and log2 Z_k; zeros where N_k is empty.
struct alignas(8) ClassFactors {
  float negative, log_z;
};
__device__ __forceinline__ void read_class_factors(const FastGradients& job, ClassFactors* out) {
  const float* factors = static_cast<const float*>(job.factors);
  int num_classes = static_cast<int>(job.common.pixels.num_classes);
  for (int k = threadIdx.x; k < job.common.plan.rows; k += blockDim.x) {
    float log_z = k < num_classes ? factors[kFactorLogZ * num_classes + k] : minus_infinity();
    bool empty = log_z == minus_infinity();
    out[k].negative = empty ? 0.f : factors[kNegativeFactor * num_classes + k];
    out[k].log_z = empty ? 0.f : log_z * static_cast<float>(kLog2E);
  }
}

// Which of the thread's pixels are drawn for which of 16 eights of classes: bit 2 n + c stands for class 8 n + 2 q + c of them.
// Loops over registers must be unrolled, and a bit is all that a test asks there. All ones where every pixel is taken.
template <int kFragments>
struct Drawn {
  uint32_t bits[kFragments][2];
  __device__ __forceinline__ Drawn(const FastArguments& a, int tile, const MyPixels<kFragments>& mine,
                                   int first_eight) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bits[f][j] = ~0u;
        if (!a.sampling.thresholds) continue;
        TilePlace place = place_of(a, anew(tile));
        int64_t index = place.image * a.features.pixels + place.first + mine.place(f, j) + a.sampling.rng[1];
        uint32_t key = philox_key(a.sampling.rng[0], index);
        int k = first_eight * 8 + static_cast<int>(threadIdx.x & 3) * 2;
        bits[f][j] = 0;
#pragma unroll 1
        for (int bit = 0; bit < 32 && k < a.pixels.num_classes; ++bit, k += bit & 1 ? 1 : 7)
          if (is_drawn(a.sampling, k, key, index)) bits[f][j] |= 1u << bit;
      }
  }
  __device__ __forceinline__ bool of(int f, int j, int n, int c) const { return bits[f][j] >> (n % 16 * 2 + c) & 1u; }
};

// log2 of each pixel's sum over all classes, (5), and the others' share of it: minus softmax - 1 of the own class in (10), of which
// nothing is left once features are trained, where it is taken as that difference.
template <class T, int kEights>
__device__ __forceinline__ void normalise_pixels(int num_classes, float to_log2, const Accumulators<T, kEights>& s,
                                                 const int (&own_class)[Shape<T, kEights>::kFragments][2],
                                                 const float (&own)[Shape<T, kEights>::kFragments][2],
                                                 float (&all_classes)[Shape<T, kEights>::kFragments][2],
                                                 float (&others)[Shape<T, kEights>::kFragments][2]) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  largest_logits<T, kEights>(to_log2, s, all_classes);
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    if (n * 8 >= num_classes) break;  // also keeps the next eights' exponentials out of these registers
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float term = exp2_approx(fmaf(s[f][n][e], to_log2, -all_classes[f][e >> 1]));
        others[f][e >> 1] += own_class[f][e >> 1] == n * 8 + (e & 1) ? 0.f : term;
      }
  }
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) others[f][j] += __shfl_xor_sync(kAllLanes, others[f][j], o);
      float sum = others[f][j] + exp2_approx(fmaf(own[f][j], to_log2, -all_classes[f][j]));
      all_classes[f][j] += log2f(sum), others[f][j] /= sum;
    }
}

// S becomes the coefficients dL/dS / tau, (8) to (10), in place. Returns <g_i, xhat_i> of each pixel in `along`.
template <class T, int kEights>
__device__ __forceinline__ void coefficients(const FastGradients& job, int tile_number,
                                             const MyPixels<Shape<T, kEights>::kFragments>& mine, SharedAddress classes,
                                             Accumulators<T, kEights>& s,
                                             float (&along)[Shape<T, kEights>::kFragments][2]) {
  constexpr int kFragments = Shape<T, kEights>::kFragments;
  const FastArguments& a = job.common;
  bool pixel_anchor = a.pixel_anchor;
  int num_classes = static_cast<int>(a.pixels.num_classes), own_class[kFragments][2];
  SharedAddress class_factors = classes + (threadIdx.x & 3) * 2 * sizeof(ClassFactors);
  float inverse_tau = static_cast<float>(1.0 / a.temperature), to_log2 = static_cast<float>(kLog2E / a.temperature);
  const float* factors = static_cast<const float*>(job.factors);
  float own[kFragments][2], own_coefficient[kFragments][2] = {}, all_classes[kFragments][2] = {},
                            pixel_factor[kFragments][2] = {};
  own_cosines<T, kEights, false>(mine, s, own);
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) own_class[f][j] = mine.label[f][j] - 2 * static_cast<int>(threadIdx.x & 3);
  if (pixel_anchor) normalise_pixels<T, kEights>(num_classes, to_log2, s, own_class, own, all_classes, own_coefficient);
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      along[f][j] = 0.f;
      if (mine.label[f][j] < 0) continue;
      const float* factor = factors + mine.label[f][j];
      if (pixel_anchor) pixel_factor[f][j] = factors[kPixelFactor * num_classes] * mine.weight[f][j];
      own_coefficient[f][j] = -pixel_factor[f][j] * own_coefficient[f][j] -
                              factor[kPositiveFactor * num_classes] * mine.weight[f][j] *
                                  sigmoid(factor[kContrast * num_classes] - own[f][j] * inverse_tau);
    }
#pragma unroll
  for (int first = 0; first < kEights; first += 16) {
    if (first * 8 >= num_classes) break;
    Drawn<kFragments> drawn(a, tile_number, mine, first);
#pragma unroll
    for (int n = first; n < first + 16 && n < kEights; ++n) {
      if (n * 8 >= num_classes) break;
      float4 two = load_shared<float4>(class_factors, n * 8 * static_cast<int>(sizeof(ClassFactors)));
#pragma unroll
      for (int f = 0; f < kFragments; ++f)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          int j = e >> 1, c = e & 1;
          float value = s[f][n][e];
          float g =
              (c ? two.z : two.x) * exp2_approx(fmaf(value, to_log2, mine.log_weight[f][j]) - (c ? two.w : two.y));
          if (!drawn.of(f, j, n, c)) g = 0.f;
          if (pixel_anchor) g += pixel_factor[f][j] * exp2_approx(fmaf(value, to_log2, -all_classes[f][j]));
          if (own_class[f][j] == n * 8 + c) g = own_coefficient[f][j];
          along[f][j] = fmaf(g, value, along[f][j]);
          s[f][n][e] = g;
        }
    }
  }
#pragma unroll
  for (int f = 0; f < kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) along[f][j] += __shfl_xor_sync(kAllLanes, along[f][j], o);
}

// The coefficients as operand A, in the place of S. 16 bits: s[f][n] = (high, low of pixel g, high, low of pixel g + 8), two
// classes to a word. float32: high parts there and low parts beside them, or, where registers have no room, split at each use.
template <class T, int kEights>
struct LowParts {
  static constexpr bool kHeld = sizeof(T) == 4 && kEights <= 22;
  float value[kHeld ? kEights : 1][4];
};

// Scales each pixel's coefficients by a power of two so that the largest lies in [1, 2), which keeps float16 above its
// subnormals, and splits them. Returns what undoes the scale.
template <class T, int kEights>
__device__ __forceinline__ void scale_and_split(Accumulators<T, kEights>& s, LowParts<T, kEights>& low,
                                                float (&undo)[Shape<T, kEights>::kFragments][2], int eights) {
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f) {
    float largest[2] = {0.f, 0.f}, scale[2];
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      if (n >= eights) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) largest[e >> 1] = fmaxf(largest[e >> 1], fabsf(s[f][n][e]));
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) largest[j] = fmaxf(largest[j], __shfl_xor_sync(kAllLanes, largest[j], o));
      int exponent = __float_as_int(largest[j]) >> 23;
      exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
      scale[j] = __int_as_float((254 - exponent) << 23), undo[f][j] = __int_as_float(exponent << 23);
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      if (n >= eights) break;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float x = s[f][n][2 * j] * scale[j], y = s[f][n][2 * j + 1] * scale[j];
        if constexpr (sizeof(T) == 2) {
          uint32_t high = Split<T>::pack(x, y);
          float2 back = Split<T>::unpack(high);
          y = __uint_as_float(Split<T>::pack(x - back.x, y - back.y));
          x = __uint_as_float(high);
        } else if constexpr (LowParts<T, kEights>::kHeld) {
          uint32_t high, rest;
          split_tf32(__float_as_uint(x), high, rest);
          x = __uint_as_float(high), low.value[n][2 * j] = __uint_as_float(rest);
          split_tf32(__float_as_uint(y), high, rest);
          y = __uint_as_float(high), low.value[n][2 * j + 1] = __uint_as_float(rest);
        }
        s[f][n][2 * j] = x, s[f][n][2 * j + 1] = y;
      }
    }
  }
}

}  // namespace proac::cuda
