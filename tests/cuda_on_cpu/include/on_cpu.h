// Runs CUDA C++ kernels on a CPU, as ordinary C++17: no GPU, no CUDA toolkit. Stand-ins for the CUDA names that the kernels
// of csrc/cuda use; on_cpu.cc says how threads, barriers and shared memory are stood in for.
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
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Shared memory of the block that runs. A variable is known by its place in the source.
#define SHARED(T, name)                  \
  static const char name##_variable = 0; \
  on_cpu::Same<T>& name =                \
      *static_cast<on_cpu::Same<T>*>(on_cpu::static_shared(&name##_variable, sizeof(on_cpu::Same<T>)))
#define DYNAMIC_SHARED(name) char* name = static_cast<char*>(on_cpu::dynamic_shared())

// ---- vectors, aligned as CUDA's
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace on_cpu {

template <class T>
using Same = T;  // T may be an array type, which cannot stand before a & itself

enum Order { kAscending, kDescending, kRandom };

struct Options {
  int order = kRandom;  // of the blocks, and of the threads that are ready, by number
  uint64_t seed = 1;    // of the random order
  int mutant = 0;       // the marked barrier or wait that is left out
  int multiprocessors = 132;
  size_t shared_limit = 227 << 10;  // bytes that a block may have
};
Options& options();

// The thread that runs.
struct Thread {
  uint3 index, block;
  int lane;
};
extern Thread* current;
extern uint3 block_size, grid_size;

// Ends the launch with this text, and the thread's place; formatted as printf does.
[[noreturn]] void fail(const char* format, ...);

// All threads of the block meet; `what` names the place in errors.
void barrier(const char* what);

// All lanes of the mask meet. The last to arrive calls `combine` with every lane's input and output, by lane.
using Combine = void (*)(uint32_t mask, const void* const* in, void* const* out);
void collective(uint32_t mask, const char* what, const void* in, void* out, Combine combine);

void* dynamic_shared();
void* static_shared(const void* variable, size_t bytes);

// cp.async of `bytes`, the last `zeros` of which are not read but zero.
void copy_async(void* to, const void* from, int bytes, int zeros);
void commit_copies();
void wait_for_copies(int pending);

// Runs `body` as every thread of every block. Kernel and arguments are kept for tests that run the same launch elsewhere.
void launch(void* kernel, unsigned blocks, int threads, size_t shared, const void* arguments, size_t argument_bytes,
            const std::function<void()>& body);
struct Launch {
  void* kernel;
  unsigned blocks;
  int threads;
  size_t shared;
  std::string arguments;
};
std::vector<Launch>& launches();

// Bytes of dynamic shared memory that each kernel may have, as cudaFuncSetAttribute set them.
std::map<const void*, int>& dynamic_shared_limits();

template <class T>
void aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(T))
    fail("misaligned %zu-byte access at %p", sizeof(T), static_cast<const void*>(p));
}

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

inline bool has(uint32_t mask, int lane) { return mask >> lane & 1; }

template <class T>
struct Shuffle {
  T value;
  int source;
};

// Each lane's value from the lane that it names.
template <class T>
T shuffle(uint32_t mask, T value, int source, const char* what) {
  static_assert(sizeof(T) <= 8, "a word or two");
  Shuffle<T> mine{value, source};
  T result = value;
  collective(mask, what, &mine, &result, [](uint32_t mask, const void* const* in, void* const* out) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!has(mask, lane)) continue;
      int source = static_cast<const Shuffle<T>*>(in[lane])->source;
      if (!has(mask, source)) fail("shuffle: lane %d reads lane %d, which is not in mask %08x", lane, source, mask);
      *static_cast<T*>(out[lane]) = static_cast<const Shuffle<T>*>(in[source])->value;
    }
  });
  return result;
}

}  // namespace on_cpu

#define threadIdx (on_cpu::current->index)
#define blockIdx (on_cpu::current->block)
#define blockDim (on_cpu::block_size)
#define gridDim (on_cpu::grid_size)

// ---- barriers
inline void __syncthreads() { on_cpu::barrier("__syncthreads"); }
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
  int nothing = 0;
  on_cpu::collective(mask, "__syncwarp", &nothing, &nothing, [](uint32_t, const void* const*, void* const*) {});
}

// ---- shuffles: a lane beyond its segment of `width` lanes keeps its own value
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  int first = on_cpu::current->lane & ~(width - 1);
  return on_cpu::shuffle(mask, value, first + (source & (width - 1)), "__shfl_sync");
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32) {
  int lane = on_cpu::current->lane, source = lane ^ bits;
  bool beyond = (source & ~(width - 1)) > (lane & ~(width - 1));
  return on_cpu::shuffle(mask, value, beyond ? lane : source, "__shfl_xor_sync");
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned distance, int width = 32) {
  int lane = on_cpu::current->lane, by = static_cast<int>(distance);
  bool beyond = (lane & (width - 1)) < by;
  return on_cpu::shuffle(mask, value, beyond ? lane : lane - by, "__shfl_up_sync");
}

// ---- votes
inline unsigned __ballot_sync(uint32_t mask, int vote) {
  unsigned votes = 0;
  on_cpu::collective(mask, "__ballot_sync", &vote, &votes, [](uint32_t mask, const void* const* in, void* const* out) {
    unsigned votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (on_cpu::has(mask, lane) && *static_cast<const int*>(in[lane])) votes |= 1u << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (on_cpu::has(mask, lane)) *static_cast<unsigned*>(out[lane]) = votes;
  });
  return votes;
}
inline int __any_sync(uint32_t mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(uint32_t mask, int vote) { return __ballot_sync(mask, vote) == mask; }

// ---- atomics: threads switch only where they wait, so plain operations are whole
template <class T>
T atomicAdd(T* p, typename std::common_type<T>::type value) {
  T old = *p;
  *p = old + value;
  return old;
}
template <class T>
T atomicMin(T* p, typename std::common_type<T>::type value) {
  T old = *p;
  *p = std::min(old, value);
  return old;
}
template <class T>
T atomicMax(T* p, typename std::common_type<T>::type value) {
  T old = *p;
  *p = std::max(old, value);
  return old;
}

// ---- arithmetic
using std::max;
using std::min;
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __int_as_float(int x) { return on_cpu::bits_as<float>(x); }
inline int __float_as_int(float x) { return on_cpu::bits_as<int>(x); }
inline float __uint_as_float(unsigned x) { return on_cpu::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return on_cpu::bits_as<unsigned>(x); }
inline double __longlong_as_double(long long x) { return on_cpu::bits_as<double>(x); }
inline long long __double_as_longlong(double x) { return on_cpu::bits_as<long long>(x); }
