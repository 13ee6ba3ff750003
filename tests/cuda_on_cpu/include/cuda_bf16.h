// bfloat16: conversions alone, to nearest even, NaN kept.
#pragma once
#include "on_cpu.h"

struct alignas(2) __nv_bfloat16 {
  uint16_t bits;
  operator float() const { return on_cpu::bits_as<float>(static_cast<uint32_t>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits = on_cpu::bits_as<uint32_t>(x);
  bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
