#include "fast_gradients.cuh"

namespace proac::cuda {

template cudaError_t fast_gradients_as<__nv_bfloat16>(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
