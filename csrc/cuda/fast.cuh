// The fast path: D <= 1024, K <= 256, float16, bfloat16 and float32.
//
// A block takes a tile of pixels and keeps their features in shared memory, all D channels of them. A warp takes 16 or 32 pixels
// and multiplies them with every prototype on the tensor cores, (pixels x channels) (channels x classes), so that S of its
// pixels lies in its registers. The prototypes, split in two parts whose sum is as good as float32, stay in shared memory or
// stream through a ring there, a stage of 32 to 128 bytes of channels at a time, beside the features of the same channels.
// Backward computes S again in the same way, turns it in place into the coefficients dL/dS / tau of (8) to (10), scales those by
// a power of two for each pixel, splits them, and multiplies them with the prototypes; each product replaces the features
// in the tile, and the tile is written once.
//
//   fast_plan.cu             how a call is cut into tiles, and which kernel runs
//   fast_shape.cuh           constants of a kernel; the tile in shared memory; what is read of its pixels
//   fast_copy.cuh            copies from device memory
//   fast_fragment.cuh        operands of the tensor cores, and their products
//   fast_similarities.cuh    S of a tile: the loop that both kernels begin with
//   fast_statistics.cuh      the kernel of stage (i)
//   fast_coefficients.cuh    dL/dS of a tile, from S
//   fast_gradients.cuh       the kernel of stage (iii); fast_prototypes.cuh its part for the prototypes' gradient
#pragma once
#include <type_traits>

#include "merge.cuh"

namespace proac::cuda {

struct FastPlan {
  int tile_pixels;                                // 16 to 256
  int tile_shift;                                 // its log2
  int tile_pitch, exchange_shift, exchange_mask;  // TileLayout
  int classes;                                    // template size
  int threads;
  int rows, channels;  // of the split prototypes in device memory, zero-padded
  int stages;          // that the channels are cut into
  int slots;           // stages of prototypes in shared memory
  int ahead;           // stages of prototypes on their way while one is at work
  bool resident;       // all of them are there, and stay from tile to tile
  bool pixels_first;   // layout: channel stride 1, so that the tile is (pixels, channels)
  bool aligned;        // features can be copied 16 bytes at a time
  int shared_bytes, tile_bytes;
  int scratch_offset, arrays_offset;  // scratch lies behind the ring, or in its place
  int blocks, blocks_each;            // launched; resident on a multiprocessor
  int64_t tiles_per_image;
  int tiles;
};

// What runs on a plan: stage (i), or stage (iii) without or with the prototypes' gradient.
enum class FastStage { statistics, gradients, gradients_and_prototypes };

// Whether the fast path takes this call, and how.
bool plan_fast(const Features&, int64_t num_classes, FastStage, FastPlan&);

struct FastArguments {
  Features features;
  Pixels pixels;
  Sampling sampling;
  FastPlan plan;
  const void* split;  // of the features' type, as PrototypeBlock has it
  double temperature;
  bool pixel_anchor;
};

struct FastStatistics {
  FastArguments common;
  bool hardest_negative;
  void* positive;  // float (N)
  MergeStatistics merge;
};

struct FastGradients {
  FastArguments common;
  const void* factors;  // float (kFactorRows, K)
  Features grad;        // data null where not wanted
  bool grad_aligned;    // it has the tile's layout and takes 16 bytes at a time
  PrototypeSums sums;
};

// Whether tensors of this layout can be read and written 16 bytes at a time, along channels or along pixels.
bool is_aligned(const Features&, bool pixels_first);

// Template sizes of the kernels, in eights of classes: the smallest that holds K runs. 22 take ADE20K's 150 classes and
// COCO-Stuff's 171 with 32 pixels a warp, and no more would fit a thread's registers.
template <class Function>
auto with_eights(int eights, Function&& function) {
  using std::integral_constant;
  if (eights <= 3) return function(integral_constant<int, 3>());
  if (eights <= 8) return function(integral_constant<int, 8>());
  if (eights <= 22) return function(integral_constant<int, 22>());
  return function(integral_constant<int, 32>());
}

cudaError_t fast_statistics(const FastStatistics&, cudaStream_t);
cudaError_t fast_gradients(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
