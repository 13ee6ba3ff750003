// How stage (ii) is launched within a longer call.
#pragma once
#include "prepare.cuh"

namespace proac::cuda {

// In the stage's workspace: to be zero before its launch.
Counters counters_of(const PositiveSums&);
// `loss` of these sums too, where it is not null.
cudaError_t positive_sums(const PositiveSums&, const ReduceLoss* loss, cudaStream_t);

}  // namespace proac::cuda
