// What the registered ops hand to the CPU kernels: plain structs and a table of functions, one table for each
// instruction set. Nothing in this header generates code, so that every translation unit may include it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace proac {

constexpr int kTile = 128;                  // pixels that are packed, multiplied and written together
constexpr int kMaxRows = 6;                 // rows of a register block of the matrix products
constexpr int kClassPad = 16;               // the prototypes' gradient has its classes rounded up to this
constexpr int kMaxAxes = 3;                 // spatial axes
constexpr int kTileRows = 16;               // rows of the left factor that the tile unit multiplies at a time
constexpr int kTileLanes = 16;              // pixels, of the right factor
constexpr int kTileBytes = kTileRows * 64;  // each of its tiles

// (v + offset) ^ offset has the digits of the whole number v, from -128 to 127 each, as its bytes.
constexpr uint32_t kDigitOffset = 0x80808080;

// For the tile unit a number is split into parts: one or two bfloat16 numbers, or three or four digits of 8 bits. Terms
// of a tile's sums, and how many tiles the terms of sixteen rows, or of sixteen pixels, take.
[[maybe_unused]] static constexpr int64_t tile_steps(int64_t terms, int parts) {
  const int step = parts >= 3 ? 64 : 32;
  return (terms + step - 1) / step;
}
// Odd: strips a multiple of 4 KiB apart would share few lines of the nearest cache.
[[maybe_unused]] static constexpr int64_t tile_strip(int64_t terms, int parts) {
  return tile_steps(terms, parts) * parts | 1;
}

// How features are stored. Half and BFloat16 are computed in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
enum FeatureType : int { kFloat, kDouble, kHalf, kBFloat16, kNumFeatureTypes };
enum LabelType : int { kUInt8, kInt16, kInt32, kInt64 };

// Features or their gradient: element (image b, channel d, pixel p) lies at b * batch + d * channel + p * pixel.
struct FeatureView {
  void* data;
  int64_t channels;      // D
  int64_t pixels;        // P, of one image
  int64_t batch_stride;  // in elements, as the other two
  int64_t channel_stride;
  int64_t pixel_stride;
};

// Labels or weights, read at the features' resolution by a nearest rule: offset[a][i] is where index i of spatial axis
// a of the features reads, in elements. Where every index reads its own element of a dense image, offset[0] is null.
struct NearestView {
  const void* data;  // null: there are no weights
  int64_t batch_stride;
  const int64_t* offset[kMaxAxes];
};

// The pixels of a call, numbered in (batch, spatial) order.
struct PixelView {
  int64_t total;           // N = B * P
  int64_t pixels;          // P
  int64_t size[kMaxAxes];  // spatial sizes of the features, 1 in front where there are fewer axes
  NearestView labels;
  NearestView weights;  // of the compute type
  LabelType label_type;
  int64_t num_classes;  // K
  int64_t ignore_index;
};

// The members of sampled sets, equation (2): pixel i is in N_k where level(i) <= rank[k]. `sorted` holds the classes'
// thresholds (key, index) in ascending order; level(i) counts those that are below the pixel's own (key, index).
struct SampleView {
  const uint64_t* sorted_key;  // (K,)
  const int64_t* sorted_index;
  const void* rank;  // (K,), of the compute type; null: all negatives
  uint64_t seed;
  int64_t first_index;
};

// What the tile unit multiplies.
struct TileUse {
  int pixel_parts;       // of the features; 0: it is not used
  bool pixels_as_pairs;  // they are packed as it reads them, not as floats
};

// A left factor of the tile unit, as tile_unit.h reads it.
struct TileRows {
  const int8_t* tiles;
  const float* unit;  // of each row, where its parts are digits
};

// Unit prototypes in the orders in which they are read, of the compute type unless said otherwise.
struct AnchorView {
  const void* by_class;    // blocks of up to kMaxRows classes, each [D][rows]
  const void* by_channel;  // blocks of up to kMaxRows channels, each [K][rows]
  const void* transposed;  // [D][K]
  TileRows class_tiles;    // rows are classes, terms channels
  TileRows channel_tiles;  // rows are channels, terms classes
  TileUse tile_use;
};

// Memory of one thread, laid out by Workspaces in parallel.h.
struct Workspace {
  void* x;             // [D][kTile], the packed pixels
  void* s;             // [K][kTile], their similarities
  int8_t* pairs;       // the packed pixels where they are pairs, and not floats
  int8_t* tiles;       // a right factor of the tile unit, for products over channels and over classes
  void* sampled_x;     // [D][kTile], packed members of sampled sets
  void* lane_sum;      // [K][lanes], sums of the exponentials of a few tiles
  void* lane_max;      // [K][lanes], the maxima they are relative to
  void* lane_hardest;  // [K][lanes], largest similarity
  void* lane_weight;   // [K][lanes], weights of sampled negatives
  double* class_max;   // [K], the maxima of the chunk
  void* transposed_s;  // [kTile][K rounded up to kClassPad], for the prototypes' gradient
};

// What a chunk finds of bad input; the first of each in pixel order.
struct Diagnostics {
  int64_t bad_labels, first_label, bad_weights;
  double first_weight;
};

struct Range {
  int64_t begin, end;  // pixels; begin is a multiple of kTile
};

enum StatisticsRow : int { kLogZ, kWeight, kNegativeWeight, kPositiveSum, kPixelLossSum, kHardest, kNumStatistics };

struct StatisticsCall {
  FeatureView features;
  PixelView pixels;
  SampleView sample;
  AnchorView anchors;
  double temperature;
  bool pixel_anchor, hardest_negative;
  void* positive;            // (N,), compute type
  double* partial;           // (chunks, kNumStatistics, K)
  Diagnostics* diagnostics;  // (chunks,)
};

struct PositiveCall {
  PixelView pixels;
  const void* positive;  // (N,), compute type
  const void* contrast;  // (K,), compute type: the log Z_k of equation (4)
  double* partial;       // (chunks, 2, K)
};

struct GradientCall {
  FeatureView features;
  FeatureView gradient;  // data null: not asked for
  bool stream;           // the gradient is so large that it may bypass the cache
  PixelView pixels;
  SampleView sample;
  AnchorView anchors;
  double temperature;
  const void* log_z;           // (K,), all of the compute type
  const void* contrast;        // (K,)
  const void* positive_scale;  // (K,), A_k / W_k
  const void* negative_scale;  // (K,), A_k T_k
  double pixel_scale;          // alpha dL / sum_V w; used with pixel_anchor
  bool pixel_anchor;
  double* anchor_gradient;  // (chunks, D, K rounded up), zeroed; null: not asked for
};

// The valid pixels of a range whose key has its upper bits (key >> shift) at most `limit`, as stage (0) collects them.
struct Candidate {
  uint32_t key;
  int32_t label;
  int64_t index;
};
constexpr int kHistogramBits = 12;

struct SelectCall {
  PixelView pixels;
  uint64_t seed;
  int64_t first_index;
  bool is_double;  // compute type of the weights
};

struct Kernels {
  const char* name;
  int vector_bytes;
  bool has_tile_unit;
  void (*class_statistics[kNumFeatureTypes])(const StatisticsCall&, Range, int64_t chunk, const Workspace&);
  void (*positive_sums[2])(const PositiveCall&, Range, int64_t chunk);
  void (*loss_gradients[kNumFeatureTypes])(const GradientCall&, Range, int64_t chunk, const Workspace&);
  // Counts the valid pixels of a range by class and by the upper bits of their keys.
  void (*count_keys)(const SelectCall&, Range, int64_t* by_class, int64_t* by_key);
  // Writes the valid pixels of a range with key bits <= limit, in pixel order.
  void (*collect_keys)(const SelectCall&, Range, int64_t limit, Candidate* out);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}

}  // namespace proac
