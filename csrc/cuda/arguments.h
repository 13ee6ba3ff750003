// What the CUDA kernels take: raw pointers, sizes, strides and scalars. Plain C++: the registration, the tests' binding
// and the kernels all include this file. Strides count elements; everything that indexes pixels has 64 bits.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace proac::cuda {

enum class Type : int { float16, bfloat16, float32, float64 };
enum class LabelType : int { uint8, int16, int32, int64 };

// "C" below is the compute type of a call: double for float64 features, else float.

// (batch, channels, pixels): the spatial axes collapsed into one.
struct Features {
  void* data;
  Type type;
  int64_t batch, channels, pixels;
  int64_t stride_batch, stride_channel, stride_pixel;
};

// Labels and weights, (batch, *label_size), read at the features' resolution (batch, *size).
struct Pixels {
  const void* label;
  LabelType label_type;
  const void* weight;                         // C, or null
  int64_t count;                              // pixels of all images
  int64_t size[3], label_size[3];             // unused axes have size 1
  int64_t label_stride[4], weight_stride[4];  // batch first
  float scale[3];                             // float32(label_size) / float32(size), rounded once
  float shift;                                // what is added to an index before: 0 "nearest", 0.5 "nearest-exact"
  int64_t num_classes, ignore_index;
};

// The sampled sets; null pointers where every pixel of another class is a negative.
struct Sampling {
  const int64_t* thresholds;  // (K, 2): key and index of the last member of N_k
  const int64_t* rng;         // (2,): seed, index of the first pixel
};

// Rows of a block's partial statistics, (kPartialRows, K) of C: log Z_k = maximum + log sum.
enum PartialRow { kMaximum, kExpSum, kWeight, kNegativeWeight, kPositiveSum, kPixelLossSum, kHardest, kPartialRows };
// Rows of the statistics and of the positive sums, as proac_cuda/stages/__init__.py numbers them.
enum StatisticsRow { kLogZ, kW, kNegW, kPosSum, kPixelLoss, kHardestNegative, kNumStatistics };
enum Reduction { kNone, kMean, kSum };

struct SelectNegatives {
  Pixels pixels;
  Type compute;
  const int64_t* rng;
  int64_t num_negatives;
  int64_t* thresholds;  // out (K, 2)
  void* workspace;
};

struct ClassStatistics {
  Features features;
  Pixels pixels;
  Sampling sampling;
  const void* prototypes;  // C (K, D)
  double temperature;
  bool pixel_anchor, hardest_negative;
  void* statistics;      // out C (6, K)
  void* positive;        // out C (N)
  int64_t* diagnostics;  // out (4)
  void* workspace;
};

struct PositiveSums {
  Pixels pixels;
  Type compute;
  const void* positive;    // C (N)
  const void* statistics;  // C (6, K)
  bool negative_mean;
  void* sums;  // out C (2, K)
  void* workspace;
};

struct ReduceLoss {
  Type compute;
  int64_t num_classes;
  const void* statistics;
  const void* sums;
  const void* class_weight;  // C (K), or null
  double pixel_anchor_weight;
  int reduction;
  void* loss;  // out C () or (K)
};

// Stages (i), (ii) and the loss of one set of pixels, in fewer launches than one after the other.
struct LossForward {
  ClassStatistics statistics;
  PositiveSums sums;  // of what `statistics` leaves
  ReduceLoss loss;    // of both
  void* workspace;    // theirs are not used
};

struct LossGradients {
  Features features;
  Pixels pixels;
  Sampling sampling;
  const void* prototypes;
  const void* statistics;
  const void* sums;
  const void* class_weight;
  const void* grad_loss;  // C; a stride of 0 for a scalar
  int64_t grad_loss_stride;
  double temperature;
  bool negative_mean;
  double pixel_anchor_weight;
  int reduction;
  Features grad_features;  // out; data is null where not asked for
  void* grad_prototypes;   // out C (K, D), or null
  void* workspace;
};

// Bytes of device memory each stage wants in `workspace`, aligned to 256. They depend on shapes and options alone.
size_t workspace_bytes(const SelectNegatives&);
size_t workspace_bytes(const ClassStatistics&);
size_t workspace_bytes(const PositiveSums&);
size_t workspace_bytes(const LossForward&);
size_t workspace_bytes(const LossGradients&);

// Each enqueues its kernels on the stream, and never synchronises.
cudaError_t run(const SelectNegatives&, cudaStream_t);
cudaError_t run(const ClassStatistics&, cudaStream_t);
cudaError_t run(const PositiveSums&, cudaStream_t);
cudaError_t run(const ReduceLoss&, cudaStream_t);
cudaError_t run(const LossForward&, cudaStream_t);
cudaError_t run(const LossGradients&, cudaStream_t);

// Builds the two descriptions above from the shapes and strides of tensors (B, D, *spatial) and (B, *any).
Features describe_features(void* data, Type type, int spatial_axes, const int64_t* shape, const int64_t* strides);
Pixels describe_pixels(const void* label, LabelType label_type, const void* weight, int spatial_axes,
                       const int64_t* feature_spatial, const int64_t* label_shape, const int64_t* label_strides,
                       const int64_t* weight_strides, int64_t num_classes, int64_t ignore_index, bool nearest_exact);

}  // namespace proac::cuda
