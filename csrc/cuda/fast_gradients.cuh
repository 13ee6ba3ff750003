// Stage (iii) on the fast path, (7) to (11), for the features.
#pragma once
#include "fast_prototypes.cuh"

namespace proac::cuda {

template <int kTiles>
constexpr int kBackwardChunkBytes = kTiles <= 3   ? 128
                                    : kTiles <= 8 ? 64
                                                  : 32;

// S becomes the coefficients dL/dS / tau, (8) to (10), in place. Returns <g_i, xhat_i> of pixels g and g + 8 in `along`.
template <int kTiles>
__device__ __forceinline__ void coefficients(const FastGradients& job, const MyPixels<kTiles>& mine,
                                             float (&s)[kTiles][4], float (&along)[2]) {
  bool pixel_anchor = job.common.pixel_anchor;
  int num_classes = static_cast<int>(job.common.pixels.num_classes), q = threadIdx.x & 3;
  const float* factors = static_cast<const float*>(job.factors);
  float own[2], own_coefficient[2] = {0.f, 0.f}, all_classes[2] = {0.f, 0.f}, pixel_factor[2] = {0.f, 0.f};
  own_similarity(mine, s, own);
  if (pixel_anchor) pixel_log_z(num_classes, s, all_classes);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    along[j] = 0.f;
    if (mine.label[j] < 0) continue;
    const float* factor = factors + mine.label[j];
    if (pixel_anchor) pixel_factor[j] = factors[kPixelFactor * num_classes] * mine.weight[j];
    own_coefficient[j] =
        -factor[kPositiveFactor * num_classes] * mine.weight[j] * sigmoid(factor[kContrast * num_classes] - own[j]);
    if (pixel_anchor) own_coefficient[j] += pixel_factor[j] * (expf(own[j] - all_classes[j]) - 1.f);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    if (n * 8 >= num_classes) break;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      int k = n * 8 + q * 2 + c;
      bool real = k < num_classes;
      float negative_factor = real ? factors[kNegativeFactor * num_classes + k] : 0.f,
            log_z = real ? factors[kFactorLogZ * num_classes + k] : 0.f;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& value = s[n][2 * j + c];
        float g = mine.is_negative(j, n, c) ? negative_factor * expf(value + mine.log_weight[j] - log_z) : 0.f;
        if (pixel_anchor && real) g += pixel_factor[j] * expf(value - all_classes[j]);
        if (mine.label[j] == k) g = own_coefficient[j];
        if (mine.label[j] < 0) g = 0.f;
        along[j] += mine.label[j] < 0 ? 0.f : g * value;
        value = g;
      }
    }
  }
  float tau = static_cast<float>(job.common.temperature);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int o = 1; o < 4; o <<= 1) along[j] += __shfl_xor_sync(kAllLanes, along[j], o);
    along[j] *= tau;
  }
}

// Scales each pixel's coefficients by a power of two so that the largest lies in [1, 2), which keeps float16 above its
// subnormals; for 16-bit features, then splits them: s[n] = (high, low of pixel g, high, low of pixel g + 8), two classes to
// a word. Returns what undoes the scale.
template <class T, int kTiles>
__device__ __forceinline__ void scale_and_split(float (&s)[kTiles][4], float (&undo)[2]) {
  float largest[2] = {0.f, 0.f}, scale[2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
    for (int e = 0; e < 4; ++e) largest[e >> 1] = fmaxf(largest[e >> 1], fabsf(s[n][e]));
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    for (int o = 1; o < 4; o <<= 1) largest[j] = fmaxf(largest[j], __shfl_xor_sync(kAllLanes, largest[j], o));
    int exponent = __float_as_int(largest[j]) >> 23;
    exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    scale[j] = __int_as_float((254 - exponent) << 23), undo[j] = __int_as_float(exponent << 23);
  }
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float x = s[n][2 * j] * scale[j], y = s[n][2 * j + 1] * scale[j];
      if constexpr (sizeof(T) == 2) {
        uint32_t high = Split<T>::pack(x, y);
        float2 back = Split<T>::unpack(high);
        y = __uint_as_float(Split<T>::pack(x - back.x, y - back.y));
        x = __uint_as_float(high);
      }
      s[n][2 * j] = x, s[n][2 * j + 1] = y;
    }
  }
}

// sum += coefficients x prototypes for the warp's 16 pixels and 8 channels from `channel` of the slot on. Column c of the
// result is channel c for 16-bit features, channel c / 2 + 4 (c % 2) for float32.
template <class T, int kTiles, int kChunkBytes>
__device__ __forceinline__ void multiply_back(float (&sum)[4], const float (&s)[kTiles][4], const char* slot, int rows,
                                              int tiles, int channel) {
  constexpr int kPitch = Fast<T, kChunkBytes>::kPitch;
  int lane = threadIdx.x & 31;
  if constexpr (sizeof(T) == 2) {
    const char* p = slot + ((lane >> 4) * rows + (lane & 15)) * kPitch + channel * 2;
#pragma unroll
    for (int n = 0; n < kTiles; n += 2) {
      if (n >= tiles) break;
      constexpr int kLast = kTiles - 1;
      const int m = n < kLast ? n + 1 : kLast;  // where kTiles is odd, the last product's second half is zero
      const uint32_t high[4] = {__float_as_uint(s[n][0]), __float_as_uint(s[n][2]),
                                n < kLast ? __float_as_uint(s[m][0]) : 0u, n < kLast ? __float_as_uint(s[m][2]) : 0u};
      const uint32_t low[4] = {__float_as_uint(s[n][1]), __float_as_uint(s[n][3]),
                               n < kLast ? __float_as_uint(s[m][1]) : 0u, n < kLast ? __float_as_uint(s[m][3]) : 0u};
      uint32_t b[4];  // high part of classes 0-7 and 8-15; low part
      ldmatrix_transposed(b, p + n * 8 * kPitch);
      mma(T(), sum, low, b[0], b[1]);
      mma(T(), sum, high, b[2], b[3]);
      mma(T(), sum, high, b[0], b[1]);
    }
  } else {
    int g = lane >> 2, q = lane & 3;
    const char* p = slot + 2 * q * kPitch + (channel + g / 2 + g % 2 * 4) * 4;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      if (n >= tiles) break;
      // the order of classes within a product is free: column 2 q is operand A's q, column 2 q + 1 its q + 4
      const uint32_t a[4] = {__float_as_uint(s[n][0]), __float_as_uint(s[n][2]), __float_as_uint(s[n][1]),
                             __float_as_uint(s[n][3])};
      uint32_t high[4], low[4], b0, b1, c0, c1;
#pragma unroll
      for (int j = 0; j < 4; ++j) split_tf32(a[j], high[j], low[j]);
      split_tf32(*reinterpret_cast<const uint32_t*>(p + n * 8 * kPitch), b0, c0);
      split_tf32(*reinterpret_cast<const uint32_t*>(p + (n * 8 + 1) * kPitch), b1, c1);
      mma(T(), sum, low, b0, b1);
      mma(T(), sum, high, c0, c1);
      mma(T(), sum, high, b0, b1);
    }
  }
}

// (11) for a thread's two pixels.
struct Direction {
  float inverse[2], along[2], undo[2];
  bool zero[2];  // ignored pixels, zero vectors, D = 1
  __device__ __forceinline__ float gradient(int j, float sum, float x) const {
    return zero[j] ? 0.f : (sum * undo[j] - along[j] * (x * inverse[j])) * inverse[j];
  }
};

// Replaces 16 channels (8 where kWidth is) of the warp's pixels in the tile by their gradient.
template <class T, bool kRows, int kWidth>
__device__ __forceinline__ void replace(T* tile, int pitch, int channel, const float (&sum)[2][4], const Direction& d) {
  int lane = threadIdx.x & 31, g = lane >> 2, q = lane & 3, pixel = (threadIdx.x >> 5) * kWarpPixels;
  if constexpr (sizeof(T) == 4) {
    T* mine = tile + at<kRows>(pitch, pixel + g, channel + q);
    auto place = [&](int h, int e) { return at<kRows>(pitch, 8 * (e >> 1), 8 * h + 4 * (e & 1)); };
    float x[kWidth / 8][4];
#pragma unroll
    for (int h = 0; h < kWidth / 8; ++h)
      for (int e = 0; e < 4; ++e) x[h][e] = mine[place(h, e)];
    __syncwarp();
#pragma unroll
    for (int h = 0; h < kWidth / 8; ++h)
      for (int e = 0; e < 4; ++e) mine[place(h, e)] = d.gradient(e >> 1, sum[h][e], x[h][e]);
  } else {
    uint32_t x[4];  // x[2 h + j]: channels 8 h + 2 q and one more of pixel g + 8 j
    if constexpr (kRows)
      ldmatrix(x, tile + (pixel + (lane & 7) + (lane >> 3 & 1) * 8) * pitch + channel + (lane >> 4) * 8);
    else
      ldmatrix_transposed(x, tile + (channel + (lane & 7) + (lane >> 4) * 8) * pitch + pixel + (lane >> 3 & 1) * 8);
    __syncwarp();
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float2 v = Split<T>::unpack(x[2 * h + j]);
        uint32_t word = Split<T>::pack(d.gradient(j, sum[h][2 * j], v.x), d.gradient(j, sum[h][2 * j + 1], v.y));
        if constexpr (kRows)
          *reinterpret_cast<uint32_t*>(tile + (pixel + g + 8 * j) * pitch + channel + 8 * h + 2 * q) = word;
        else  // now the lane's channel is g, its pixels 2 q and one more
          *reinterpret_cast<uint32_t*>(tile + (channel + 8 * h + g) * pitch + pixel + 8 * j + 2 * q) = movmatrix(word);
      }
  }
}

// The tile to device memory, 16 bytes at a time where the gradient's strides allow.
template <class T, bool kRows>
__device__ __forceinline__ void write_tile(const FastGradients& job, const TilePlace& place, const T* tile) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const FastPlan& plan = job.common.plan;
  int channels = static_cast<int>(job.common.features.channels);
  T* to = static_cast<T*>(job.grad.data) + place.image * job.grad.stride_batch + place.first * job.grad.stride_pixel;
  int inner = kRows ? channels : place.pixels, outer = kRows ? place.pixels : channels;
  int64_t step = kRows ? job.grad.stride_pixel : job.grad.stride_channel;
  if (job.grad_aligned) {
    int pieces = (inner + kVector - 1) / kVector;
    for (int i = threadIdx.x; i < pieces * outer; i += blockDim.x) {
      int row = i / pieces, column = i % pieces * kVector;
      const T* from = tile + row * plan.tile_pitch + column;
      T* target = to + row * step + column;
      if (column + kVector <= inner)
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
      else
        for (int c = 0; column + c < inner; ++c) target[c] = from[c];
    }
  } else {
    for (int i = threadIdx.x; i < inner * outer; i += blockDim.x) {
      int row = i / inner, column = i % inner, pixel = kRows ? row : column, channel = kRows ? column : row;
      to[channel * job.grad.stride_channel + pixel * job.grad.stride_pixel] = tile[row * plan.tile_pitch + column];
    }
  }
}

// Load a tile -> S in registers -> coefficients -> product with the prototypes, into the tile -> write it.
template <class T, int kTiles, bool kRows>
__global__ void __launch_bounds__(256, kTiles <= 8 ? 2 : 1)
    fast_gradients_kernel(const __grid_constant__ FastGradients job) {
  constexpr int kChunkBytes = kBackwardChunkBytes<kTiles>;
  using F = Fast<T, kChunkBytes>;
  DYNAMIC_SHARED(memory);
  const FastArguments& a = job.common;
  T* tile = reinterpret_cast<T*>(memory);
  char* ring = memory + a.plan.tile_bytes;
  PixelArrays arrays = pixel_arrays(memory + a.plan.arrays_offset, a.plan.tile_pixels);
  int chunks = a.plan.channels / F::kChunk, tiles = (static_cast<int>(a.pixels.num_classes) + 7) / 8;
  for (int64_t n = blockIdx.x; n < a.plan.tiles; n += gridDim.x) {
    TilePlace place = place_of(a, n);
    SYNC_THREADS(38);  // the last tile is written
    read_pixels(a, place, arrays, nullptr);
    float s[kTiles][4];
    Direction direction;
    bool with_prototypes = !a.plan.resident || n == blockIdx.x;
    similarities<T, kTiles, kChunkBytes, kRows>(a, place, tile, ring, with_prototypes, s, direction.inverse);
    MyPixels<kTiles> mine = my_pixels<kTiles>(a, place, arrays);
    coefficients(job, mine, s, direction.along);
    if (job.sums.sum)
      add_prototype_gradient<T, kTiles, kRows>(job, mine, arrays, s, direction.inverse, tile,
                                               reinterpret_cast<float*>(memory + a.plan.scratch_offset));
    if (!job.grad.data) continue;
    scale_and_split<T, kTiles>(s, direction.undo);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      direction.undo[j] /= Split<T>::kScale;
      direction.zero[j] = mine.label[j] < 0 || direction.inverse[j] == 0.f || a.features.channels == 1;
    }
    // nobody reads the ring or its scratch any more, nor other warps' pixels, which the product replaces
    if (!a.plan.resident || job.sums.sum)
      SYNC_THREADS(39);
    else
      __syncwarp();
#pragma unroll 1
    for (int chunk = a.plan.resident ? 0 : -a.plan.ahead; chunk < chunks; ++chunk) {
      if (!a.plan.resident) {
        if (chunk >= 0) {
          WAIT_PRIOR(40, a.plan.ahead - 1);
          SYNC_THREADS(41);
        }
        if (chunk + a.plan.ahead < chunks) fetch_prototypes<T, kChunkBytes>(a, ring, chunk + a.plan.ahead);
        __pipeline_commit();
        if (chunk < 0) continue;
      }
      const char* slot = ring + chunk % a.plan.slots * Split<T>::kParts * a.plan.rows * F::kPitch;
      constexpr int kWidth = F::kChunk < 16 ? 8 : 16;  // channels at a time: two independent chains of products
#pragma unroll 1
      for (int channel = 0; channel < F::kChunk; channel += kWidth) {
        float sum[2][4] = {};
        multiply_back<T, kTiles, kChunkBytes>(sum[0], s, slot, a.plan.rows, tiles, channel);
        if (kWidth == 16) multiply_back<T, kTiles, kChunkBytes>(sum[1], s, slot, a.plan.rows, tiles, channel + 8);
        replace<T, kRows, kWidth>(tile, a.plan.tile_pitch, chunk * F::kChunk + channel, sum, direction);
      }
    }
    SYNC_THREADS(42);
    write_tile<T, kRows>(job, place, tile);
  }
}

template <class T, int kTiles>
cudaError_t fast_gradients_of(const FastGradients& job, cudaStream_t stream) {
  const FastPlan& plan = job.common.plan;
  auto kernel = plan.pixels_first ? fast_gradients_kernel<T, kTiles, true> : fast_gradients_kernel<T, kTiles, false>;
  return launch<FastGradients>(kernel, plan.blocks, 2 * plan.tile_pixels, plan.shared_bytes, stream, job);
}
template <class T>
cudaError_t fast_gradients_as(const FastGradients& job, cudaStream_t stream) {
  if (job.common.plan.classes == 24) return fast_gradients_of<T, 3>(job, stream);
  if (job.common.plan.classes == 64) return fast_gradients_of<T, 8>(job, stream);
  return fast_gradients_of<T, 32>(job, stream);
}

}  // namespace proac::cuda
