// The plain path: one kernel for stage (i), one for stage (iii); any D, K and dtype.
#pragma once
#include "generic_tile.cuh"
#include "merge.cuh"

namespace proac::cuda {

struct GenericStatistics {
  Features features;
  Pixels pixels;
  Sampling sampling;
  Tiling tiling;
  const void* unit;  // C (K, D)
  double temperature;
  bool pixel_anchor, hardest_negative;
  void* positive;  // C (N)
  MergeStatistics merge;
};

struct GenericGradients {
  Features features;
  Pixels pixels;
  Sampling sampling;
  Tiling tiling;
  const void* unit;
  const void* factors;
  double temperature;
  bool pixel_anchor;
  void* coefficients;  // C (blocks, 64, K): dL/dS_ki / tau of the tile at hand
  Features grad;       // data null where not wanted
  PrototypeSums sums;
};

int generic_blocks(const Features&, int64_t num_classes);
cudaError_t generic_statistics(const GenericStatistics&, int blocks, cudaStream_t);
cudaError_t generic_gradients(const GenericGradients&, int blocks, cudaStream_t);

}  // namespace proac::cuda
