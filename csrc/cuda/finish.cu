#include "finish.cuh"

#include "math.cuh"
#include "pixels.cuh"

namespace proac::cuda {

constexpr int kColumns = 32, kLanes = 16;  // a merging block: 32 classes side by side, 16 threads for each

// Reduces one value per thread over the kLanes threads of a column, in a fixed order; the result stands in lane 0.
template <class V, class Combine>
__device__ V reduce_columns(V v, V* scratch, Combine combine) {
  int column = threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  SYNC_THREADS(columns_are_free);
  scratch[lane * kColumns + column] = v;
  SYNC_THREADS(columns_are_written);
  if (lane == 0)
    for (int other = 1; other < kLanes; ++other) v = combine(v, scratch[other * kColumns + column]);
  return v;
}

template <class C>
__device__ void merge_diagnostics(const MergeStatistics& a) {
  SHARED(Diagnostics, total);
  if (threadIdx.x == 0) clear(total);
  SYNC_THREADS(diagnostics_are_clear);
  const Diagnostics* partial = static_cast<const Diagnostics*>(a.diagnostics);
  for (int b = threadIdx.x; b < a.blocks; b += kColumns * kLanes) {
    atomicAdd(&total.labels, partial[b].labels);
    atomicMin(&total.first_label, partial[b].first_label);
    atomicAdd(&total.weights, partial[b].weights);
    atomicMin(&total.first_weight, partial[b].first_weight);
  }
  SYNC_THREADS(diagnostics_are_counted);
  if (threadIdx.x) return;
  a.first_values[0] = static_cast<int64_t>(total.labels);
  a.first_values[2] = static_cast<int64_t>(total.weights);
  a.first_values[1] = a.first_values[3] = 0;
  if (total.labels)
    a.first_values[1] = read_label(a.pixels, place_of(a.pixels, static_cast<int64_t>(total.first_label)).label);
  if (total.weights) {
    Place place = place_of(a.pixels, static_cast<int64_t>(total.first_weight));
    a.first_values[3] = __double_as_longlong(static_cast<double>(static_cast<const C*>(a.pixels.weight)[place.weight]));
  }
}

// Blocks take 32 classes each; the last one the diagnostics.
template <class C>
__global__ void __launch_bounds__(kColumns* kLanes, 1) merge_statistics_kernel(MergeStatistics a) {
  SHARED(LogSum<C>[kColumns * kLanes], pairs);
  SHARED(C[kColumns * kLanes], single);
  if (blockIdx.x == gridDim.x - 1) {
    merge_diagnostics<C>(a);
    return;
  }
  int k = blockIdx.x * kColumns + threadIdx.x % kColumns, lane = threadIdx.x / kColumns;
  bool real = k < a.num_classes;
  LogSum<C> log_z = empty_sum<C>();
  C sums[4] = {C(0), C(0), C(0), C(0)}, hardest = static_cast<C>(minus_infinity());
  const C* partial = static_cast<const C*>(a.partial) + k;
#pragma unroll 4
  for (int b = lane; real && b < a.blocks; b += kLanes) {
    const C* row = partial + static_cast<int64_t>(b) * kPartialRows * a.num_classes;
    log_z = merge(log_z, LogSum<C>{row[kMaximum * a.num_classes], row[kExpSum * a.num_classes]});
    for (int r = 0; r < 4; ++r) sums[r] += row[(kWeight + r) * a.num_classes];
    hardest = larger(hardest, row[kHardest * a.num_classes]);
  }
  log_z = reduce_columns(log_z, pairs, [](LogSum<C> x, LogSum<C> y) { return merge(x, y); });
  for (int r = 0; r < 4; ++r) sums[r] = reduce_columns(sums[r], single, [](C x, C y) { return x + y; });
  hardest = reduce_columns(hardest, single, [](C x, C y) { return larger(x, y); });
  if (lane || !real) return;
  C* out = static_cast<C*>(a.statistics) + k;
  out[kLogZ * a.num_classes] = value(log_z);
  for (int r = 0; r < 4; ++r) out[(kW + r) * a.num_classes] = sums[r];
  out[kHardestNegative * a.num_classes] = hardest;
}

template <class C>
__global__ void __launch_bounds__(kColumns* kLanes, 1) merge_sums_kernel(MergeSums a) {
  SHARED(C[kColumns * kLanes], single);
  int64_t i = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  C sum = C(0);
#pragma unroll 4
  for (int b = threadIdx.x / kColumns; i < a.size && b < a.blocks; b += kLanes)
    sum += static_cast<const C*>(a.partial)[b * a.size + i];
  sum = reduce_columns(sum, single, [](C x, C y) { return x + y; });
  if (threadIdx.x / kColumns == 0 && i < a.size) static_cast<C*>(a.out)[i] = sum;
}

// (11) with the roles exchanged: one block per prototype.
template <class C>
__global__ void __launch_bounds__(128) finish_prototypes_kernel(FinishPrototypes a) {
  SHARED(C[32], scratch);
  int64_t row = static_cast<int64_t>(blockIdx.x) * a.channels;
  const C* unit = static_cast<const C*>(a.unit) + row;
  C* grad = static_cast<C*>(a.grad) + row;
  C scale = static_cast<const C*>(a.factors)[kSumScale * a.num_classes + blockIdx.x], dot = C(0);
  if (a.sums.bad[blockIdx.x]) scale = static_cast<C>(not_a_number());
  for (int d = threadIdx.x; d < a.channels; d += blockDim.x) {
    grad[d] = static_cast<C>(static_cast<long long>(a.sums.sum[row + d])) / scale;
    dot += grad[d] * unit[d];
  }
  dot = block_sum(dot, scratch);
  C norm = static_cast<const C*>(a.norm)[blockIdx.x];
  for (int d = threadIdx.x; d < a.channels; d += blockDim.x)
    grad[d] = norm <= static_cast<C>(kEps) || a.channels == 1 ? C(0) : (grad[d] - dot * unit[d]) / norm;
}

// (4) and (6); one block.
template <class C>
__global__ void __launch_bounds__(128) reduce_loss_kernel(ReduceLoss a) {
  SHARED(C[4][32], scratch);
  const C* statistics = static_cast<const C*>(a.statistics);
  const C* class_weight = static_cast<const C*>(a.class_weight);
  int n = static_cast<int>(a.num_classes);
  C loss = C(0), present = C(0), pixel_loss = C(0), all_weight = C(0);
  for (int k = threadIdx.x; k < n; k += blockDim.x) {
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

static bool is_double(Type type) { return type == Type::float64; }

cudaError_t merge_statistics(const MergeStatistics& a, Type type, cudaStream_t stream) {
  int blocks = (a.num_classes + kColumns - 1) / kColumns + 1;
  return launch(is_double(type) ? merge_statistics_kernel<double> : merge_statistics_kernel<float>, blocks,
                kColumns * kLanes, 0, stream, a);
}
cudaError_t merge_sums(const MergeSums& a, Type type, cudaStream_t stream) {
  int64_t blocks = (a.size + kColumns - 1) / kColumns;
  return launch(is_double(type) ? merge_sums_kernel<double> : merge_sums_kernel<float>, blocks, kColumns * kLanes, 0,
                stream, a);
}
cudaError_t finish_prototypes(const FinishPrototypes& a, Type type, cudaStream_t stream) {
  return launch(is_double(type) ? finish_prototypes_kernel<double> : finish_prototypes_kernel<float>, a.num_classes,
                128, 0, stream, a);
}
cudaError_t run(const ReduceLoss& a, cudaStream_t stream) {
  return launch(is_double(a.compute) ? reduce_loss_kernel<double> : reduce_loss_kernel<float>, 1, 128, 0, stream, a);
}

}  // namespace proac::cuda
