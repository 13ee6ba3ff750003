#include "fast_gradients.cuh"
#include "fast_statistics.cuh"

namespace proac::cuda {

template cudaError_t fast_statistics_as<float>(const FastStatistics&, cudaStream_t);
template cudaError_t fast_gradients_as<float>(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
