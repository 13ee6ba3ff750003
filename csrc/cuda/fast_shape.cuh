// The constants of the fast path's kernels, and how its tile lies in shared memory.
#pragma once
#include "fast.cuh"
#include "generic_tile.cuh"
#include "split.cuh"

namespace proac::cuda {

// For features of type T and up to 8 kEights classes.
template <class T, int kEights>
struct Shape {
  static constexpr int kSize = static_cast<int>(sizeof(T));
  // Pixels of a warp, in sixteens (the rows of a product). Two use a prototype twice for each time that it is read from
  // shared memory, which is what bounds many classes; more of S than a thread's registers hold must not lie in them.
  static constexpr int kFragments = kSize == 2 && kEights > 3 && kEights <= 22 ? 2 : 1;
  static constexpr int kWarpPixels = 16 * kFragments;
  static constexpr int kStep = 32 / kSize;  // channels of a product
  // Products of a stage, which is what arrives together, and is summed on the tensor cores before it is added in float32.
  static constexpr int kSteps = kEights <= 3 ? 4 : kEights <= 8 || (kSize == 4 && kEights <= 22) ? 2 : 1;
  static constexpr int kStage = kSteps * kStep;  // channels
  static constexpr int kVector = 16 / kSize;     // elements of a copy
  static constexpr int kBlock = PrototypeBlock<T>::kBytes;
  static constexpr int kMostPixels = 128 * kFragments;  // of a tile
  static constexpr int kMostThreads = kMostPixels / kWarpPixels * 32;
  static constexpr bool kKeep =
      kFragments * kEights <= 24;                       // registers are left beside S for what loops would make anew
  static constexpr int kBlocks = kEights <= 3 ? 2 : 1;  // of that size, that registers allow on a multiprocessor
  // Blocks on a multiprocessor that a plan looks for: one copies while the other multiplies. With many classes each tile reads
  // all prototypes anew, and larger ones do so less often.
  static constexpr int kWanted = kEights <= 8 ? 2 : 1;
};

// [pixels][channels + 16 bytes] where kRows, else [channels][pixels] with eights of pixels exchanged within a channel's row, by the
// channel's number: by each for 128 bytes of pixels and more, by every second or fourth where that many rows lie in 128 bytes.
// Either way eight units of 16 bytes that are read or written together have banks of their own.
template <class T, bool kRows>
struct TileLayout {
  int pitch;  // elements between rows
  int shift, mask;
  __device__ __forceinline__ int operator()(int pixel, int channel) const {
    return kRows ? pixel * pitch + channel : channel * pitch + (pixel ^ ((channel >> shift) * 8 & mask));
  }
};
template <class T, bool kRows>
__device__ __forceinline__ TileLayout<T, kRows> tile_layout(const FastPlan& plan) {
  return {plan.tile_pitch, plan.exchange_shift, plan.exchange_mask};
}

struct PixelArrays {  // in shared memory, one number per pixel of the tile
  int* label;
  float *weight, *log_weight;           // log2
  float *positive, *weighted, *excess;  // forward alone
};
constexpr int kForwardArrays = 6, kBackwardArrays = 3;
__device__ __forceinline__ PixelArrays pixel_arrays(char* p, int pixels) {
  float* f = reinterpret_cast<float*>(p);
  return {reinterpret_cast<int*>(f), f + pixels, f + 2 * pixels, f + 3 * pixels, f + 4 * pixels, f + 5 * pixels};
}

__device__ __forceinline__ TilePlace place_of(const FastArguments& a, int64_t tile) {
  return place_of(Tiling{a.plan.tiles_per_image, a.plan.tiles, a.plan.tile_pixels}, a.features, tile);
}

__device__ __forceinline__ void read_pixels(const FastArguments& a, const TilePlace& place, const PixelArrays& out,
                                            Diagnostics* diagnostics) {
  int t = threadIdx.x;
  if (t >= a.plan.tile_pixels) return;
  int64_t i = place.image * a.features.pixels + place.first + t;
  Pixel<float> pixel = {-1, 0.f, false, false};
  if (t < place.pixels) pixel = read_pixel<float>(a.pixels, i);
  if (diagnostics) record(*diagnostics, pixel, i);
  out.label[t] = pixel.label, out.weight[t] = pixel.weight, out.log_weight[t] = log2f(pixel.weight);
}

// Of the calling thread: its place in the fragments, and its warp's first pixel.
struct Lane {
  int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3;
};

}  // namespace proac::cuda
