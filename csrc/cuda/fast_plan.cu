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

constexpr int kMostChannels = 1024, kMostClasses = 256, kMostSlots = 4, kMostBlocks = 2048;

// Pixels of a tile, and how many such blocks share a multiprocessor, in the order of preference: a call takes the first that its
// kernel's registers hold and that fits the GPU's shared memory.
struct Tile {
  int pixels, blocks;
};
constexpr Tile kTiles[] = {
    {128, 2},  // 16 bits, up to 64 classes: one block copies while the other multiplies
    {256, 1},  // 16 bits, up to 176 classes, 32 pixels a warp: each prototype that is read serves the most pixels
    {64, 2},   // float32, up to 64 classes; 16 bits and 24 classes where 128 pixels are too large
    {128, 1},  // float32 and more than 64 classes, or any features and more than 176: 8 warps of 16 pixels
    {32, 2},   // float32, up to 64 classes, on GPUs of 99 KB
    {64, 1},   // many classes on GPUs of 99 KB
    {16, 2},   // from here on: many channels
    {32, 1},  {16, 1},
};
constexpr bool most_pixels_first() {
  for (int i = 1; i < static_cast<int>(sizeof kTiles / sizeof *kTiles); ++i) {
    int before = kTiles[i - 1].pixels * kTiles[i - 1].blocks, now = kTiles[i].pixels * kTiles[i].blocks;
    if (before < now || (before == now && kTiles[i - 1].blocks <= kTiles[i].blocks)) return false;
  }
  return true;
}
static_assert(most_pixels_first(), "the most pixels on a multiprocessor; as many in two blocks rather than in one");

int round_up(int64_t n, int multiple) { return static_cast<int>((n + multiple - 1) / multiple * multiple); }

// What a plan takes from the kernel that runs.
struct Constants {
  int fragments, stage_channels, stage_bytes_per_eight, most_pixels, blocks, wanted;
};
template <class T>
Constants constants_of(int eights) {
  return with_eights(eights, [](auto n) {
    using S = Shape<T, decltype(n)::value>;
    return Constants{S::kFragments, S::kStage, S::kSteps * S::kBlock, S::kMostPixels, S::kBlocks, S::kWanted};
  });
}

// Fills in what follows from the number of pixels of a tile; false where it does not fit.
bool fit(FastPlan& p, const Features& x, int64_t num_classes, FastStage stage, const Constants& kernel, int tile_pixels,
         int budget) {
  int size = x.type == Type::float32 ? 4 : 2, slot_bytes = kernel.stage_bytes_per_eight * (p.rows / 8);
  int arrays = stage == FastStage::statistics ? kForwardArrays : kBackwardArrays, rest = arrays * 4 * tile_pixels,
      scratch = 0;
  p.tile_pixels = tile_pixels;
  p.threads = tile_pixels / (16 * kernel.fragments) * 32;
  for (p.tile_shift = 0; 1 << p.tile_shift < tile_pixels;) ++p.tile_shift;
  if (stage == FastStage::statistics) {
    rest += sizeof(Diagnostics) + kPartialRows * static_cast<int>(num_classes) * 4;
    scratch = p.threads / 32 * p.rows * static_cast<int>(sizeof(WarpPart));
  } else {
    rest += p.rows * static_cast<int>(sizeof(ClassFactors));
    if (stage == FastStage::gradients_and_prototypes) scratch = tile_pixels * class_group_pitch(p.classes) * 4;
  }
  int full_row = 128 / size;  // pixels
  for (p.exchange_shift = 0; tile_pixels << p.exchange_shift < full_row;) ++p.exchange_shift;
  p.exchange_mask = (tile_pixels < full_row ? tile_pixels : full_row) - 1;
  p.tile_pitch = p.pixels_first ? p.channels + 16 / size : tile_pixels;
  p.tile_bytes = (p.pixels_first ? tile_pixels : p.channels) * p.tile_pitch * size;
  rest += p.tile_bytes;
  p.resident = rest + p.stages * slot_bytes + scratch <= budget;
  p.slots = p.stages;
  if (!p.resident)
    for (p.slots = p.stages < kMostSlots ? p.stages : kMostSlots; p.slots > 2 && rest + p.slots * slot_bytes > budget;)
      --p.slots;
  p.ahead = p.resident ? kMostSlots - 1 : p.slots < 2 ? 1 : p.slots - 1;
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
  int limit = shared_limit(), eights = round_up(num_classes, 8) / 8;
  bool is_float = x.type == Type::float32, backward = stage != FastStage::statistics;
  Constants kernel = is_float ? constants_of<float>(eights) : constants_of<__half>(eights);
  p.classes = with_eights(eights, [](auto n) { return 8 * decltype(n)::value; });
  p.pixels_first = x.stride_channel == 1 && x.stride_pixel != 1;
  if (!p.pixels_first && x.stride_pixel != 1 && x.pixels > 1) return false;
  // a product's classes: 8, and as what is summed over 16 of 16-bit numbers
  p.rows = round_up(num_classes, backward && !is_float ? 16 : 8);
  p.stages = (static_cast<int>(x.channels) + kernel.stage_channels - 1) / kernel.stage_channels;
  if (p.stages == 0) p.stages = 1;
  p.channels = p.stages * kernel.stage_channels;
  if (backward && p.channels % 16) p.channels += 16 - p.channels % 16;  // the prototypes' gradient takes 16 at a time
  p.aligned = is_aligned(x, p.pixels_first);
  int resident = kernel.blocks * kernel.most_pixels;  // pixels that registers allow
  bool found = false;
  for (const Tile& tile : kTiles) {
    bool allowed = tile.pixels >= 16 * kernel.fragments && tile.pixels <= kernel.most_pixels &&
                   tile.blocks <= kernel.wanted && tile.pixels * tile.blocks <= resident;
    found = allowed && fit(p, x, num_classes, stage, kernel, tile.pixels, limit / tile.blocks);
    if (found) break;
  }
  if (!found) return false;
  p.tiles_per_image = (x.pixels + p.tile_pixels - 1) / p.tile_pixels;
  int64_t tiles = p.tiles_per_image * x.batch;
  if (tiles > INT32_MAX - kMostBlocks) return false;  // 2^35 pixels
  p.tiles = static_cast<int>(tiles);
  // as many blocks as are resident at once: prototypes that stay are then used for many tiles
  int by_shared = (limit + 2 * kSystemShared) / (p.shared_bytes + kSystemShared),
      by_registers = resident / p.tile_pixels;
  p.blocks_each = by_shared < by_registers ? by_shared : by_registers;
  p.blocks = static_cast<int>(few_blocks(p.tiles, kMostBlocks, p.blocks_each));
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
