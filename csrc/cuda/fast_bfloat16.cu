#include "fast_gradients.cuh"
#include "fast_statistics.cuh"

namespace proac::cuda {

template cudaError_t fast_statistics_as<__nv_bfloat16>(const FastStatistics&, cudaStream_t);
template cudaError_t fast_gradients_as<__nv_bfloat16>(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
