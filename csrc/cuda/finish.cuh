// The last step of backward, for prototypes that require a gradient.
#pragma once
#include "prepare.cuh"

namespace proac::cuda {

struct FinishPrototypes {
  PrototypeSums sums;
  int num_classes, channels;
  const void *unit, *norm, *factors;
  void* grad;  // C (K, D)
};
cudaError_t finish_prototypes(const FinishPrototypes&, Type, cudaStream_t);

}  // namespace proac::cuda
