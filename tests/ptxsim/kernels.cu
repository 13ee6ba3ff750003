// Small kernels for the tests of the interpreter. Each computes something known, by one of the means that GPU kernels use:
// vector loads, calls, constants, atomics, votes and named barriers, shuffles, tensor cores, asynchronous copies, a barrier
// of the grid. `removed` leaves out the barrier or wait of that number, which the interpreter must find.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_pipeline.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

__constant__ float table[4] = {1.f, 2.f, 3.f, 4.f};
__device__ unsigned total = 7;

struct Config {
  int count;
  float scale[3];
};

__device__ __noinline__ float helper(float x, int i) { return i & 1 ? x * table[i & 3] : x - 1.f; }

__device__ __noinline__ float2 pair(float x) { return make_float2(helper(x, 1), helper(x, 2)); }

namespace language {
template <class T>
__global__ void features(const T* x, T* y, Config config) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float local[8];
  for (int j = 0; j < 8; ++j) local[j] = j * config.scale[j % 3];
  if (i < config.count) {
    float2 p = pair(x[i]);
    y[i] = p.x + p.y + helper(x[i], i) + local[(i * 5) & 7];
    atomicAdd(&total, 1u);
  }
}
template __global__ void features<float>(const float*, float*, Config);
}  // namespace language

extern "C" __global__ void asserts(int count) {
  assert(static_cast<int>(threadIdx.x) < count);
  if (threadIdx.x == 3) printf("hello %d %.2f %s\n", count, 1.5, "x");
}

extern "C" __global__ void traps(int count) {
  if (static_cast<int>(threadIdx.x) >= count) __trap();
}

extern "C" __global__ void votes(int* out) {
  int t = threadIdx.x;
  out[t] = __syncthreads_count(t % 3 == 0) * 4 + __syncthreads_or(t == 5) * 2 + __syncthreads_and(t < 40);
  if (t < 32) {
    asm volatile("bar.arrive 1, 64;");
  } else {
    asm volatile("bar.sync 1, 64;");
    out[t] += 1000;
  }
}

extern "C" __global__ void atomics(float* f, double* d, unsigned* u, unsigned long long* q, int* s) {
  __shared__ unsigned histogram[16];
  int t = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x < 16) histogram[threadIdx.x] = 0;
  __syncthreads();
  atomicAdd(&histogram[t & 15], 1u);
  atomicAdd(f, 0.5f);
  atomicAdd(d, 0.25);
  atomicMax(u, static_cast<unsigned>(t));
  atomicMin(s, -t);
  atomicXor(u + 1, 1u << (t & 31));
  atomicOr(u + 2, 1u << (t & 31));
  atomicAdd(q, 1ull << 33);
  unsigned old = atomicAdd(u + 3, 2u);
  atomicMax(u + 4, old);
  atomicCAS(u + 5, 0u, 9u);
  atomicExch(u + 6, 5u);
  atomicInc(u + 7, 6u);
  __syncthreads();
  if (threadIdx.x < 16) atomicAdd(u + 8, histogram[threadIdx.x]);
}

extern "C" __global__ void reversed(float* y, int removed) {
  __shared__ float shared[64];
  shared[threadIdx.x] = threadIdx.x;
  if (removed != 1) __syncthreads();
  y[threadIdx.x] = shared[63 - threadIdx.x];
}

// 16-byte loads and stores, and a tail.
extern "C" __global__ void add(const float* a, const float* b, float* c, int count) {
  int i = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  if (i + 3 < count) {
    float4 x = *reinterpret_cast<const float4*>(a + i), y = *reinterpret_cast<const float4*>(b + i);
    *reinterpret_cast<float4*>(c + i) = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  } else {
    for (; i < count; ++i) c[i] = a[i] + b[i];
  }
}

// Shuffles in warps, shared memory between warps, atomics between blocks.
extern "C" __global__ void sum(const float* x, float* out, int count, int removed) {
  __shared__ float of_warp[32];
  float value = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) value += x[i];
  for (int offset = 16; offset; offset >>= 1) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if (removed != 1) __syncthreads();
  if (threadIdx.x < 32) {
    value = threadIdx.x < blockDim.x / 32 ? of_warp[threadIdx.x] : 0.f;
    for (int offset = 16; offset; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x == 0) atomicAdd(out, value);
  }
}

// One warp: A @ B for 16 x 16 bfloat16, row-major. Rows of 48 bytes in shared memory: ldmatrix has no bank conflicts.
extern "C" __global__ void product(const __nv_bfloat16* A, const __nv_bfloat16* B, float* out, int removed) {
  __shared__ __align__(128) __nv_bfloat16 a_tile[16][24], b_tile[16][24];
  int t = threadIdx.x, row = t / 2, half = t % 2 * 8;
  *reinterpret_cast<uint4*>(&a_tile[row][half]) = *reinterpret_cast<const uint4*>(A + row * 16 + half);
  *reinterpret_cast<uint4*>(&b_tile[row][half]) = *reinterpret_cast<const uint4*>(B + row * 16 + half);
  if (removed != 1) __syncwarp();
  uint32_t a[4], b[4];
  uint32_t a_address = __cvta_generic_to_shared(&a_tile[t % 16][t / 16 * 8]);
  uint32_t b_address = __cvta_generic_to_shared(&b_tile[t % 16][t / 16 * 8]);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(a_address)
               : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
               : "r"(b_address)
               : "memory");
  for (int half_columns = 0; half_columns < 2; ++half_columns) {
    float d[4] = {0, 0, 0, 0};
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * half_columns]), "r"(b[2 * half_columns + 1]));
    float* to = out + t / 4 * 16 + half_columns * 8 + t % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(d[0], d[1]);
    *reinterpret_cast<float2*>(to + 8 * 16) = make_float2(d[2], d[3]);
  }
}

// cp.async into two buffers in turn; each tile is stored reversed, so that threads read each other's bytes.
extern "C" __global__ void copy_reversed(const float4* in, float4* out, int tiles, int removed) {
  extern __shared__ __align__(128) float4 buffer[];
  int size = blockDim.x, t = threadIdx.x;
  in += static_cast<size_t>(blockIdx.x) * tiles * size;
  out += static_cast<size_t>(blockIdx.x) * tiles * size;
  __pipeline_memcpy_async(&buffer[t], &in[t], 16);
  __pipeline_commit();
  for (int k = 0; k < tiles; ++k) {
    if (k + 1 < tiles) __pipeline_memcpy_async(&buffer[(k + 1) % 2 * size + t], &in[(k + 1) * size + t], 16);
    __pipeline_commit();
    if (removed != 1) __pipeline_wait_prior(1);
    if (removed != 2) __syncthreads();
    out[k * size + t] = buffer[k % 2 * size + size - 1 - t];
    if (removed != 3) __syncthreads();  // before this buffer is filled again
  }
}

// Every block publishes its sum, then reads those of all blocks.
extern "C" __global__ void divide_by_sum(const float* x, float* partial, float* y, int count, int removed) {
  __shared__ float shared[256];
  float value = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) value += x[i];
  shared[threadIdx.x] = value;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half >>= 1) {
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    if (removed != 2) __syncthreads();
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = shared[0];
  if (removed != 1) cooperative_groups::this_grid().sync();
  float all = 0.f;
  for (int block = 0; block < gridDim.x; ++block) all += __ldcg(partial + block);
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) y[i] = x[i] / all;
}

// The last block adds up what all of them left.
extern "C" __global__ void last_block(const float* x, float* partial, float* out, unsigned* arrivals, int removed) {
  __shared__ bool last;
  int t = threadIdx.x, size = blockDim.x;
  partial[blockIdx.x * size + t] = x[blockIdx.x * size + t];
  if (removed != 1) __syncthreads();
  if (t == 0) {
    if (removed != 2) __threadfence();
    last = atomicAdd(arrivals, 1u) == gridDim.x - 1;
    if (removed != 3) __threadfence();
  }
  if (removed != 4) __syncthreads();
  if (!last) return;
  float sum = 0.f;
  for (int b = 0; b < static_cast<int>(gridDim.x); ++b) sum += partial[b * size + size - 1 - t];
  out[size - 1 - t] = sum;
}
