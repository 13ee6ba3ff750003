// How the fast path cuts a call into tiles, and which of its kernels runs.
#include "device.h"
#include "fast_gradients.cuh"
#include "fast_statistics.cuh"

namespace proac::cuda {

template <class T>
cudaError_t fast_statistics_as(const FastStatistics&, cudaStream_t);
template <class T>
cudaError_t fast_gradients_as(const FastGradients&, cudaStream_t);
extern template cudaError_t fast_statistics_as<__half>(const FastStatistics&, cudaStream_t);
extern template cudaError_t fast_statistics_as<__nv_bfloat16>(const FastStatistics&, cudaStream_t);
extern template cudaError_t fast_statistics_as<float>(const FastStatistics&, cudaStream_t);
extern template cudaError_t fast_gradients_as<__half>(const FastGradients&, cudaStream_t);
extern template cudaError_t fast_gradients_as<__nv_bfloat16>(const FastGradients&, cudaStream_t);
extern template cudaError_t fast_gradients_as<float>(const FastGradients&, cudaStream_t);

namespace {

constexpr int kMostChannels = 1024, kMostClasses = 256, kMostBlocks = 2048, kMostSlots = 4;

int round_up(int64_t n, int multiple) { return static_cast<int>((n + multiple - 1) / multiple * multiple); }

// Fills in what follows from the number of pixels of a tile; false where it does not fit.
bool fit(FastPlan& p, const Features& x, int64_t num_classes, FastStage stage, int chunk_bytes, int tile_pixels,
         int budget) {
  int size = x.type == Type::float32 ? 4 : 2, parts = size == 4 ? 1 : 2, chunks = p.channels * size / chunk_bytes;
  int slot_bytes = parts * p.rows * (chunk_bytes + 16), rest = kPixelArrays * 4 * tile_pixels, scratch = 0;
  if (stage == FastStage::statistics) {
    rest += sizeof(Diagnostics) + kPartialRows * static_cast<int>(num_classes) * 4;
    scratch = tile_pixels / kWarpPixels * p.rows * static_cast<int>(sizeof(WarpPart));
  } else if (stage == FastStage::gradients_and_prototypes) {
    scratch = tile_pixels * class_group_pitch(p.classes) * 4;
  }
  p.tile_pixels = tile_pixels;
  p.tile_pitch = p.pixels_first ? p.channels + 16 / size : tile_pixels + 8;
  p.tile_bytes = (p.pixels_first ? tile_pixels : p.channels) * p.tile_pitch * size;
  rest += p.tile_bytes;
  p.resident = rest + chunks * slot_bytes + scratch <= budget;
  p.slots = chunks;
  if (!p.resident)
    for (p.slots = chunks < kMostSlots ? chunks : kMostSlots; p.slots > 2 && rest + p.slots * slot_bytes > budget;)
      --p.slots;
  p.ahead = p.slots < 3 ? 1 : p.slots < kMostSlots ? p.slots - 1 : kMostSlots - 1;
  int ring = p.slots * slot_bytes;
  p.scratch_offset = p.tile_bytes + (p.resident ? ring : 0);
  p.arrays_offset = p.tile_bytes + (p.resident ? ring + scratch : ring > scratch ? ring : scratch);
  p.shared_bytes = p.arrays_offset - p.tile_bytes + rest;
  return p.shared_bytes <= budget;
}

}  // namespace

bool is_aligned(const Features& x, bool pixels_first) {
  int64_t vector = x.type == Type::float32 ? 4 : 8;
  if ((pixels_first ? x.stride_channel : x.stride_pixel) != 1) return false;
  int64_t row = pixels_first ? x.stride_pixel : x.stride_channel, rows = pixels_first ? x.pixels : x.channels;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.batch == 1 || x.stride_batch % vector == 0) &&
         (rows == 1 || row % vector == 0);
}

bool plan_fast(const Features& x, int64_t num_classes, FastStage stage, FastPlan& p) {
  if (x.type == Type::float64 || x.channels > kMostChannels || num_classes > kMostClasses) return false;
  int limit = shared_limit(), size = x.type == Type::float32 ? 4 : 2;
  bool backward = stage != FastStage::statistics;
  p.classes = num_classes <= 24 ? 24 : num_classes <= 64 ? 64 : 256;
  int chunk_bytes = p.classes == 256 ? 32 : p.classes == 24 && backward ? 128 : 64;
  p.pixels_first = x.stride_channel == 1 && x.stride_pixel != 1;
  p.rows =
      round_up(num_classes, backward && size == 2 ? 16 : 8);  // a product's classes: 16 of 16-bit numbers, 8 of TF32
  p.channels = round_up(x.channels, chunk_bytes / size < 16 ? 16 : chunk_bytes / size);
  p.aligned = is_aligned(x, p.pixels_first);
  // the largest tile that leaves room for a second block, where registers do so too; else the largest that fits
  bool fits = false;
  for (int pixels = 128; pixels >= 32 && !fits; pixels /= 2)
    fits = fit(p, x, num_classes, stage, chunk_bytes, pixels, p.classes == 256 ? limit : limit / 2);
  for (int pixels = 64; pixels >= kWarpPixels && !fits; pixels /= 2)
    fits = fit(p, x, num_classes, stage, chunk_bytes, pixels, limit);
  if (!fits) return false;
  p.tiles_per_image = (x.pixels + p.tile_pixels - 1) / p.tile_pixels;
  p.tiles = p.tiles_per_image * x.batch;
  p.blocks = static_cast<int>(few_blocks(p.tiles, kMostBlocks));
  return true;
}

cudaError_t fast_statistics(const FastStatistics& job, cudaStream_t stream) {
  switch (job.common.features.type) {
    case Type::float16:
      return fast_statistics_as<__half>(job, stream);
    case Type::bfloat16:
      return fast_statistics_as<__nv_bfloat16>(job, stream);
    default:
      return fast_statistics_as<float>(job, stream);
  }
}

cudaError_t fast_gradients(const FastGradients& job, cudaStream_t stream) {
  switch (job.common.features.type) {
    case Type::float16:
      return fast_gradients_as<__half>(job, stream);
    case Type::bfloat16:
      return fast_gradients_as<__nv_bfloat16>(job, stream);
    default:
      return fast_gradients_as<float>(job, stream);
  }
}

}  // namespace proac::cuda
