#include "fast_gradients.cuh"
#include "fast_statistics.cuh"

namespace proac::cuda {

template cudaError_t fast_statistics_as<__half>(const FastStatistics&, cudaStream_t);
template cudaError_t fast_gradients_as<__half>(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
