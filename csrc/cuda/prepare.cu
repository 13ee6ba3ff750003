#include "prepare.cuh"

#include "math.cuh"
#include "split.cuh"

namespace proac::cuda {

constexpr int kPrepareThreads = 128;

// The log Z_k that the loss has: for the mean over negatives, less log sum_{N_k} w_j.
template <class C>
__device__ C contrast_log_z(const C* statistics, int num_classes, int k, bool negative_mean) {
  C log_z = statistics[kLogZ * num_classes + k], weight = statistics[kNegW * num_classes + k];
  return negative_mean && weight > C(0) ? log_z - log(weight) : log_z;
}

// The power of two that takes `bound` to 2^59 or more, and below 2^60. `bound` is what sum_i |dL/dS_ki| / tau cannot exceed:
// by (7) and (8) the positives' terms sum to A_k T_k / tau, and so do the negatives', whose shares of Z_k sum to 1. The twin's
// sum to alpha / tau times the mean of 1 - softmax, which its own loss, -log softmax, is never below but by rounding.
template <class C>
__device__ C sum_scale(C bound) {
  constexpr int kLargest = sizeof(C) == 4 ? 126 : 1000;
  int exponent = 0;
  if (bound > C(0) && !isinf(bound)) frexp(bound, &exponent);
  return ldexp(C(1), 60 - exponent < kLargest ? 60 - exponent : kLargest);
}

// (7): A_k and what follows from it.
template <class C>
__device__ void write_factors(const Prepare& a, C* scratch) {
  const C* statistics = static_cast<const C*>(a.statistics);
  const C* class_weight = static_cast<const C*>(a.class_weight);
  const C* weight = statistics + kW * a.num_classes;
  C sum_class_weight = C(0), sum_weight = C(0), pixel_loss = C(0);
  for (int k = threadIdx.x; k < a.num_classes; k += kPrepareThreads) {
    sum_weight += weight[k], pixel_loss += statistics[kPixelLoss * a.num_classes + k];
    if (weight[k] > C(0)) sum_class_weight += class_weight ? class_weight[k] : C(1);
  }
  sum_class_weight = block_sum(sum_class_weight, scratch);
  SYNC_THREADS(class_weights_are_read);
  sum_weight = block_sum(sum_weight, scratch);
  SYNC_THREADS(weights_are_read);
  pixel_loss = block_sum(pixel_loss, scratch);
  C* out = static_cast<C*>(a.factors);
  C inverse_tau = static_cast<C>(1.0 / a.temperature);
  C twin_share = pixel_loss / sum_weight + C(64) * static_cast<C>(sizeof(C) == 4 ? 0x1p-23 : 0x1p-52) * inverse_tau;
  if (!(twin_share < C(1))) twin_share = C(1);
  for (int k = threadIdx.x; k < a.num_classes; k += kPrepareThreads) {
    C grad = static_cast<const C*>(a.grad_loss)[k * a.grad_loss_stride];
    C upstream = weight[k] > C(0) ? grad : C(0);
    if (class_weight) upstream *= class_weight[k];
    if (a.reduction == kMean) upstream = sum_class_weight == C(0) ? C(0) : upstream / sum_class_weight;
    C positive = weight[k] == C(0) ? C(0) : upstream / weight[k] * inverse_tau;
    out[kPositiveFactor * a.num_classes + k] = positive;
    C negative = positive * static_cast<const C*>(a.positive_sums)[a.num_classes + k];
    out[kNegativeFactor * a.num_classes + k] = negative;
    out[kFactorLogZ * a.num_classes + k] = statistics[kLogZ * a.num_classes + k];
    out[kContrast * a.num_classes + k] = contrast_log_z(statistics, a.num_classes, k, a.negative_mean);
    C pixels = sum_weight == C(0) ? C(0) : static_cast<C>(a.pixel_anchor_weight) * grad * inverse_tau;
    out[kPixelFactor * a.num_classes + k] = sum_weight == C(0) ? C(0) : pixels / sum_weight;
    out[kSumScale * a.num_classes + k] =
        sum_scale(C(2) * (static_cast<C>(fabs(negative)) + static_cast<C>(fabs(pixels)) * twin_share));
  }
}

// Block r normalises prototype r; the last block writes the factors.
template <class T>
__global__ void __launch_bounds__(kPrepareThreads) prepare_kernel(Prepare a) {
  using C = Compute<T>;
  SHARED(C[32], scratch);
  int row = blockIdx.x, rows = a.num_classes > a.split_rows ? a.num_classes : a.split_rows;
  if (row == rows) {
    write_factors<C>(a, scratch);
    return;
  }
  if (row == 0)
#pragma unroll
    for (const Counters& counters : a.counters)
      for (int i = threadIdx.x; i < counters.count; i += kPrepareThreads) counters.word[i] = 0;
  bool real = row < a.num_classes;
  const C* p = static_cast<const C*>(a.prototypes) + static_cast<int64_t>(row) * a.channels;
  // squares of what is left after division by the largest neither overflow nor underflow
  C largest = C(0);
  if (real)
    for (int d = threadIdx.x; d < a.channels; d += kPrepareThreads)
      largest = larger(largest, static_cast<C>(fabs(p[d])));
  for (int o = 16; o; o >>= 1) largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, o));
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = largest;
  SYNC_THREADS(maxima_are_written);
  for (int w = 0; w < kPrepareThreads / 32; ++w) largest = larger(largest, scratch[w]);
  SYNC_THREADS(maxima_are_read);
  if (largest == C(0)) largest = C(1);
  C sum = C(0);
  if (real)
    for (int d = threadIdx.x; d < a.channels; d += kPrepareThreads) sum += p[d] / largest * (p[d] / largest);
  C norm = largest * sqrt(block_sum(sum, scratch));
  if (isinf(norm)) norm = static_cast<C>(not_a_number());
  auto unit = [&](int d) { return !real || d >= a.channels || norm <= static_cast<C>(kEps) ? C(0) : p[d] / norm; };
  if (a.unit && real)
    for (int d = threadIdx.x; d < a.channels; d += kPrepareThreads)
      static_cast<C*>(a.unit)[static_cast<int64_t>(row) * a.channels + d] = unit(d);
  if (a.norm && real && threadIdx.x == 0) static_cast<C*>(a.norm)[row] = norm;
  if (a.sums.sum && real) {
    for (int d = threadIdx.x; d < a.channels; d += kPrepareThreads)
      a.sums.sum[static_cast<int64_t>(row) * a.channels + d] = 0;
    if (threadIdx.x == 0) a.sums.bad[row] = 0;
  }
  if constexpr (sizeof(C) == 4) {
    if (a.split && row < a.split_rows) {
      for (int d = threadIdx.x; d < a.split_channels; d += kPrepareThreads) {
        T* high = static_cast<T*>(a.split) + PrototypeBlock<T>::offset(a.split_rows / 8, row, d);
        float x = unit(d) * Split<T>::kScale;
        *high = Split<T>::round(x);
        if (Split<T>::kParts == 2) high[PrototypeBlock<T>::kLow] = Split<T>::round(x - widen<float>(*high));
      }
    }
  }
}

template <class T>
static cudaError_t prepare_as(const Prepare& a, cudaStream_t stream) {
  int rows = a.num_classes > a.split_rows ? a.num_classes : a.split_rows;
  return launch(prepare_kernel<T>, rows + (a.factors ? 1 : 0), kPrepareThreads, 0, stream, a);
}

cudaError_t prepare(const Prepare& a, Type type, cudaStream_t stream) {
  switch (type) {
    case Type::float16:
      return prepare_as<__half>(a, stream);
    case Type::bfloat16:
      return prepare_as<__nv_bfloat16>(a, stream);
    case Type::float32:
      return prepare_as<float>(a, stream);
    default:
      return prepare_as<double>(a, stream);
  }
}

}  // namespace proac::cuda
