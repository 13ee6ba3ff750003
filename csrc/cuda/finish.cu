#include "finish.cuh"

#include "math.cuh"

namespace proac::cuda {

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

cudaError_t finish_prototypes(const FinishPrototypes& a, Type type, cudaStream_t stream) {
  return launch(type == Type::float64 ? finish_prototypes_kernel<double> : finish_prototypes_kernel<float>,
                a.num_classes, 128, 0, stream, a);
}

}  // namespace proac::cuda
