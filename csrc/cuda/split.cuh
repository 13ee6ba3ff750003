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

}  // namespace proac::cuda
