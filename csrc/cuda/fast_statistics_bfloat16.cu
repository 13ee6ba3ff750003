#include "fast_statistics.cuh"

namespace proac::cuda {

template cudaError_t fast_statistics_as<__nv_bfloat16>(const FastStatistics&, cudaStream_t);

}  // namespace proac::cuda
