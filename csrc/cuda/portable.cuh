// The few places where the GPU and the tests' stand-in headers (tests/cuda_on_cpu) differ: launches, dynamic shared
// memory, and the PTX instructions that have no intrinsic. Everything else is ordinary CUDA C++.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#ifdef CUDA_ON_CPU
#include <cuda_pipeline.h>
#include <mma.h>
#endif

#include <cstdint>

#include "arguments.h"
#include "barriers.h"
#include "device.h"

// tests/cuda_mutants.py: one barrier or wait is left out. Nothing, unless compiled with -DMUTANT=n.
#ifdef CUDA_ON_CPU
#define MUTANT (on_cpu::options().mutant)
#elif !defined(MUTANT)
#define MUTANT 0
#endif
#define SYNC_THREADS(why)                                          \
  do {                                                             \
    if (MUTANT != static_cast<int>(Barrier::why)) __syncthreads(); \
  } while (0)
#define WAIT_FOR_COPIES(why, groups)                                       \
  do {                                                                     \
    if (MUTANT != static_cast<int>(Barrier::why)) wait_for_copies(groups); \
  } while (0)
#define LEFT_OUT(why) (MUTANT == static_cast<int>(Barrier::why))

namespace proac::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef CUDA_ON_CPU

// A place in shared memory: 32 bits on the GPU, where a pointer has 64.
using SharedAddress = char*;
inline SharedAddress shared_address(void* p) { return static_cast<char*>(p); }
template <bool kKeep, class V>
void keep(V&) {}
template <class V>
V anew(V v) {
  return v;
}
template <class V>
V load_shared(SharedAddress p, int offset = 0) {
  p += offset;
  on_cpu::aligned(reinterpret_cast<V*>(p));
  return *reinterpret_cast<const V*>(p);
}
template <class V>
void store_shared(SharedAddress p, V v) {
  on_cpu::aligned(reinterpret_cast<V*>(p));
  *reinterpret_cast<V*>(p) = v;
}
template <int kBytes>
void copy_async(SharedAddress to, const void* from, int bytes = kBytes) {
  __pipeline_memcpy_async(to, from, kBytes, kBytes - bytes);
}
inline void commit_copies() { __pipeline_commit(); }
inline unsigned count_arrival(unsigned* counter) { return atomicAdd(counter, 1u); }
inline void wait_for_copies(int groups) { __pipeline_wait_prior(groups); }
inline float exp2_approx(float x) { return exp2f(x); }
inline void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = to_tf32(__uint_as_float(x));
  low = __float_as_uint(__uint_as_float(x) - __uint_as_float(high));
}
inline void add_square(float& sum, uint32_t x) { sum = fmaf(__uint_as_float(x), __uint_as_float(x), sum); }
template <class T>
void multiply(T type, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  for (float& v : d) v = 0.f;
  mma(type, d, a, b0, b1);
}

template <class Arguments>
cudaError_t start(void (*kernel)(Arguments), unsigned blocks, int threads, size_t shared, cudaStream_t,
                  const Arguments& arguments) {
  Arguments recorded = arguments;
  __builtin_clear_padding(&recorded);  // what happens to lie between the fields might look like a pointer
  on_cpu::launch(reinterpret_cast<void*>(kernel), blocks, threads, shared, &recorded, sizeof recorded,
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

// A place in shared memory: 32 bits on the GPU, where a pointer has 64.
using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Keeps a value in its register, where kKeep: the compiler would make it anew in every turn of a loop.
template <bool kKeep, class V>
__device__ __forceinline__ void keep(V& v) {
  if constexpr (kKeep && sizeof(V) == 8)
    asm volatile("" : "+l"(v));
  else if constexpr (kKeep)
    asm volatile("" : "+r"(v));
}
// The same number, of which the compiler does not know it: what follows from it is made anew rather than kept in registers.
template <class V>
__device__ __forceinline__ V anew(V v) {
  keep<true>(v);
  return v;
}
template <class V>
__device__ __forceinline__ V load_shared(SharedAddress p, int offset = 0) {
  return *reinterpret_cast<const V*>(static_cast<const char*>(__cvta_shared_to_generic(p)) + offset);
}
template <class V>
__device__ __forceinline__ void store_shared(SharedAddress p, V v) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 16, "half a word, a word, or four");
  if constexpr (sizeof(V) == 16)
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
  else if constexpr (sizeof(V) == 2)
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(p), "h"(*reinterpret_cast<uint16_t*>(&v)) : "memory");
  else
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(p), "r"(*reinterpret_cast<uint32_t*>(&v)) : "memory");
}
// cp.async of kBytes, of which the first `bytes` exist; the rest becomes zero. 16 bytes pass by the L1 cache.
template <int kBytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(kBytes) : "memory");
}
template <int kBytes>
__device__ __forceinline__ void copy_async(SharedAddress to, const void* from, int bytes) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kBytes), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most this many of the latest groups are under way; fewer where there is no instruction for the number.
__device__ __forceinline__ void wait_for_copies(int groups) {
  if (groups >= 5)
    asm volatile("cp.async.wait_group 5;" ::: "memory");
  else if (groups >= 3)
    asm volatile("cp.async.wait_group 3;" ::: "memory");
  else if (groups >= 2)
    asm volatile("cp.async.wait_group 2;" ::: "memory");
  else if (groups >= 1)
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  else
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}
// Adds 1, and returns what was there. All that the block wrote before its last barrier is seen by whoever adds later, and what
// those wrote who added before is seen by this block after its next barrier.
__device__ __forceinline__ unsigned count_arrival(unsigned* counter) {
  unsigned before;
  if (LEFT_OUT(arrivals_are_ordered))
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  else
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// 2^x with an error of 2^-22; results below 2^-126 become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
// d = a b
__device__ __forceinline__ void multiply(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void multiply(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
__device__ __forceinline__ void multiply(float, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
// high + low = x: high is TF32, and of low the tensor cores read as much as TF32 has.
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  asm("{\n\tcvt.rna.tf32.f32 %0, %2;\n\tsub.rn.f32 %1, %2, %0;\n\t}" : "=&r"(high), "=r"(low) : "r"(x));
}
// sum += x^2, of a float32 number's bits.
__device__ __forceinline__ void add_square(float& sum, uint32_t x) {
  asm("fma.rn.f32 %0, %1, %1, %0;" : "+f"(sum) : "r"(x));
}
// Four 8 x 8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], SharedAddress p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[4], SharedAddress p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(p)
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
    if (error != cudaSuccess) {
      cudaGetLastError();  // else the next launch would report it once more
      return error;
    }
  }
  return start(kernel, static_cast<unsigned>(blocks), threads, shared, stream, arguments);
}

}  // namespace proac::cuda
