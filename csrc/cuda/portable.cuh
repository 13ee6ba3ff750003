// The few places where the GPU and the tests' stand-in headers (tests/cuda_on_cpu) differ: launches, dynamic shared
// memory, and the PTX instructions that have no intrinsic. Everything else is ordinary CUDA C++.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>
#ifdef CUDA_ON_CPU
#include <mma.h>
#endif

#include <cstdint>

#include "arguments.h"
#include "device.h"

// tests/cuda_mutants.py: the n-th marked barrier or wait is left out. Nothing, unless compiled with -DMUTANT=n.
#ifdef CUDA_ON_CPU
#define MUTANT (on_cpu::options().mutant)
#elif !defined(MUTANT)
#define MUTANT 0
#endif
#define SYNC_THREADS(n)                 \
  do {                                  \
    if (MUTANT != (n)) __syncthreads(); \
  } while (0)
#define WAIT_PRIOR(n, groups)                         \
  do {                                                \
    if (MUTANT != (n)) __pipeline_wait_prior(groups); \
  } while (0)

namespace proac::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef CUDA_ON_CPU

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), unsigned blocks, int threads, size_t shared, cudaStream_t,
                  const Arguments& arguments) {
  on_cpu::launch(reinterpret_cast<void*>(kernel), blocks, threads, shared, &arguments, sizeof arguments,
                 [&] { kernel(arguments); });
  return cudaSuccess;
}

#else

template <class T>
using Same = T;
#define SHARED(T, name) __shared__ Same<T> name  // T may be an array type
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), unsigned blocks, int threads, size_t shared, cudaStream_t stream,
                  const Arguments& arguments) {
  // clang-format off
  kernel<<<blocks, threads, shared, stream>>>(arguments);
  // clang-format on
  return cudaGetLastError();
}

// d += a b, 16 x 8 x 16; A by rows, B by columns.
__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// d += a b, 16 x 8 x 8, operands in TF32.
__device__ __forceinline__ void mma(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
  return r;
}
// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p)))
               : "memory");
}
// Transposes an 8 x 8 matrix of 16-bit elements held by a warp in registers.
__device__ __forceinline__ uint32_t movmatrix(uint32_t a) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

#endif

// Every kernel takes one struct by value. Its dynamic shared memory is allowed up to the device's limit, always the same: what
// one call needs, set here, might be less than what a call of another thread has just set.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
                   const Arguments& arguments) {
  if (shared) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit());
    if (error != cudaSuccess) return error;
  }
  return start(kernel, static_cast<unsigned>(blocks), threads, shared, stream, arguments);
}

}  // namespace proac::cuda
