// The fast path: D <= 1024, K <= 256, float16, bfloat16 and float32.
//
// A block takes a tile of pixels and keeps their features in shared memory, all D channels of them. A warp takes 16 pixels
// and multiplies them with every prototype on the tensor cores, (pixels x channels) (channels x classes), so that S of its
// pixels lies in its registers: 16 x K numbers. The prototypes, split in two parts whose sum is as good as float32, stay in
// shared memory or stream through a ring there, 32 to 128 bytes of channels at a time; the features arrive in the same groups
// of asynchronous copies. Backward computes S again in the same way, turns it in place into the coefficients dL/dS / tau of
// (8) to (10), scales those by a power of two for each pixel, splits them, and multiplies them with the prototypes; each
// product replaces the features in the tile, and the tile is written once.
//
// csrc/README.md has the bytes and flops per pixel, and the roof. Shared memory is read 8 x for the prototypes (each warp) and
// once for the features: at D = 256 and K = 19, 2,080 wavefronts for a tile of 128 pixels, which device memory takes 4,500
// cycles to bring on H100.
#pragma once
#include "prepare.cuh"

namespace proac::cuda {

struct FastPlan {
  int tile_pixels;     // 16 to 128; a warp for every 16
  int tile_pitch;      // elements from one channel (or pixel) of the tile to the next
  int classes;         // template size: 24, 64 or 256
  int rows, channels;  // of the split prototypes in device memory, zero-padded
  int slots;           // chunks of prototypes in shared memory
  int ahead;           // how many chunks are on their way while one is at work
  bool resident;       // all of them are there, and stay from tile to tile
  bool pixels_first;   // layout: channel stride 1, so that the tile is (pixels, channels)
  bool aligned;        // features can be copied 16 bytes at a time
  int shared_bytes, tile_bytes;
  int scratch_offset, arrays_offset;  // scratch lies behind the ring, or in its place
  int blocks;
  int64_t tiles_per_image, tiles;
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
  const void* split;  // (2, rows, channels) of the features' type
  double temperature;
  bool pixel_anchor;
};

struct FastStatistics {
  FastArguments common;
  bool hardest_negative;
  void* partial;      // float (blocks, kPartialRows, K)
  void* diagnostics;  // Diagnostics (blocks)
  void* positive;     // float (N)
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

cudaError_t fast_statistics(const FastStatistics&, cudaStream_t);
cudaError_t fast_gradients(const FastGradients&, cudaStream_t);

}  // namespace proac::cuda
