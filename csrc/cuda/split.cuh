// How float32 numbers become operands of the tensor cores: a high part and a low part of the features' type, whose sum is
// accurate to 2^-17 (bfloat16), 2^-22 (float16) or 2^-22 (TF32) of the number.
#pragma once
#include "math.cuh"

namespace proac::cuda {

template <class T>
struct Split;

template <>
struct Split<__nv_bfloat16> {
  static constexpr int kParts = 2;      // of the prototypes, in device memory
  static constexpr float kScale = 1.f;  // of the prototypes
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    __nv_bfloat162 v = __floats2bfloat162_rn(x, y);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t w) {
    return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
  }
};

template <>
struct Split<__half> {
  static constexpr int kParts = 2;
  static constexpr float kScale = 256.f;  // keeps the low parts of small components above float16's subnormals
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ uint32_t pack(float x, float y) {
    __half2 v = __floats2half2_rn(x, y);
    return *reinterpret_cast<uint32_t*>(&v);
  }
  static __device__ __forceinline__ float2 unpack(uint32_t w) {
    return __half22float2(*reinterpret_cast<__half2*>(&w));
  }
};

template <>
struct Split<float> {
  static constexpr int kParts = 1;  // split after loading: half the traffic
  static constexpr float kScale = 1.f;
  static __device__ __forceinline__ float round(float x) { return x; }
};

// The prototypes lie in device memory as the tensor cores' operands read them: a block of 8 classes for each step of 32 bytes
// of channels, [step][eight of classes], so that a stage is copied as it lies, and without padding every access finds its
// banks free.
// 16 bits: 16 channels as four 8 x 8 matrices [high, low][8 channels][class][channel], for ldmatrix, transposed or not.
// float32: 8 channels, [class][channel]; channels 0 4 1 5 2 6 3 7, since a thread reads two, 4 apart, as one pair; classes
//   0 1 2 3 5 4 7 6, so that the even ones lie in banks of their own, and the odd ones.
template <class T>
struct PrototypeBlock {
  static constexpr int kChannels = 32 / static_cast<int>(sizeof(T));
  static constexpr int kBytes = 256 * Split<T>::kParts;
  static constexpr int kLow = 128;  // elements from the high part to the low one
  // Elements from the first to class k and channel d, with `eights` eights of classes.
  static __device__ __forceinline__ int64_t offset(int eights, int k, int d) {
    int64_t block = static_cast<int64_t>(d / kChannels) * eights + k / 8;
    int within;
    if constexpr (sizeof(T) == 2)
      within = (d % 16 / 8 * 8 + k % 8) * 8 + d % 8;
    else
      within = row(k % 8) * 8 + d % 4 * 2 + d % 8 / 4;
    return block * (kBytes / static_cast<int>(sizeof(T))) + within;
  }
  static __device__ __forceinline__ int row(int k) { return k ^ k >> 2; }
};

}  // namespace proac::cuda
