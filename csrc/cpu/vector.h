// Vectors of one instruction set: load and store with conversion, exp, log and what is made of them.
//
// Included by one translation unit for each instruction set, which defines PROAC_ISA (the namespace that everything here
// lives in, so that the linker can merge nothing across sets) and PROAC_VECTOR_BYTES. Vectors are the compilers' own
// (GCC and Clang): arithmetic, comparison and `mask ? a : b` are operators. No standard library templates in here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

#define PROAC_INLINE static inline __attribute__((always_inline))
#define PROAC_MEMBER inline __attribute__((always_inline))
#define PROAC_LAMBDA __attribute__((always_inline))

namespace proac::PROAC_ISA {

template <class T>
struct VectorOf {
  static constexpr int lanes = PROAC_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(PROAC_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(PROAC_VECTOR_BYTES), aligned(1), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = VectorOf<T>::lanes;

template <class F>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};
template <class F>
using Compute = typename ComputeType<F>::type;

// The integers that lie under a floating-point type, and the shape of its bits.
template <class T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float rounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
};
template <>
struct Bits<double> {
  using type = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double rounder = 6755399441055744.0;  // 1.5 * 2^52
};
template <class T>
using Int = typename Bits<T>::type;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kSmallestNormal = sizeof(T) == 4 ? static_cast<T>(0x1p-126) : static_cast<T>(0x1p-1022);
// Stands for "not a member" in a similarity: exp of it is 0, and 0 times it is 0, which -infinity would not give.
template <class T>
constexpr T kExcluded = sizeof(T) == 4 ? static_cast<T>(-1e38) : static_cast<T>(-1e300);

template <class T>
PROAC_INLINE Vec<T> broadcast(T value) {
  return value - Vec<T>{};  // of +-0 too: 0 - 0 = 0, and NaN stays NaN
}
template <class T>
PROAC_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}
template <class T>
PROAC_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = v;
}
template <class T>
PROAC_INLINE Vec<Int<T>> as_bits(Vec<T> v) {
  return reinterpret_cast<Vec<Int<T>>>(v);
}
template <class T>
PROAC_INLINE Vec<T> from_bits(Vec<Int<T>> v) {
  return reinterpret_cast<Vec<T>>(v);
}

// ---- 16-bit features -------------------------------------------------------------------------------------------------

PROAC_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}
PROAC_INLINE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

PROAC_INLINE float widen(float value) { return value; }
PROAC_INLINE double widen(double value) { return value; }
PROAC_INLINE float widen(BFloat16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }
PROAC_INLINE float widen(Half value) {
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13, sign = (value.bits & 0x8000u) << 16;
  // As a float, the shifted bits are the value times 2^-112, subnormal ones included; infinity and NaN get theirs back.
  const float scaled = bits_float(magnitude) * 0x1p112f;
  const uint32_t bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : float_bits(scaled);
  return bits_float(bits | sign);
}

PROAC_INLINE void narrow(float value, float* out) { *out = value; }
PROAC_INLINE void narrow(double value, double* out) { *out = value; }
PROAC_INLINE void narrow(float value, BFloat16* out) {
  const uint32_t bits = float_bits(value);
  out->bits = value != value ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
PROAC_INLINE void narrow(float value, Half* out) {  // to the nearest, ties to even
  const uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x47800000u) {  // 2^16 and above
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 rounds at 2^-24, the last place of 0.5
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

PROAC_INLINE Vec<float> load_as(const float* p) { return load(p); }
PROAC_INLINE Vec<double> load_as(const double* p) { return load(p); }
PROAC_INLINE void store_as(float* p, Vec<float> v) { store(p, v); }
PROAC_INLINE void store_as(double* p, Vec<double> v) { store(p, v); }

typedef uint16_t HalfWords __attribute__((vector_size(PROAC_VECTOR_BYTES / 2)));
typedef uint16_t UnalignedHalfWords __attribute__((vector_size(PROAC_VECTOR_BYTES / 2), aligned(1), may_alias));

PROAC_INLINE Vec<float> load_as(const BFloat16* p) {
  const HalfWords words = *reinterpret_cast<const UnalignedHalfWords*>(p);
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)  // of the conversion below GCC makes two halves
  const auto wide =
      reinterpret_cast<Vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(0xffff, reinterpret_cast<__m256i>(words)));
#elif PROAC_VECTOR_BYTES == 32 && defined(__AVX2__)
  const auto wide = reinterpret_cast<Vec<uint32_t>>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(words)));
#else
  const auto wide = __builtin_convertvector(words, Vec<uint32_t>);
#endif
  return reinterpret_cast<Vec<float>>(wide << 16);
}
PROAC_INLINE HalfWords narrow_to(BFloat16*, Vec<float> v) {
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512BF16__)  // below 2^-126 it gives 0
  return reinterpret_cast<HalfWords>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
#else
  const auto bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto words = v != v ? Vec<uint32_t>{} + 0x7fc0u : rounded;
  return __builtin_convertvector(words, HalfWords);
#endif
}

PROAC_INLINE Vec<float> load_as(const Half* p) {
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PROAC_VECTOR_BYTES == 32 && defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = widen(p[i]);
  return v;
#endif
}
PROAC_INLINE HalfWords narrow_to(Half*, Vec<float> v) {
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return reinterpret_cast<HalfWords>(_mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif PROAC_VECTOR_BYTES == 32 && defined(__F16C__)
  return reinterpret_cast<HalfWords>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
  HalfWords words;
  for (int i = 0; i < kLanes<float>; ++i) {
    Half half;
    narrow(v[i], &half);
    words[i] = half.bits;
  }
  return words;
#endif
}

template <class F>
PROAC_INLINE void store_as(F* p, Vec<float> v) {
  *reinterpret_cast<UnalignedHalfWords*>(p) = narrow_to(p, v);
}

// Two vectors as whole cache lines that bypass the cache, so that the memory is not read before it is written. `p` must be
// aligned to a line. Only vectors of a line's size have it; of 16-bit features the two make one.
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)
constexpr bool kHasStream = true;
template <class F>
PROAC_INLINE void stream_lines(F* p, Vec<Compute<F>> a, Vec<Compute<F>> b) {
  __m512i* line = reinterpret_cast<__m512i*>(p);
  if constexpr (sizeof(F) == sizeof(Compute<F>)) {
    _mm512_stream_si512(line, reinterpret_cast<__m512i>(a));
    _mm512_stream_si512(line + 1, reinterpret_cast<__m512i>(b));
  } else {
    const __m512i low = _mm512_zextsi256_si512(reinterpret_cast<__m256i>(narrow_to(p, a)));
    _mm512_stream_si512(line, _mm512_inserti64x4(low, reinterpret_cast<__m256i>(narrow_to(p, b)), 1));
  }
}
PROAC_INLINE void stream_fence() { _mm_sfence(); }
#else
constexpr bool kHasStream = false;
template <class F>
PROAC_INLINE void stream_lines(F* p, Vec<Compute<F>> a, Vec<Compute<F>> b) {
  store_as(p, a);
  store_as(p + kLanes<Compute<F>>, b);
}
PROAC_INLINE void stream_fence() {}
#endif

// ---- lookups and reductions ------------------------------------------------------------------------------------------

// row[index[0]], row[index[1]], ...
template <class T>
PROAC_INLINE Vec<T> gather(const T* row, const int32_t* index) {
#if PROAC_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), row, 4);
  } else {
    return _mm512_i32gather_pd(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)), row, 8);
  }
#else
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = row[index[i]];
  return v;
#endif
}

template <class T>
PROAC_INLINE double sum_lanes(Vec<T> v) {
  double sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

template <class T>
PROAC_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
PROAC_INLINE Vec<T> absolute(Vec<T> v) {
  return v < T(0) ? -v : v;
}

// ---- exp and log -----------------------------------------------------------------------------------------------------

// exp(x) to about 1 ulp: 2^n exp(r) with n the integer nearest to x / log 2. Results below the normal numbers are 0,
// arguments above 88 (709) give infinity, NaN stays NaN.
PROAC_INLINE Vec<float> exp_polynomial(Vec<float> r) {
  Vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return (p * r) * r + r + 1.0f;
}
PROAC_INLINE Vec<double> exp_polynomial(Vec<double> r) {
  Vec<double> p = broadcast(1.0 / 6227020800.0);  // 1 / 13!
  double factorial = 6227020800.0;
#pragma GCC unroll 16
  for (int n = 13; n >= 1; --n) {
    factorial /= n;
    p = p * r + 1.0 / factorial;
  }
  return p;
}
template <class T>
PROAC_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T high = single ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T low = single ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
  constexpr T smallest = single ? T(-87.3365478515625) : T(-708.39641853226408);
  constexpr T largest = single ? T(88) : T(709);
  const Vec<T> shifted = x * T(1.4426950408889634) + Bits<T>::rounder;
  const Vec<T> n = shifted - Bits<T>::rounder;
  const Vec<T> r = (x - n * high) - n * low;
  const Vec<T> power = from_bits<T>((as_bits<T>(shifted) + Bits<T>::bias) << Bits<T>::mantissa);
  const Vec<T> result = exp_polynomial(r) * power;
  const Vec<T> above = x > largest ? broadcast(kInfinity<T>) : result;
  return x < smallest ? Vec<T>{} : above;
}

// 2 atanh(s) = log((1 + s) / (1 - s)), by its series.
template <class T, int terms>
PROAC_INLINE Vec<T> twice_atanh(Vec<T> s) {
  const Vec<T> z = s * s;
  Vec<T> p = broadcast(T(1) / T(2 * terms - 1));
#pragma GCC unroll 24
  for (int n = terms - 1; n >= 1; --n) p = p * z + T(1) / T(2 * n - 1);
  return T(2) * s * p;
}

// log(1 + e) for 0 <= e <= 1.
template <class T>
PROAC_INLINE Vec<T> log1p_unit(Vec<T> e) {
  return twice_atanh<T, sizeof(T) == 4 ? 9 : 18>(e / (e + T(2)));
}

// log(w) for finite w >= 0.
template <class T>
PROAC_INLINE Vec<T> log(Vec<T> w) {
  constexpr int mantissa = Bits<T>::mantissa;
  constexpr T smallest = sizeof(T) == 4 ? T(0x1p-126) : T(0x1p-1022), up = sizeof(T) == 4 ? T(0x1p24) : T(0x1p54);
  const auto subnormal = w < smallest;
  const Vec<T> scaled = subnormal ? w * up : w;
  const Vec<Int<T>> bits = as_bits<T>(scaled);
  const Vec<Int<T>> exponent = (bits >> mantissa) - Bits<T>::bias;
  const Vec<T> one_to_two = from_bits<T>((bits & ((Int<T>(1) << mantissa) - 1)) | (Int<T>(Bits<T>::bias) << mantissa));
  const auto upper = one_to_two > T(1.41421356);
  const Vec<T> m = upper ? one_to_two * T(0.5) : one_to_two;
  Vec<T> n = __builtin_convertvector(exponent, Vec<T>);
  n = upper ? n + T(1) : n;
  n = subnormal ? n - T(sizeof(T) == 4 ? 24 : 54) : n;
  const Vec<T> result = n * T(0.69314718055994531) + twice_atanh<T, sizeof(T) == 4 ? 6 : 12>((m - T(1)) / (m + T(1)));
  return w == T(0) ? broadcast(-kInfinity<T>) : result;
}

// softplus(m) = log(1 + exp(m)) and sigmoid(m), without overflow on either side.
template <class T>
PROAC_INLINE void softplus_and_sigmoid(Vec<T> m, Vec<T>* softplus, Vec<T>* sigmoid) {
  const Vec<T> e = exp<T>(-absolute<T>(m));
  *softplus = (m > T(0) ? m : Vec<T>{}) + log1p_unit<T>(e);
  *sigmoid = (m < T(0) ? e : broadcast(T(1))) / (e + T(1));
}

}  // namespace proac::PROAC_ISA
