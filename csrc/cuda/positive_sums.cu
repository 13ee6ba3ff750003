// Stage (ii): for each class, the sums of softplus(log Z_k - S_ki) and of its derivative over its own pixels, (4) and (7).
// Reads 4 bytes of S, the label and the weight of each pixel; writes two K-vectors per block, then merges them.
#include "device.h"
#include "finish.cuh"
#include "math.cuh"
#include "pixels.cuh"

namespace proac::cuda {

constexpr int kSumThreads = 256;

struct PositiveSumsKernel {
  PositiveSums a;
  void* partial;  // C (blocks, 2, K)
};

template <class C>
__global__ void __launch_bounds__(kSumThreads, 1) positive_sums_kernel(PositiveSumsKernel job) {
  SHARED(int[kSumThreads], label);
  SHARED(C[kSumThreads], loss);
  SHARED(C[kSumThreads], slope);
  const PositiveSums& a = job.a;
  int num_classes = static_cast<int>(a.pixels.num_classes);
  const C* statistics = static_cast<const C*>(a.statistics);
  C* partial = static_cast<C*>(job.partial) + static_cast<int64_t>(blockIdx.x) * 2 * num_classes;
  for (int k = threadIdx.x; k < 2 * num_classes; k += kSumThreads) partial[k] = C(0);
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * kSumThreads; base < a.pixels.count;
       base += static_cast<int64_t>(gridDim.x) * kSumThreads) {
    int64_t i = base + threadIdx.x;
    Pixel<C> pixel = {-1, C(0), false, false};
    if (i < a.pixels.count) pixel = read_pixel<C>(a.pixels, i);
    int k = pixel.label;
    SYNC_THREADS(terms_are_free);
    label[threadIdx.x] = k;
    if (k >= 0) {
      C log_z = statistics[kLogZ * num_classes + k], weight = statistics[kNegW * num_classes + k];
      if (a.negative_mean && weight > C(0)) log_z -= log(weight);
      C margin = log_z - static_cast<const C*>(a.positive)[i];
      loss[threadIdx.x] = pixel.weight * softplus(margin);
      slope[threadIdx.x] = pixel.weight * sigmoid(margin);
    }
    SYNC_THREADS(terms_are_written);
    add_by_class<2, C>(kSumThreads, label, {loss, slope}, {partial, partial + num_classes});
  }
}

static int blocks_of(const PositiveSums& a) {
  return static_cast<int>(
      few_blocks((a.pixels.count + kSumThreads - 1) / kSumThreads, a.pixels.num_classes > 512 ? 64 : 512));
}

size_t workspace_bytes(const PositiveSums& a) {
  return static_cast<size_t>(blocks_of(a)) * 2 * a.pixels.num_classes * (a.compute == Type::float64 ? 8 : 4);
}

cudaError_t run(const PositiveSums& a, cudaStream_t stream) {
  int blocks = blocks_of(a);
  PositiveSumsKernel job = {a, a.workspace};
  cudaError_t error = launch(a.compute == Type::float64 ? positive_sums_kernel<double> : positive_sums_kernel<float>,
                             blocks, kSumThreads, 0, stream, job);
  if (error != cudaSuccess) return error;
  return merge_sums({a.workspace, blocks, 2 * a.pixels.num_classes, a.sums}, a.compute, stream);
}

}  // namespace proac::cuda
