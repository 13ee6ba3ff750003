// Stage (ii): for each class, the sums of softplus(log Z_k - S_ki) and of its derivative over its own pixels, (4) and (7); and the
// loss of them, (6). Reads 4 bytes of S, the label and the weight of each pixel; writes two K-vectors per block, which the last
// block merges.
#include "positive_sums.cuh"

#include "device.h"
#include "merge.cuh"

namespace proac::cuda {

constexpr int kSumThreads = 256;

struct PositiveSumsKernel {
  PositiveSums a;
  void* partial;  // C (blocks, 2, K)
  unsigned* counters;
  ReduceLoss loss;  // its `loss` null where not wanted
};

// (4) and (6), by one block of kSumThreads.
template <class C>
__device__ void loss_of_sums(const ReduceLoss& a, C (&scratch)[4][32]) {
  const C* statistics = static_cast<const C*>(a.statistics);
  const C* class_weight = static_cast<const C*>(a.class_weight);
  int n = static_cast<int>(a.num_classes);
  C loss = C(0), present = C(0), pixel_loss = C(0), all_weight = C(0);
  for (int k = threadIdx.x; k < n; k += kSumThreads) {
    C weight = statistics[kW * n + k], c = class_weight ? class_weight[k] : C(1);
    C value = weight == C(0) ? C(0) : static_cast<const C*>(a.sums)[k] / weight;
    if (class_weight) value *= c;
    if (a.reduction == kNone) static_cast<C*>(a.loss)[k] = value;
    loss += value;
    if (weight > C(0)) present += c;
    pixel_loss += statistics[kPixelLoss * n + k];
    all_weight += weight;
  }
  if (a.reduction == kNone) return;
  loss = block_sum(loss, scratch[0]);
  present = block_sum(present, scratch[1]);
  pixel_loss = block_sum(pixel_loss, scratch[2]);
  all_weight = block_sum(all_weight, scratch[3]);
  if (threadIdx.x) return;
  if (a.reduction == kMean) loss = present == C(0) ? C(0) : loss / present;
  if (a.pixel_anchor_weight != 0)
    loss += static_cast<C>(a.pixel_anchor_weight) * (all_weight == C(0) ? C(0) : pixel_loss / all_weight);
  *static_cast<C*>(a.loss) = loss;
}

template <class C>
__global__ void __launch_bounds__(kSumThreads, 1) positive_sums_kernel(PositiveSumsKernel job) {
  SHARED(int[kSumThreads], label);
  SHARED(C[kSumThreads], loss);
  SHARED(C[kSumThreads], slope);
  SHARED(C[4][32], scratch);
  SHARED(int, last);
  const PositiveSums& a = job.a;
  int num_classes = static_cast<int>(a.pixels.num_classes), size = 2 * num_classes;
  const C* statistics = static_cast<const C*>(a.statistics);
  C* partial = static_cast<C*>(job.partial) + static_cast<int64_t>(blockIdx.x) * size;
  for (int i = threadIdx.x; i < size; i += kSumThreads) partial[i] = C(0);
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
  bool done = merge_blocks(job.counters, &last, [&](int first, int step, int count, bool whole) {
    C* rows = static_cast<C*>(job.partial) + static_cast<int64_t>(first) * size;
    for (int i = threadIdx.x; i < size; i += kSumThreads)
      (whole ? static_cast<C*>(a.sums) : rows)[i] = sum_rows(rows + i, static_cast<int64_t>(step) * size, count);
  });
  if (done && job.loss.loss) loss_of_sums(job.loss, scratch);  // each thread reads the sums that it wrote
}

template <class C>
__global__ void __launch_bounds__(kSumThreads) reduce_loss_kernel(ReduceLoss a) {
  SHARED(C[4][32], scratch);
  loss_of_sums(a, scratch);
}

__global__ void __launch_bounds__(64) clear_counters_kernel(Counters counters) {
  for (int i = threadIdx.x; i < counters.count; i += blockDim.x) counters.word[i] = 0;
}

static int blocks_of(const PositiveSums& a) {
  return static_cast<int>(
      few_blocks((a.pixels.count + kSumThreads - 1) / kSumThreads, a.pixels.num_classes > 512 ? 64 : 512));
}
static size_t partial_bytes(const PositiveSums& a) {
  return static_cast<size_t>(blocks_of(a)) * 2 * a.pixels.num_classes * (a.compute == Type::float64 ? 8 : 4);
}

size_t workspace_bytes(const PositiveSums& a) { return partial_bytes(a) + merge_counters(blocks_of(a)) * 4; }

Counters counters_of(const PositiveSums& a) {
  return {reinterpret_cast<unsigned*>(static_cast<char*>(a.workspace) + partial_bytes(a)),
          merge_counters(blocks_of(a))};
}

cudaError_t positive_sums(const PositiveSums& a, const ReduceLoss* loss, cudaStream_t stream) {
  PositiveSumsKernel job = {a, a.workspace, counters_of(a).word, loss ? *loss : ReduceLoss{}};
  return launch(a.compute == Type::float64 ? positive_sums_kernel<double> : positive_sums_kernel<float>, blocks_of(a),
                kSumThreads, 0, stream, job);
}

cudaError_t run(const PositiveSums& a, cudaStream_t stream) {
  cudaError_t error = launch(clear_counters_kernel, 1, 64, 0, stream, counters_of(a));
  return error != cudaSuccess ? error : positive_sums(a, nullptr, stream);
}

cudaError_t run(const ReduceLoss& a, cudaStream_t stream) {
  return launch(a.compute == Type::float64 ? reduce_loss_kernel<double> : reduce_loss_kernel<float>, 1, kSumThreads, 0,
                stream, a);
}

}  // namespace proac::cuda
