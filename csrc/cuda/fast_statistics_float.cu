#include "fast_statistics.cuh"

namespace proac::cuda {

template cudaError_t fast_statistics_as<float>(const FastStatistics&, cudaStream_t);

}  // namespace proac::cuda
