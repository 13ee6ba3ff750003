// fp16: GCC's _Float16 does the conversions (round to nearest even)
#pragma once
#include "on_cpu.h"
struct alignas(2) __half {
  _Float16 h;
  __half() = default;
  __half(float f) : h((_Float16)f) {}
  operator float() const { return (float)h; }
};
struct alignas(4) __half2 {
  __half x, y;
};
inline float __half2float(__half a) { return (float)a.h; }
inline __half __float2half_rn(float f) { return __half(f); }
inline __half __float2half(float f) { return __half(f); }
inline float2 __half22float2(__half2 v) { return {(float)v.x.h, (float)v.y.h}; }
inline __half2 __floats2half2_rn(float a, float b) {
  __half2 r;
  r.x = __half(a);
  r.y = __half(b);
  return r;
}
using half = __half;
using half2 = __half2;
// arithmetic: each operation rounds once to half
inline __half __hadd(__half a, __half b) { return __half((float)a + (float)b); }
inline __half __hsub(__half a, __half b) { return __half((float)a - (float)b); }
inline __half __hmul(__half a, __half b) { return __half((float)a * (float)b); }
inline __half __hfma(__half a, __half b, __half c) {
  __half r;
  r.h = (_Float16)((double)(float)a * (float)b + (float)c);
  return r;
}
inline __half __hmax(__half a, __half b) { return __half(fmaxf(a, b)); }
inline __half __hmin(__half a, __half b) { return __half(fminf(a, b)); }
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __half2 __hsub2(__half2 a, __half2 b) { return {__hsub(a.x, b.x), __hsub(a.y, b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; }
inline __half2 __hmin2(__half2 a, __half2 b) { return {__hmin(a.x, b.x), __hmin(a.y, b.y)}; }
inline __half2 __float2half2_rn(float f) { return __floats2half2_rn(f, f); }
inline __half2 __float22half2_rn(float2 f) { return __floats2half2_rn(f.x, f.y); }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline float __low2float(__half2 v) { return (float)v.x; }
inline float __high2float(__half2 v) { return (float)v.y; }
