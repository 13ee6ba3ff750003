#include "fast_gradients.cuh"

namespace proac::cuda {

template cudaError_t fast_gradients_as<__half>(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
