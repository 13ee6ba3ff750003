// The fast path's tile: features and prototypes into shared memory by asynchronous copies, S of 16 pixels into a warp's
// registers. Both kernels of fast.cuh begin with it.
//
// In shared memory: the tile [channels][pixels + 8] or [pixels][channels + 16 bytes]; the ring [slots][parts][rows][chunk +
// 16 bytes] of prototypes; scratch, in the ring's place where the prototypes do not stay; a few numbers per pixel. Those paddings keep ldmatrix and the stores free of bank conflicts.
#pragma once
#include "fast.cuh"
#include "generic_tile.cuh"
#include "split.cuh"

namespace proac::cuda {

// A warp's registers: s[n][e] belongs to pixel g + 8 (e / 2) of its 16, and to class 8 n + 2 q + e % 2, where g = lane / 4
// and q = lane % 4, as mma.sync lays out its result.
template <class T, int kChunkBytes>
struct Fast {
  static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(T));  // channels of a chunk
  static constexpr int kStep = 32 / static_cast<int>(sizeof(T));            // channels of an mma
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));          // elements of an asynchronous copy
  static constexpr int kPitch = kChunkBytes + 16;                           // bytes between rows of the ring
};
constexpr int kWarpPixels = 16;
// Floats from a pixel to the next one in the coefficients of up to 32 classes (fast_prototypes.cuh).
constexpr int class_group_pitch(int classes) { return (classes < 32 ? classes : 32) + 4; }

struct PixelArrays {  // in shared memory, one number per pixel of the tile
  int* label;
  float *weight, *log_weight, *positive, *weighted, *excess;
};
constexpr int kPixelArrays = 6;
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
  out.label[t] = pixel.label, out.weight[t] = pixel.weight, out.log_weight[t] = logf(pixel.weight);
}

// Offset of an element of the tile.
template <bool kRows>
__device__ __forceinline__ int at(int pitch, int pixel, int channel) {
  return kRows ? pixel * pitch + channel : channel * pitch + pixel;
}

// Chunk `chunk` of the prototypes into its slot. Rows beyond the last class are zero. Eight lanes take 16 bytes of eight rows:
// the pitch of the rows puts those into banks of their own, while a warp still reads whole sectors.
template <class T, int kChunkBytes>
__device__ __forceinline__ void fetch_prototypes(const FastArguments& a, char* ring, int chunk) {
  using F = Fast<T, kChunkBytes>;
  constexpr int kPieces = kChunkBytes / 16;
  int rows = a.plan.rows, slot = chunk % a.plan.slots, num_classes = static_cast<int>(a.pixels.num_classes);
  char* to = ring + slot * Split<T>::kParts * rows * F::kPitch;
  const T* from = static_cast<const T*>(a.split) + chunk * F::kChunk;
  for (int i = threadIdx.x; i < Split<T>::kParts * rows * kPieces; i += blockDim.x) {
    int row = i / (8 * kPieces) * 8 + i % 8, piece = i / 8 % kPieces;
    bool real = (row < rows ? row : row - rows) < num_classes;
    __pipeline_memcpy_async(to + row * F::kPitch + piece * 16, from + row * a.plan.channels + piece * F::kVector, 16,
                            real ? 0 : 16);
  }
}

// Channels [chunk * kChunk, ...) of the tile's features. What lies outside is zero.
template <class T, int kChunkBytes, bool kRows>
__device__ __forceinline__ void fetch_features(const FastArguments& a, const TilePlace& place, T* tile, int chunk) {
  using F = Fast<T, kChunkBytes>;
  const Features& x = a.features;
  int t = threadIdx.x, pitch = a.plan.tile_pitch, channels = static_cast<int>(x.channels), first = chunk * F::kChunk;
  const T* from = static_cast<const T*>(x.data) + place.image * x.stride_batch + place.first * x.stride_pixel;
  auto copy = [&](int pixel, int channel, int left) {  // 16 bytes, of which `left` elements exist
    left = left < 0 ? 0 : left < F::kVector ? left : F::kVector;
    const T* source = left ? from + channel * x.stride_channel + pixel * x.stride_pixel : from;
    __pipeline_memcpy_async(tile + at<kRows>(pitch, pixel, channel), source, 16, (F::kVector - left) * sizeof(T));
  };
  if (a.plan.aligned && kRows) {
    // Eight lanes write 16 bytes each to banks of their own: pixels that far apart which 16 bytes of padding part them.
    constexpr int kPieces = kChunkBytes / 16, kTogether = 8 / kPieces, kApart = 8 / kTogether;
#pragma unroll
    for (int pass = 0; pass < kPieces / 2; ++pass) {  // two threads to a pixel
      int i = pass * blockDim.x + t, order = i / kPieces, channel = first + i % kPieces * F::kVector;
      int pixel = order / 8 * 8 + order % kTogether * kApart + order % 8 / kTogether;
      copy(pixel, channel, pixel < place.pixels ? channels - channel : 0);
    }
  } else if (a.plan.aligned) {
    int pieces = a.plan.tile_pixels / F::kVector, pixel = t % pieces * F::kVector;
#pragma unroll
    for (int row = 0; row < F::kChunk; row += 2 * F::kVector) {
      int channel = first + row + t / pieces;
      copy(pixel, channel, channel < channels ? place.pixels - pixel : 0);
    }
  } else {
    for (int i = t; i < F::kChunk * a.plan.tile_pixels; i += blockDim.x) {
      int pixel = kRows ? i / F::kChunk : i % a.plan.tile_pixels,
          channel = first + (kRows ? i % F::kChunk : i / a.plan.tile_pixels);
      bool inside = pixel < place.pixels && channel < channels;
      tile[at<kRows>(pitch, pixel, channel)] =
          inside ? from[channel * x.stride_channel + pixel * x.stride_pixel] : narrow<T>(0.f);
    }
  }
}

// The warp's 16 pixels x kStep channels as operand A, and the sum of their squares added to squares[0] (pixel g) and [1].
template <class T, bool kRows>
__device__ __forceinline__ void load_features(uint32_t (&a)[4], const T* tile, int pitch, int channel,
                                              float (&squares)[2]) {
  int lane = threadIdx.x & 31, pixel = (threadIdx.x >> 5) * kWarpPixels;
  constexpr int kHalf = 16 / static_cast<int>(sizeof(T));
  if constexpr (kRows) {
    ldmatrix(a, tile + (pixel + (lane & 15)) * pitch + channel + (lane >> 4) * kHalf);
  } else if constexpr (sizeof(T) == 2) {
    ldmatrix_transposed(a, tile + (channel + (lane & 7) + (lane >> 4) * 8) * pitch + pixel + (lane >> 3 & 1) * 8);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j)
      a[j] = __float_as_uint(tile[(channel + (lane & 3) + (j >> 1) * 4) * pitch + pixel + (lane >> 2) + (j & 1) * 8]);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (sizeof(T) == 2) {
      float2 v = Split<T>::unpack(a[j]);
      squares[j & 1] += v.x * v.x + v.y * v.y;
    } else {
      float v = __uint_as_float(a[j]);
      squares[j & 1] += v * v;
    }
  }
}

// high + low = x, each in TF32
__device__ __forceinline__ void split_tf32(uint32_t x, uint32_t& high, uint32_t& low) {
  high = to_tf32(__uint_as_float(x));
  low = to_tf32(__uint_as_float(x) - __uint_as_float(high));
}

// s += features x prototypes over kStep channels that begin `offset` bytes into the slot's rows. Small products first.
template <class T, int kTiles, int kChunkBytes>
__device__ __forceinline__ void multiply_step(float (&s)[kTiles][4], const uint32_t (&a)[4], const char* slot, int rows,
                                              int tiles, int offset) {
  constexpr int kPitch = Fast<T, kChunkBytes>::kPitch;
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 2) {
    const char* p = slot + ((lane >> 4) * rows + (lane & 7)) * kPitch + offset + (lane >> 3 & 1) * 16;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) break;
      uint32_t b[4];  // high part, channels 0-7 and 8-15; low part
      ldmatrix(b, p + n * 8 * kPitch);
      mma(T(), s[n], a, b[2], b[3]);
      mma(T(), s[n], a, b[0], b[1]);
    }
  } else {
    uint32_t high[4], low[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) split_tf32(a[j], high[j], low[j]);
    const char* p = slot + (lane >> 2) * kPitch + offset + (lane & 3) * 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) break;
      const uint32_t* b = reinterpret_cast<const uint32_t*>(p + n * 8 * kPitch);
      uint32_t b0, b1, c0, c1;
      split_tf32(b[0], b0, c0);
      split_tf32(b[4], b1, c1);
      mma(T(), s[n], low, b0, b1);
      mma(T(), s[n], high, c0, c1);
      mma(T(), s[n], high, b0, b1);
    }
  }
}

// 1 / |x| of pixels g and g + 8: 0 for a zero vector, NaN beyond float32.
template <class T, bool kRows>
__device__ __forceinline__ void invert_norms(float (&inverse)[2], float (&squares)[2], const T* tile, int pitch,
                                             int channels) {
  int lane = threadIdx.x & 31, pixel = (threadIdx.x >> 5) * kWarpPixels + (lane >> 2);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float sum = squares[j], scale = 1.f;
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    if (__any_sync(kAllLanes, !(sum <= 1e37f))) {  // squares that overflow: once more, scaled
      float again = 0.f;
      for (int d = lane & 3; d < channels; d += 4) {
        float v = widen<float>(tile[at<kRows>(pitch, pixel + 8 * j, d)]) * 0x1p-70f;
        again += v * v;
      }
      again += __shfl_xor_sync(kAllLanes, again, 1);
      again += __shfl_xor_sync(kAllLanes, again, 2);
      if (!(sum <= 1e37f)) sum = again, scale = 0x1p70f;
    }
    float norm = sqrtf(sum) * scale;
    inverse[j] = isinf(norm) ? not_a_number() : norm <= static_cast<float>(kEps) ? 0.f : 1.f / norm;
  }
}

// S of the warp's 16 pixels and all classes. On return every asynchronous copy has arrived; other warps may still be at it.
// The tile has room for all channels, so that its chunks come as far ahead as the ring of prototypes goes.
template <class T, int kTiles, int kChunkBytes, bool kRows>
__device__ __forceinline__ void similarities(const FastArguments& a, const TilePlace& place, T* tile, char* ring,
                                             bool with_prototypes, float (&s)[kTiles][4], float (&inverse)[2]) {
  using F = Fast<T, kChunkBytes>;
  int chunks = a.plan.channels / F::kChunk, rows = a.plan.rows, pitch = a.plan.tile_pitch,
      tiles = (static_cast<int>(a.pixels.num_classes) + 7) / 8;
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int e = 0; e < 4; ++e) s[n][e] = 0.f;
#pragma unroll 1
  for (int chunk = -a.plan.ahead; chunk < chunks; ++chunk) {
    if (chunk >= 0) {
      WAIT_PRIOR(32, a.plan.ahead - 1);
      SYNC_THREADS(33);  // this chunk is there for all, and the slot of the last one is free
    }
    if (chunk + a.plan.ahead < chunks) {
      fetch_features<T, kChunkBytes, kRows>(a, place, tile, chunk + a.plan.ahead);
      if (with_prototypes) fetch_prototypes<T, kChunkBytes>(a, ring, chunk + a.plan.ahead);
    }
    __pipeline_commit();
    if (chunk < 0) continue;
    const char* slot = ring + chunk % a.plan.slots * Split<T>::kParts * rows * F::kPitch;
#pragma unroll
    for (int step = 0; step < kChunkBytes / 32; ++step) {
      uint32_t fragment[4];
      load_features<T, kRows>(fragment, tile, pitch, chunk * F::kChunk + step * F::kStep, squares);
      multiply_step<T, kTiles, kChunkBytes>(s, fragment, slot, rows, tiles, step * 32);
    }
  }
  invert_norms<T, kRows>(inverse, squares, tile, pitch, static_cast<int>(a.features.channels));
  float inverse_tau = static_cast<float>(1.0 / a.temperature) / Split<T>::kScale;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)  // one factor after the other: their product may be too small for a float
    for (int e = 0; e < 4; ++e) s[n][e] = s[n][e] * inverse[e >> 1] * inverse_tau;
}

// What a thread knows of its two pixels, g and g + 8 of its warp's. Bit 2 n + c of a mask stands for class 8 n + 2 q + c, that
// of s[n][2 j + c]: loops over registers must be unrolled, and a bit is all that they ask there.
template <int kTiles>
struct MyPixels {
  static constexpr int kWords = (2 * kTiles + 31) / 32;
  int place[2], label[2];
  float weight[2], log_weight[2];
  uint32_t negative[2][kWords];  // i in N_k
  __device__ __forceinline__ bool is_negative(int j, int n, int c) const {
    return negative[j][n / 16] >> (n % 16 * 2 + c) & 1u;
  }
};

template <int kTiles>
__device__ __forceinline__ MyPixels<kTiles> my_pixels(const FastArguments& a, const TilePlace& place,
                                                      const PixelArrays& arrays) {
  MyPixels<kTiles> mine;
  int num_classes = static_cast<int>(a.pixels.num_classes);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    int p = (threadIdx.x >> 5) * kWarpPixels + (threadIdx.x >> 2 & 7) + 8 * j;
    mine.place[j] = p, mine.label[j] = arrays.label[p], mine.weight[j] = arrays.weight[p],
    mine.log_weight[j] = arrays.log_weight[p];
    int64_t index = 0;
    uint32_t key = 0;
    if (a.sampling.thresholds && mine.label[j] >= 0) {
      index = place.image * a.features.pixels + place.first + p + a.sampling.rng[1];
      key = philox_key(a.sampling.rng[0], index);
    }
#pragma unroll
    for (int word = 0; word < MyPixels<kTiles>::kWords; ++word) {
      uint32_t bits = 0;
#pragma unroll 1
      for (int bit = 0; bit < 32 && mine.label[j] >= 0; ++bit) {
        int k = (word * 16 + bit / 2) * 8 + (threadIdx.x & 3) * 2 + bit % 2;
        if (k >= num_classes) break;
        if (k != mine.label[j] && (!a.sampling.thresholds || is_drawn(a.sampling, k, key, index))) bits |= 1u << bit;
      }
      mine.negative[j][word] = bits;
    }
  }
  return mine;
}

// S_{y_i,i} of pixels g and g + 8, to all four threads that share them. 0 outside V.
template <int kTiles>
__device__ __forceinline__ void own_similarity(const MyPixels<kTiles>& mine, const float (&s)[kTiles][4],
                                               float (&own)[2]) {
  int q = threadIdx.x & 3;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    own[j] = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      for (int c = 0; c < 2; ++c)
        if (mine.label[j] == n * 8 + q * 2 + c) own[j] = s[n][2 * j + c];
    for (int o = 1; o < 4; o <<= 1) own[j] += __shfl_xor_sync(kAllLanes, own[j], o);
  }
}

// logsumexp_c S_ci of pixels g and g + 8, (5).
template <int kTiles>
__device__ __forceinline__ void pixel_log_z(int num_classes, const float (&s)[kTiles][4], float (&log_z)[2]) {
  int beyond = num_classes - 2 * (threadIdx.x & 3);  // this thread's classes are those with 8 n + c < beyond
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float maximum = minus_infinity(), sum = 0.f;
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      for (int c = 0; c < 2; ++c)
        if (8 * n + c < beyond) maximum = fmaxf(maximum, s[n][2 * j + c]);
    for (int o = 1; o < 4; o <<= 1) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, o));
    float shift = shift_of(maximum);
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
      for (int c = 0; c < 2; ++c)
        if (8 * n + c < beyond) sum += expf(s[n][2 * j + c] - shift);
    for (int o = 1; o < 4; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
    log_z[j] = shift + logf(sum);
  }
}

}  // namespace proac::cuda
