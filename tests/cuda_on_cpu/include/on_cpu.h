// on_cpu.h - run CUDA C++ kernels on a CPU, as ordinary C++17, for testing.  No GPU, no CUDA toolkit.
// Every thread of a block is a fiber; fibers run one at a time on one OS thread and switch only at barriers, warp
// collectives and (optionally) atomics.  A random fiber is picked at each switch (seeded), so an order that the kernel
// relies on without a barrier shows as a wrong result for some seed.  Blocks run one after another in random order;
// cooperative launches keep all blocks alive and swap the static shared memory between them.
#pragma once
#define CUDA_ON_CPU 1
#include <math.h>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>
#include "cuda_runtime_api.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
// Shared memory belongs to the block that runs: exact in size, so that AddressSanitizer sees an overrun, and poisoned.
#define SHARED(T, name)              \
  static const char name##_site = 0; \
  on_cpu::Same<T>& name = *static_cast<on_cpu::Same<T>*>(on_cpu::static_shared(&name##_site, sizeof(on_cpu::Same<T>)))
#define DYNAMIC_SHARED(name) char* name = static_cast<char*>(on_cpu::dyn_shared())

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
#define ON_CPU_VEC(T, N)                                                          \
  struct alignas(sizeof(T) * 2) N##2 { T x, y; };                                 \
  struct N##3 { T x, y, z; };                                                     \
  struct alignas(sizeof(T) * 4 > 16 ? 16 : sizeof(T) * 4) N##4 { T x, y, z, w; }; \
  inline N##2 make_##N##2(T x, T y) { return {x, y}; }                            \
  inline N##4 make_##N##4(T x, T y, T z, T w) { return {x, y, z, w}; }
ON_CPU_VEC(float, float) ON_CPU_VEC(int, int) ON_CPU_VEC(double, double) struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct alignas(16) ulonglong2 {
  unsigned long long x, y;
};
inline ulonglong2 make_ulonglong2(unsigned long long x, unsigned long long y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace on_cpu {
struct Options {
  uint64_t seed = 1;          // order of fibers and blocks
  int order = 2;              // 0 ascending, 1 descending, 2 random
  bool poison = true;         // shared memory = 0xFF (NaN) before each block; cp.async targets poisoned until the wait
  int mutant = 0;             // the marked barrier or wait that is left out
  int multiprocessors = 132;  // cudaDevAttrMultiProcessorCount
  size_t shared_limit = 227 << 10;  // what cudaDevAttrMaxSharedMemoryPerBlockOptin says
  bool preempt = false;             // also switch at atomics (never needed for correct kernels; finds racy protocols)
  size_t stack = 64 << 10;          // bytes per fiber
};
struct Counters {  // per kernel name; warp-level figures join the lanes that issue the same load together
  uint64_t launches = 0, blocks = 0, threads = 0, barriers = 0, collectives = 0, switches = 0, atomics = 0;
  uint64_t gld_bytes = 0, gst_bytes = 0, gld_ops = 0, gst_ops = 0, gld_sectors = 0, gst_sectors = 0;
  uint64_t sld_ops = 0, sld_wavefronts = 0;  // shared accesses through sld (bank conflicts = wavefronts - ops)
};
Options& options();
std::map<std::string, Counters>& counters();
struct Fiber {
  uint3 tid, bid;
  int lane, warp;
  unsigned linear;
  // --- private to on_cpu.cc
  void* sp = nullptr;
  char* stack = nullptr;
  void* asan = nullptr;
  struct Block* block = nullptr;
  int state = 0;
  const char* where = "";
  uint32_t mask = 0;
  const void* in = nullptr;
  void* out = nullptr;
  int want = 0;
  struct Copy {
    void* d;
    const void* s;
    int n, zfill;
  };
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  struct Acc {
    uintptr_t a;
    uint32_t n;
    uint32_t site;
    uint8_t kind;
  };
  std::vector<Acc> log;
};
extern Fiber* cur;
extern dim3 g_grid, g_block;
template <class T>
using Same = T;
void* dyn_shared();
void* static_shared(const void* site, size_t bytes);
void barrier(const char* where);
int barrier_reduce(int op, int v);  // __syncthreads_count/_and/_or

void maybe_yield();
using Combine = void (*)(uint32_t mask, const void* const* in, void* const* out);
void collective(uint32_t mask, const char* what, const void* in, void* out, Combine f);  // all lanes of mask meet here
void cp_async(void* d, const void* s, int n, int zfill);
void cp_commit();
void cp_wait(int n);
void touch(const void* p, size_t n, int kind, uint32_t site);  // kind 0 global load, 1 global store, 2 shared
void launch(void* kernel, unsigned blocks, int threads, size_t shared, const void* arguments, size_t argument_bytes,
            const std::function<void()>& body);
// What was launched, for tests that run the same launches elsewhere.
struct Launch {
  void* kernel;
  unsigned blocks;
  int threads;
  size_t shared;
  std::string arguments;
};
std::vector<Launch>& launches();
std::map<const void*, int>& dynamic_shared_limits();  // by kernel, as cudaFuncSetAttribute set them
void fail(const char* fmt, ...);
inline int popc(unsigned x) { return __builtin_popcount(x); }
}  // namespace on_cpu
#define threadIdx (on_cpu::cur->tid)
#define blockIdx (on_cpu::cur->bid)
#define blockDim (on_cpu::g_block)
#define gridDim (on_cpu::g_grid)
#define warpSize 32

// ---- barriers and fences
inline void __syncthreads() { on_cpu::barrier("__syncthreads"); }
inline int __syncthreads_count(int p) { return on_cpu::barrier_reduce(0, p); }
inline int __syncthreads_and(int p) { return on_cpu::barrier_reduce(1, p); }
inline int __syncthreads_or(int p) { return on_cpu::barrier_reduce(2, p); }
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }
inline void __nanosleep(unsigned) { on_cpu::maybe_yield(); }
inline void __syncwarp(uint32_t m = 0xffffffffu) {
  int z = 0, o;
  on_cpu::collective(m, "__syncwarp", &z, &o, [](uint32_t, const void* const*, void* const*) {});
}

// ---- shuffles, votes
namespace on_cpu {
template <class T>
struct ShflIn {
  T v;
  int src;
};
template <class T>
T shfl(uint32_t m, T v, int src, const char* what) {
  static_assert(sizeof(T) <= 8, "shuffle type");
  ShflIn<T> i{v, src};
  T o = v;
  collective(m, what, &i, &o, [](uint32_t mask, const void* const* in, void* const* out) {
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) {
        int s = ((const ShflIn<T>*)in[l])->src;
        if (!(mask >> s & 1)) fail("shuffle: lane %d reads lane %d, which is not in mask %08x", l, s, mask);
        *(T*)out[l] = ((const ShflIn<T>*)in[s])->v;
      }
  });
  return o;
}
}  // namespace on_cpu
template <class T>
T __shfl_sync(uint32_t m, T v, int src, int w = 32) {
  int l = on_cpu::cur->lane;
  return on_cpu::shfl(m, v, (l & ~(w - 1)) + (src & (w - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32) {
  int l = on_cpu::cur->lane, s = l ^ x;
  return on_cpu::shfl(m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? l : s, "__shfl_xor_sync");
}
template <class T>
T __shfl_down_sync(uint32_t m, T v, unsigned d, int w = 32) {
  int l = on_cpu::cur->lane, s = l + (int)d;
  return on_cpu::shfl(m, v, (l & (w - 1)) + (int)d >= w ? l : s, "__shfl_down_sync");
}
template <class T>
T __shfl_up_sync(uint32_t m, T v, unsigned d, int w = 32) {
  int l = on_cpu::cur->lane;
  return on_cpu::shfl(m, v, (l & (w - 1)) < (int)d ? l : l - (int)d, "__shfl_up_sync");
}
inline unsigned __ballot_sync(uint32_t m, int p) {
  unsigned o = 0;
  on_cpu::collective(m, "__ballot_sync", &p, &o, [](uint32_t mask, const void* const* in, void* const* out) {
    unsigned b = 0;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) b |= (unsigned)(*(const int*)in[l] != 0) << l;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) *(unsigned*)out[l] = b;
  });
  return o;
}
inline int __any_sync(uint32_t m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(uint32_t m, int p) { return __ballot_sync(m, p) == m; }
template <class T, class F>
T on_cpu_reduce(uint32_t m, T v, F) {
  T o{};
  on_cpu::collective(m, "__reduce_sync", &v, &o, [](uint32_t mask, const void* const* in, void* const* out) {
    T a{};
    bool first = true;
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) {
        T x = *(const T*)in[l];
        a = first ? x : F()(a, x);
        first = false;
      }
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) *(T*)out[l] = a;
  });
  return o;
}
struct OnCpuMax {
  template <class T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
template <class T>
T __reduce_add_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, std::plus<T>());
}
template <class T>
T __reduce_max_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, OnCpuMax());
}
struct OnCpuMin {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
template <class T>
T __reduce_min_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, OnCpuMin());
}
template <class T>
T __reduce_and_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, std::bit_and<T>());
}
template <class T>
T __reduce_or_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, std::bit_or<T>());
}
template <class T>
T __reduce_xor_sync(uint32_t m, T v) {
  return on_cpu_reduce(m, v, std::bit_xor<T>());
}
template <class T>
unsigned __match_any_sync(uint32_t m, T v) {
  unsigned o = 0;
  on_cpu::collective(m, "__match_any_sync", &v, &o, [](uint32_t mask, const void* const* in, void* const* out) {
    for (int l = 0; l < 32; ++l)
      if (mask >> l & 1) {
        unsigned b = 0;
        for (int k = 0; k < 32; ++k)
          if (mask >> k & 1) b |= (unsigned)(memcmp(in[l], in[k], sizeof(T)) == 0) << k;
        *(unsigned*)out[l] = b;
      }
  });
  return o;
}
template <class T>
unsigned __match_all_sync(uint32_t m, T v, int* pred) {
  unsigned b = __match_any_sync(m, v);
  int all = __all_sync(m, b == m);
  *pred = all;
  return all ? m : 0;
}
inline uint32_t __activemask() {
  on_cpu::fail("__activemask is not emulated (pass an explicit mask)");
  return 0;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (x >> i & 1u) << (31 - i);
  return r;
}
inline unsigned long long __brevll(unsigned long long x) {
  return (unsigned long long)__brev((unsigned)x) << 32 | __brev((unsigned)(x >> 32));
}
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline int __mulhi(int a, int b) { return (int)((int64_t)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline long long __mul64hi(long long a, long long b) { return (long long)((__int128)a * b >> 64); }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned n) {
  return (unsigned)((((uint64_t)hi << 32 | lo) << (n & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned n) {
  return (unsigned)(((uint64_t)hi << 32 | lo) >> (n & 31));
}
inline unsigned __funnelshift_lc(unsigned lo, unsigned hi, unsigned n) {
  n = n < 32 ? n : 32;
  return (unsigned)((((unsigned __int128)((uint64_t)hi << 32 | lo)) << n) >> 32);
}
inline unsigned __funnelshift_rc(unsigned lo, unsigned hi, unsigned n) {
  n = n < 32 ? n : 32;
  return (unsigned)(((uint64_t)hi << 32 | lo) >> n);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  uint64_t v = (uint64_t)b << 32 | a;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= (unsigned)(v >> (8 * (s >> 4 * i & 7)) & 255) << (8 * i);
  return r;
}

// ---- atomics (one OS thread: plain operations)
#define ON_CPU_ATOMIC(name, expr)                      \
  template <class T>                                   \
  T name(T* p, typename std::common_type<T>::type v) { \
    on_cpu::maybe_yield();                             \
    T o = *p;                                          \
    *p = (expr);                                       \
    return o;                                          \
  }
// clang-format off
ON_CPU_ATOMIC(atomicAdd, o + v)
ON_CPU_ATOMIC(atomicSub, o - v)
ON_CPU_ATOMIC(atomicExch, v)
ON_CPU_ATOMIC(atomicMax, o > v ? o : v)
ON_CPU_ATOMIC(atomicMin, o < v ? o : v)
ON_CPU_ATOMIC(atomicOr, o | v)
ON_CPU_ATOMIC(atomicAnd, o & v)
ON_CPU_ATOMIC(atomicXor, o ^ v)
ON_CPU_ATOMIC(atomicInc, o >= v ? 0 : o + 1)
// clang-format on
template <class T>
T atomicCAS(T* p, typename std::common_type<T>::type c, typename std::common_type<T>::type v) {
  on_cpu::maybe_yield();
  T o = *p;
  if (o == c) *p = v;
  return o;
}

// ---- loads and stores that are counted (bytes, 32-byte sectors per warp-wide access)
namespace on_cpu {
template <class T>
inline void aligned(const T* p) {
  if ((uintptr_t)p % alignof(T)) fail("misaligned %zu-byte access at %p", sizeof(T), (const void*)p);
}
}  // namespace on_cpu
#define ON_CPU_SITE (uint32_t)__builtin_LINE()
template <class T>
inline T gld(const T* p, uint32_t site = ON_CPU_SITE) {
  on_cpu::aligned(p);
  on_cpu::touch(p, sizeof(T), 0, site);
  T v;
  memcpy((void*)&v, p, sizeof v);
  return v;
}
template <class T>
inline void gst(T* p, T v, uint32_t site = ON_CPU_SITE) {
  on_cpu::aligned(p);
  on_cpu::touch(p, sizeof(T), 1, site);
  memcpy((void*)p, &v, sizeof v);
}
template <class T>
inline T sld(const T* p, uint32_t site = ON_CPU_SITE) {
  on_cpu::aligned(p);
  on_cpu::touch(p, sizeof(T), 2, site);
  T v;
  memcpy((void*)&v, p, sizeof v);
  return v;
}
template <class T>
inline void sst(T* p, T v, uint32_t site = ON_CPU_SITE) {
  on_cpu::aligned(p);
  on_cpu::touch(p, sizeof(T), 2, site);
  memcpy((void*)p, &v, sizeof v);
}
template <class T>
inline T __ldg(const T* p, uint32_t s = ON_CPU_SITE) {
  return gld(p, s);
}
template <class T>
inline T __ldcg(const T* p, uint32_t s = ON_CPU_SITE) {
  return gld(p, s);
}
template <class T>
inline T __ldcs(const T* p, uint32_t s = ON_CPU_SITE) {
  return gld(p, s);
}
template <class T>
inline void __stcs(T* p, T v, uint32_t s = ON_CPU_SITE) {
  gst(p, v, s);
}

// ---- device maths (host libm: last-bit differences from the GPU's approximate units are expected)
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float exp2f_approx(float x) { return exp2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __log2f(float x) { return log2f(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline double rsqrt(double a) { return 1. / sqrt(a); }
inline float rsqrtf(float a) { return 1.f / sqrtf(a); }
inline double __longlong_as_double(long long i) {
  double f;
  memcpy(&f, &i, 8);
  return f;
}
inline long long __double_as_longlong(double f) {
  long long i;
  memcpy(&i, &f, 8);
  return i;
}
inline float __int_as_float(int i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
inline int __float_as_int(float f) {
  int i;
  memcpy(&i, &f, 4);
  return i;
}
inline float __uint_as_float(unsigned i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned i;
  memcpy(&i, &f, 4);
  return i;
}
using std::max;
using std::min;
