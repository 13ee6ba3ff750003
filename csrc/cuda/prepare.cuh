// Prototypes of length one, (1), in the form the other kernels read, and the factors of the gradient, (7) to (10).
#pragma once
#include "arguments.h"

namespace proac::cuda {

// Rows of the factors, (kFactorRows, K) of C.
enum FactorRow {
  kPositiveFactor,  // A_k / W_k / tau
  kNegativeFactor,  // A_k T_k / tau
  kFactorLogZ,      // the sum form of log Z_k
  kContrast,        // the log Z_k of the loss
  kPixelFactor,     // alpha / sum_V w / tau, times the upstream gradient; the same for every class
  kSumScale,        // a power of two: what the prototypes' gradient is multiplied by to be summed in integers
  kFactorRows
};

// The gradient of each prototype, before it is projected, is summed in integers: they add up to the same in any order of
// blocks, so that it needs neither a slice for each block nor floating-point atomics.
struct PrototypeSums {
  unsigned long long*
      sum;   // (K, D): sum_i dL/dS_ki xhat_i / tau, times kSumScale, in two's complement; null if not wanted
  int* bad;  // (K): not 0 where a term was NaN or infinite
};

// Words that a later launch of the same call counts in.
struct Counters {
  unsigned* word;
  int count;
};

struct Prepare {
  const void* prototypes;  // C (K, D)
  int num_classes, channels;
  // out; each null where not wanted
  void* unit;   // C (K, D)
  void* norm;   // C (K)
  void* split;  // the features' type: high and low parts times kScale, in the order of PrototypeBlock, zero-padded
  int split_rows, split_channels;
  void* factors;         // C (kFactorRows, K)
  PrototypeSums sums;    // set to zero
  Counters counters[2];  // likewise
  // for the factors
  const void *statistics, *positive_sums, *class_weight, *grad_loss;
  int64_t grad_loss_stride;
  double temperature, pixel_anchor_weight;
  int reduction;
  bool negative_mean;
};

cudaError_t prepare(const Prepare&, Type, cudaStream_t);

}  // namespace proac::cuda
