// How pixels are cut into chunks, who works on them, and the memory each worker has. Results are kept for each chunk and
// merged in the chunks' order, so that they do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "kernels.h"

namespace proac {

struct ChunkPlan {
  int64_t pixels, pixels_per_chunk, count;

  // The number of chunks depends on the number of pixels alone, and is at most `most`.
  explicit ChunkPlan(int64_t num_pixels, int64_t most = 64) : pixels(num_pixels) {
    const int64_t tiles = (pixels + kTile - 1) / kTile;
    const int64_t tiles_per_chunk = std::max<int64_t>(4, (tiles + most - 1) / most);
    pixels_per_chunk = tiles_per_chunk * kTile;
    count = (pixels + pixels_per_chunk - 1) / pixels_per_chunk;
  }
  Range range(int64_t chunk) const {
    return {chunk * pixels_per_chunk, std::min(pixels, (chunk + 1) * pixels_per_chunk)};
  }
};

// Workers that for_each_chunk may start.
inline int64_t num_workers(const ChunkPlan& plan) {
  return std::max<int64_t>(1, std::min<int64_t>(plan.count, torch::stable::get_num_threads()));
}

// Calls body(chunk, range, worker) for every chunk, on PyTorch's threads; worker < num_workers(plan), and no two calls
// with the same worker run at a time. A worker takes the next chunk as it gets free. The body must not throw.
template <class Body>
void for_each_chunk(const ChunkPlan& plan, const Body& body) {
  std::atomic<int64_t> next_chunk{0}, next_worker{0};
  torch::stable::parallel_for(0, num_workers(plan), 1, [&](int64_t, int64_t) {
    const int64_t worker = next_worker.fetch_add(1);
    for (int64_t chunk = next_chunk.fetch_add(1); chunk < plan.count; chunk = next_chunk.fetch_add(1)) {
      body(chunk, plan.range(chunk), worker);
    }
  });
}

// Memory for every worker, allocated before they start, since nothing may throw where they run.
class Workspaces {
 public:
  struct Needs {
    int64_t classes, channels;
    size_t element;  // bytes of the compute type
    int vector_bytes;
    bool sampled, anchor_gradient;
    TileUse tile_use;
  };

  Workspaces(int64_t workers, const Needs& needs) {
    const size_t tile = kTile * needs.element, lanes = needs.vector_bytes;
    const size_t padded = (needs.classes + kClassPad - 1) / kClassPad * kClassPad;
    const size_t x = needs.channels * tile, lane = needs.classes * lanes;
    const size_t s = needs.classes * tile;
    const int64_t terms = std::max(needs.channels, needs.classes), strips = kTile / kTileLanes;
    const int most_parts = needs.tile_use.pixel_parts == 3 ? 4 : 2;  // of dS
    const size_t pairs = needs.tile_use.pixels_as_pairs ? strips * tile_strip(needs.channels, 1) * kTileBytes : 0;
    const size_t tiles = needs.tile_use.pixel_parts ? strips * tile_strip(terms, most_parts) * kTileBytes : 0;
    const size_t sampled = needs.sampled ? x : 0, transposed = needs.anchor_gradient ? padded * tile : 0;
    const size_t total = 10 * kAlign + x + s + pairs + tiles + sampled + 4 * (lane + kAlign) +
                         needs.classes * sizeof(double) + transposed;
    stride_ = (total + kAlign - 1) / kAlign * kAlign;
    memory_ = static_cast<char*>(std::aligned_alloc(kAlign, stride_ * workers));
    if (!memory_) throw std::bad_alloc();
    for (int64_t w = 0; w < workers; ++w) {
      char* at = memory_ + w * stride_;
      const auto take = [&](size_t bytes) {
        char* begin = at;
        at += (bytes + kAlign - 1) / kAlign * kAlign;
        return begin;
      };
      Workspace work;
      work.x = take(x);
      work.s = take(s);
      work.pairs = reinterpret_cast<int8_t*>(take(pairs));
      work.tiles = reinterpret_cast<int8_t*>(take(tiles));
      work.sampled_x = take(sampled);
      work.lane_sum = take(lane);
      work.lane_max = take(lane);
      work.lane_hardest = take(lane);
      work.lane_weight = take(lane);
      work.class_max = reinterpret_cast<double*>(take(needs.classes * sizeof(double)));
      work.transposed_s = take(transposed);
      spaces_.push_back(work);
    }
  }
  ~Workspaces() { std::free(memory_); }
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  const Workspace& operator[](int64_t worker) const { return spaces_[worker]; }

 private:
  static constexpr size_t kAlign = 128;
  char* memory_;
  size_t stride_;
  std::vector<Workspace> spaces_;
};

}  // namespace proac
