// The PTX instructions of a warp that csrc/cuda/portable.cuh wraps: mma.sync, ldmatrix, movmatrix, cvt.rna.tf32. Lane
// 4 g + t holds the elements that the PTX manual's figures give it.
#pragma once
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "on_cpu.h"

namespace on_cpu {

constexpr uint32_t kAllLanes = 0xffffffffu;

// One lane's part of the operands.
struct Fragments {
  uint32_t a[4], b[2];
  float c[4];
};

inline Fragments fragments(const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  return {{a[0], a[1], a[2], a[3]}, {b0, b1}, {c[0], c[1], c[2], c[3]}};
}

// An element of a word: the lower or upper half, or all of it as TF32, whose lower 13 bits the hardware ignores.
inline float element(__nv_bfloat16, uint32_t word, int half) {
  return __nv_bfloat16{static_cast<uint16_t>(word >> (16 * half))};
}
inline float element(__half, uint32_t word, int half) {
  return bits_as<__half>(static_cast<uint16_t>(word >> (16 * half)));
}
inline float element(float, uint32_t word, int) { return bits_as<float>(word & 0xffffe000u); }

// d = a b + c, 16 x 8 x kDepth. Products are exact, their sum is rounded once.
template <class T>
void multiply_matrices(uint32_t mask, const void* const* in, void* const* out) {
  if (mask != kAllLanes) fail("mma with mask %08x", mask);
  constexpr int kPerWord = sizeof(T) == 2 ? 2 : 1, kDepth = 8 * kPerWord;
  double a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(in[lane]);
    int group = lane / 4, first = lane % 4 * kPerWord;
    for (int half = 0; half < kPerWord; ++half) {
      for (int word = 0; word < 4; ++word)
        a[group + word % 2 * 8][first + half + word / 2 * 4 * kPerWord] = element(T(), own.a[word], half);
      for (int word = 0; word < 2; ++word)
        b[first + half + word * 4 * kPerWord][group] = element(T(), own.b[word], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
      double sum = static_cast<const Fragments*>(in[lane])->c[e];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      static_cast<float*>(out[lane])[e] = static_cast<float>(sum);
    }
}

// One row of an 8 x 8 matrix of 16-bit elements.
struct Row {
  uint16_t columns[8];
};

// Matrix i from the rows of lanes 8 i to 8 i + 7. A lane's row is read when it arrives, not when the last one does:
// ldmatrix is no memory fence, so a missing __syncwarp() before it gives a wrong result.
template <bool kTransposed>
void load_matrices(uint32_t (&words)[4], const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) fail("ldmatrix alignment");
  Row mine;
  memcpy(&mine, p, sizeof mine);
  const char* what = kTransposed ? "ldmatrix.trans" : "ldmatrix";
  collective(kAllLanes, what, &mine, words, [](uint32_t, const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int half = 0; half < 2; ++half) {
          int row = lane / 4, column = lane % 4 * 2 + half;
          if (kTransposed) std::swap(row, column);
          const Row& from = *static_cast<const Row*>(in[8 * matrix + row]);
          word |= static_cast<uint32_t>(from.columns[column]) << (16 * half);
        }
        static_cast<uint32_t*>(out[lane])[matrix] = word;
      }
  });
}

}  // namespace on_cpu

namespace proac::cuda {

template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  on_cpu::Fragments own = on_cpu::fragments(a, b0, b1, d);
  on_cpu::collective(on_cpu::kAllLanes, "mma", &own, d, on_cpu::multiply_matrices<T>);
}
inline void ldmatrix(uint32_t (&words)[4], const void* p) { on_cpu::load_matrices<false>(words, p); }
inline void ldmatrix_transposed(uint32_t (&words)[4], const void* p) { on_cpu::load_matrices<true>(words, p); }
inline uint32_t movmatrix(uint32_t word) {
  uint32_t result;
  on_cpu::collective(on_cpu::kAllLanes, "movmatrix", &word, &result,
                     [](uint32_t, const void* const* in, void* const* out) {
                       for (int lane = 0; lane < 32; ++lane) {
                         uint32_t word = 0;
                         for (int half = 0; half < 2; ++half) {
                           int row = lane % 4 * 2 + half, column = lane / 4;  // of the given matrix
                           uint32_t from = *static_cast<const uint32_t*>(in[row * 4 + column / 2]);
                           word |= (from >> (16 * (column % 2)) & 0xffffu) << (16 * half);
                         }
                         *static_cast<uint32_t*>(out[lane]) = word;
                       }
                     });
  return result;
}
// Rounds to nearest, ties away from zero; infinities and NaN stay.
inline uint32_t to_tf32(float x) {
  uint32_t bits = on_cpu::bits_as<uint32_t>(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace proac::cuda
