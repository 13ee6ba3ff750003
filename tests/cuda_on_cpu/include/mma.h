// mma.sync.m16n8k16 (bf16/fp16 -> fp32), ldmatrix x4 (+trans), with the PTX fragment layouts.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "on_cpu.h"
namespace on_cpu {
struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
template <class H>
inline float half_of(uint32_t w, int k) {
  uint16_t u = (uint16_t)(w >> (16 * k));
  H h;
  memcpy((void*)&h, &u, 2);
  return (float)h;
}
template <class H>
void mma16816(uint32_t mask, const void* const* in, void* const* out) {
  if (mask != 0xffffffffu) fail("mma with mask %08x", mask);
  float A[16][16], B[16][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& m = *(const MmaIn*)in[l];
    int g = l >> 2, t = (l & 3) * 2;
    for (int e = 0; e < 8; ++e) A[g + (e >> 1 & 1) * 8][t + (e & 1) + (e >> 2) * 8] = half_of<H>(m.a[e >> 1], e & 1);
    for (int e = 0; e < 4; ++e) B[t + (e & 1) + (e >> 1) * 8][g] = half_of<H>(m.b[e >> 1], e & 1);
  }
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      int r = (l >> 2) + (e >> 1) * 8, c = (l & 3) * 2 + (e & 1);
      double s = ((const MmaIn*)in[l])->c[e];
      for (int k = 0; k < 16; ++k) s += (double)A[r][k] * B[k][c];  // products exact; one rounding at the end
      ((float*)out[l])[e] = (float)s;
    }
}
// Each lane reads the row it addresses when it ARRIVES (not when the last lane does): ldmatrix is no memory fence, so a
// missing __syncwarp() before it gives a wrong result.
struct Row {
  uint16_t h[8];
};
template <bool TRANS>
void ldsm4(uint32_t mask, const void* const* in, void* const* out) {
  if (mask != 0xffffffffu) fail("ldmatrix with mask %08x", mask);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {  // matrix i: rows from lanes 8i..8i+7
      uint16_t h[2];
      for (int u = 0; u < 2; ++u) {
        int row = TRANS ? (l & 3) * 2 + u : l >> 2, col = TRANS ? l >> 2 : (l & 3) * 2 + u;
        h[u] = ((const Row*)in[8 * i + row])->h[col];
      }
      memcpy((uint32_t*)out[l] + i, h, 4);
    }
}
template <bool TRANS>
inline void ldmatrix4(uint32_t (&r)[4], const void* p, uint32_t site) {
  if ((uintptr_t)p % 16) fail("ldmatrix alignment");
  touch(p, 16, 2, site);
  Row row;
  memcpy(row.h, p, 16);
  collective(0xffffffffu, TRANS ? "ldmatrix.trans" : "ldmatrix", &row, r, ldsm4<TRANS>);
}
}  // namespace on_cpu
template <class H = __nv_bfloat16>
inline void on_cpu_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::MmaIn m;
  memcpy(m.a, a, 16);
  m.b[0] = b0;
  m.b[1] = b1;
  memcpy(m.c, d, 16);
  on_cpu::collective(0xffffffffu, "mma.m16n8k16", &m, d, on_cpu::mma16816<H>);
}
namespace proac::cuda {
inline void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu_mma<__nv_bfloat16>(d, a, b0, b1);
}
inline void mma(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu_mma<__half>(d, a, b0, b1);
}
}  // namespace proac::cuda
// tf32 m16n8k8 (the low 13 bits of the operands are ignored, as on the hardware); cvt.rna.tf32
namespace on_cpu {
inline void mma1688_tf32(uint32_t mask, const void* const* in, void* const* out) {
  if (mask != 0xffffffffu) fail("mma with mask %08x", mask);
  auto cut = [](uint32_t w) {
    w &= 0xffffe000u;
    float f;
    memcpy(&f, &w, 4);
    return (double)f;
  };
  double A[16][8], B[8][8];
  for (int l = 0; l < 32; ++l) {
    const MmaIn& m = *(const MmaIn*)in[l];
    int g = l >> 2, t = l & 3;
    for (int e = 0; e < 4; ++e) A[g + (e & 1) * 8][t + (e >> 1) * 4] = cut(m.a[e]);
    for (int e = 0; e < 2; ++e) B[t + e * 4][g] = cut(m.b[e]);
  }
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < 4; ++e) {
      int r = (l >> 2) + (e >> 1) * 8, c = (l & 3) * 2 + (e & 1);
      double s = ((const MmaIn*)in[l])->c[e];
      for (int k = 0; k < 8; ++k) s += A[r][k] * B[k][c];
      ((float*)out[l])[e] = (float)s;
    }
}
}  // namespace on_cpu
namespace proac::cuda {
inline void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::MmaIn m;
  memcpy(m.a, a, 16);
  m.b[0] = b0;
  m.b[1] = b1;
  memcpy(m.c, d, 16);
  on_cpu::collective(0xffffffffu, "mma.m16n8k8.tf32", &m, d, on_cpu::mma1688_tf32);
}
inline uint32_t to_tf32(float x) {
  uint32_t i;
  memcpy(&i, &x, 4);
  return (i & 0x7f800000u) == 0x7f800000u ? i : (i + 0x1000u) & 0xffffe000u;
}
inline void ldmatrix(uint32_t (&r)[4], const void* p, uint32_t site = __builtin_LINE()) {
  on_cpu::ldmatrix4<false>(r, p, site);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* p, uint32_t site = __builtin_LINE()) {
  on_cpu::ldmatrix4<true>(r, p, site);
}
inline uint32_t movmatrix(uint32_t a) {
  uint32_t r;
  on_cpu::collective(0xffffffffu, "movmatrix", &a, &r, [](uint32_t, const void* const* in, void* const* out) {
    for (int l = 0; l < 32; ++l) {  // element (row g, columns 2t, 2t + 1) of the transposed matrix
      uint32_t w = 0;
      for (int u = 0; u < 2; ++u) {
        int row = (l & 3) * 2 + u, column = l >> 2;  // of the given one
        w |= (*(const uint32_t*)in[row * 4 + column / 2] >> (16 * (column & 1)) & 0xffffu) << (16 * u);
      }
      *(uint32_t*)out[l] = w;
    }
  });
  return r;
}
}  // namespace proac::cuda
