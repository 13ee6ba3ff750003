// Scalar functions and reductions that the kernels share. Sums are taken in a fixed order everywhere.
#pragma once
#include "portable.cuh"
#include "prepare.cuh"

namespace proac::cuda {

template <class T>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeType<T>::type;

constexpr double kEps = 1e-12;  // a vector no longer than this has no direction

__device__ __forceinline__ float minus_infinity() { return __int_as_float(static_cast<int>(0xff800000u)); }
__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

template <class C, class T>
__device__ __forceinline__ C widen(T x) {
  return static_cast<C>(x);
}
template <>
__device__ __forceinline__ float widen<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float widen<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <class T, class C>
__device__ __forceinline__ T narrow(C x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ __half narrow<__half, float>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16, float>(float x) {
  return __float2bfloat16_rn(x);
}

// the larger one; NaN where one is NaN
template <class C>
__device__ __forceinline__ C larger(C a, C b) {
  return a > b || a != a ? a : b;
}

// log(1 + exp(x)) and 1 / (1 + exp(-x)) for any x, infinite and NaN ones included
template <class C>
__device__ __forceinline__ C softplus(C x) {
  return (x > C(0) ? x : C(0)) + log1p(exp(-fabs(x)));
}
template <class C>
__device__ __forceinline__ C sigmoid(C x) {
  C e = exp(-fabs(x));
  return (x >= C(0) ? C(1) : e) / (C(1) + e);
}

// log of a sum of exponentials, as maximum + log(sum). The maximum may miss a NaN; the sum never does.
template <class C>
struct LogSum {
  C maximum, sum;
};
template <class C>
__device__ __forceinline__ LogSum<C> empty_sum() {
  return {static_cast<C>(minus_infinity()), C(0)};
}
// what exponents are taken relative to: the maximum, or 0 where there is nothing
template <class C>
__device__ __forceinline__ C shift_of(C maximum) {
  return maximum == static_cast<C>(minus_infinity()) ? C(0) : maximum;
}
template <class C>
__device__ __forceinline__ LogSum<C> merge(LogSum<C> a, LogSum<C> b) {
  C m = a.maximum > b.maximum ? a.maximum : b.maximum, shift = shift_of(m);
  return {m, a.sum * exp(a.maximum - shift) + b.sum * exp(b.maximum - shift)};
}
template <class C>
__device__ __forceinline__ C value(LogSum<C> a) {
  return shift_of(a.maximum) + log(a.sum);
}

template <class C>
__device__ __forceinline__ C warp_sum(C v) {
#pragma unroll
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(kAllLanes, v, o);
  return v;
}

// Adds a term, already multiplied by kSumScale, to element (k, d) of the prototypes' gradient.
template <class C>
__device__ __forceinline__ void add_term(const PrototypeSums& sums, int64_t channels, int k, int64_t d, C term) {
  if (fabs(term) < C(0x1p62))
    atomicAdd(sums.sum + k * channels + d, static_cast<unsigned long long>(llrint(term)));
  else
    sums.bad[k] = 1;
}

// Sum or maximum over the threads of a block; `scratch` holds 32 values, and may be reused after the next barrier.
template <class C>
__device__ C block_sum(C v, C* scratch) {
  v = warp_sum(v);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = v;
  SYNC_THREADS(warps_have_summed);
  C total = C(0);
  for (int w = 0; w < static_cast<int>(blockDim.x >> 5); ++w) total += scratch[w];
  return total;
}

// target[r * stride + k] += the sum of value[r][i] over the pixels i of class k, r < R. Deterministic: class k belongs to
// warp k mod (number of warps), which adds its pixels in their order. The caller puts barriers before and after.
template <int R, class C>
__device__ void add_by_class(int count, const int* label, const C* const (&value)[R], C* const (&target)[R]) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  for (int base = 0; base < count; base += 32) {
    int i = base + lane, k = i < count ? label[i] : -1;
    bool mine = k >= 0 && k % warps == warp;
    unsigned pending = __ballot_sync(kAllLanes, mine);
    while (pending) {
      int chosen = __shfl_sync(kAllLanes, k, __ffs(pending) - 1);
      bool in = mine && k == chosen;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        C sum = warp_sum(in ? value[r][i] : C(0));
        if (lane == 0) target[r][chosen] += sum;
      }
      pending &= ~__ballot_sync(kAllLanes, in);
    }
  }
}

}  // namespace proac::cuda
