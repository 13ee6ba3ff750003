// The last steps: partial results of blocks become K-vectors, and those the loss.
#pragma once
#include "prepare.cuh"

namespace proac::cuda {

struct MergeStatistics {
  const void* partial;      // C (blocks, kPartialRows, K)
  const void* diagnostics;  // Diagnostics (blocks)
  int blocks, num_classes;
  Pixels pixels;  // to read the first invalid values
  void* statistics;
  int64_t* first_values;
};
cudaError_t merge_statistics(const MergeStatistics&, Type, cudaStream_t);

struct MergeSums {
  const void* partial;  // C (blocks, size)
  int blocks;
  int64_t size;
  void* out;  // C (size)
};
cudaError_t merge_sums(const MergeSums&, Type, cudaStream_t);

struct FinishPrototypes {
  PrototypeSums sums;
  int num_classes, channels;
  const void *unit, *norm, *factors;
  void* grad;  // C (K, D)
};
cudaError_t finish_prototypes(const FinishPrototypes&, Type, cudaStream_t);

}  // namespace proac::cuda
