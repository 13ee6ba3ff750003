// Stage (iii) on the fast path for the features: the coefficients' product with the prototypes, and (11).
#pragma once
#include "fast_coefficients.cuh"
#include "fast_prototypes.cuh"

namespace proac::cuda {

// sum = coefficients x prototypes for the warp's pixels and 8 channels of a step, the first or second ones. `block` is the step's
// first block. Column c of the result is channel c for 16-bit features, channel c / 2 + 4 (c % 2) for float32.
template <class T, int kEights>
__device__ __forceinline__ void multiply_back(float (&sum)[Shape<T, kEights>::kFragments][4],
                                              const Accumulators<T, kEights>& s, const LowParts<T, kEights>& lows,
                                              SharedAddress block, int eights) {
  using S = Shape<T, kEights>;
  if constexpr (S::kSize == 2) {
#pragma unroll
    for (int n = 0; n < kEights; n += 2) {
      if (n >= eights) break;
      constexpr int kLast = kEights - 1;
      const int m = n < kLast ? n + 1 : kLast;  // where kEights is odd, the last product's second half is zero
      uint32_t b[4];                            // high part of classes 0-7 and 8-15; low part
      ldmatrix_transposed(b, block + n * S::kBlock);
#pragma unroll
      for (int f = 0; f < S::kFragments; ++f) {
        uint32_t a[2][4];
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            a[part][j] = __float_as_uint(s[f][n][2 * j + part]);
            a[part][2 + j] = n < kLast ? __float_as_uint(s[f][m][2 * j + part]) : 0u;
          }
        if (n == 0)
          multiply(T(), sum[f], a[1], b[0], b[1]);
        else
          mma(T(), sum[f], a[1], b[0], b[1]);
        mma(T(), sum[f], a[0], b[2], b[3]);
        mma(T(), sum[f], a[0], b[0], b[1]);
      }
    }
  } else {
    // the order of classes within a product is free: column 2 q is operand A's q, column 2 q + 1 its q + 4
    constexpr int kTogether = 2;  // eights of classes that the tensor cores sum
    Lane my;
    SharedAddress even = block + PrototypeBlock<T>::row(2 * my.q) * 32 + my.g * 4,
                  odd = block + PrototypeBlock<T>::row(2 * my.q + 1) * 32 + my.g * 4;
#pragma unroll
    for (int first = 0; first < kEights; first += kTogether) {
      if (first >= eights) break;
      float part[4];
#pragma unroll
      for (int n = first; n < first + kTogether && n < kEights; ++n) {
        if (n >= eights) break;
        PixelFragment<float> a;
        ClassFragment b;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int e = (i & 1) * 2 + (i >> 1);
          if constexpr (LowParts<T, kEights>::kHeld)
            a.high[i] = __float_as_uint(s[0][n][e]), a.low[i] = __float_as_uint(lows.value[n][e]);
          else
            split_tf32(__float_as_uint(s[0][n][e]), a.high[i], a.low[i]);
        }
        split_tf32(load_shared<uint32_t>(even, n * S::kBlock), b.high[0], b.low[0]);
        split_tf32(load_shared<uint32_t>(odd, n * S::kBlock), b.high[1], b.low[1]);
        if (n == first)
          multiply_parts<true>(part, a, b);
        else
          multiply_parts<false>(part, a, b);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[0][e] = first == 0 ? part[e] : sum[0][e] + part[e];
    }
  }
}

// (11) for a thread's pixels: gradient = sum * scale + (x * inverse) * back, or 0 for ignored pixels, zero vectors and D = 1.
template <int kFragments>
struct Direction {
  float inverse[kFragments][2], back[kFragments][2];
  float scale[kFragments][2];  // negative where the gradient is 0
  __device__ __forceinline__ void finish(const MyPixels<kFragments>& mine, const float (&along)[kFragments][2],
                                         const float (&undo)[kFragments][2], float kept_scale, int channels) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        bool zero = mine.label[f][j] < 0 || inverse[f][j] == 0.f || channels == 1;
        scale[f][j] = zero ? -1.f : undo[f][j] / kept_scale * inverse[f][j];
        back[f][j] = -along[f][j] * inverse[f][j];
      }
  }
  __device__ __forceinline__ float gradient(int f, int j, float sum, float x) const {
    return fmaf(sum, scale[f][j], back[f][j] * (x * inverse[f][j]));
  }
  __device__ __forceinline__ bool is_zero(int f, int j) const { return scale[f][j] < 0.f; }
};

// Replaces a step's channels of the warp's pixels by their gradient.
template <class T, int kEights, bool kRows>
struct TileWriter {
  using S = Shape<T, kEights>;
  SharedAddress base[S::kFragments][2];
  int next_eight;  // bytes from 8 channels to the next ones
  int next_four;   // float32: bytes from a channel to the one 4 after it

  __device__ __forceinline__ TileWriter(SharedAddress tile, const TileLayout<T, kRows>& layout) {
    Lane my;
    int first = (threadIdx.x >> 5) * S::kWarpPixels;
    next_eight = (kRows ? 8 : 8 * layout.pitch) * S::kSize, next_four = next_eight / 2;
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int pixel = first + 16 * f + 8 * j;
        if constexpr (S::kSize == 4)
          base[f][j] = tile + layout(pixel + my.g, my.q) * 4;
        else if constexpr (kRows)
          base[f][j] = tile + layout(pixel + my.g, 2 * my.q) * 2;
        else
          base[f][j] = tile + layout(pixel + 2 * my.q, my.g) * 2;
      }
  }

  __device__ __forceinline__ void advance(int step_bytes) {
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) base[f][j] = base[f][j] + step_bytes;
  }
  // x: the features as PixelReader has them.
  __device__ __forceinline__ void write(int f, const uint32_t (&x)[4],
                                        const float (&sum)[S::kStep / 8][S::kFragments][4],
                                        const Direction<S::kFragments>& d) const {
    if constexpr (S::kSize == 4) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int j = e >> 1, h = e & 1;
        float g = d.gradient(f, j, sum[0][f][e], __uint_as_float(x[j + 2 * h]));
        store_shared(base[f][j] + h * next_four, d.is_zero(f, j) ? 0u : __float_as_uint(g));
      }
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float2 v = Split<T>::unpack(x[2 * h + j]);
          uint32_t word =
              Split<T>::pack(d.gradient(f, j, sum[h][f][2 * j], v.x), d.gradient(f, j, sum[h][f][2 * j + 1], v.y));
          if (d.is_zero(f, j)) word = 0u;
          // where planes, the thread's channel is g after it, its pixels 2 q and one more
          store_shared(base[f][j] + h * next_eight, kRows ? word : movmatrix(word));
        }
    }
  }
};

// The tile to device memory, 16 bytes at a time where the gradient's strides allow.
template <class T, bool kRows>
__device__ __forceinline__ void write_tile(const FastGradients& job, const TilePlace& place, const T* tile) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  TileLayout<T, kRows> layout = tile_layout<T, kRows>(job.common.plan);
  int channels = static_cast<int>(job.common.features.channels);
  int inner = kRows ? channels : place.pixels, outer = kRows ? place.pixels : channels;
  T* to = static_cast<T*>(job.grad.data) + place.image * job.grad.stride_batch + place.first * job.grad.stride_pixel;
  int64_t row_stride = kRows ? job.grad.stride_pixel : job.grad.stride_channel,
          inner_stride = kRows ? job.grad.stride_channel : job.grad.stride_pixel;
  // a row for as many neighbouring threads, up to 32, as it has pieces: where they are pixels that is all of them, so that
  // the rows of a thread lie a multiple of 8 apart, and its pixels are exchanged in all of them alike
  int width = job.grad_aligned ? kVector : 1,
      pieces = ((kRows ? inner : job.common.plan.tile_pixels) + width - 1) / width;
  int shift = pieces >= 32 ? 5 : 32 - __clz(pieces - 1);
  int first_row = threadIdx.x >> shift, rows = blockDim.x >> shift;
  for (int column = (threadIdx.x & ((1 << shift) - 1)) * width; column < inner; column += width << shift) {
    T* target = to + first_row * row_stride + column * inner_stride;
    if (job.grad_aligned && column + kVector <= inner) {
      const T* from = tile + (kRows ? layout(first_row, column) : layout(column, first_row));
#pragma unroll 4
      for (int row = first_row; row < outer; row += rows, from += rows * layout.pitch, target += rows * row_stride)
        *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(from);
    } else {
#pragma unroll 1
      for (int row = first_row; row < outer; row += rows, target += rows * row_stride)
#pragma unroll 1
        for (int c = 0; c < width && column + c < inner; ++c)
          target[c * inner_stride] = tile[kRows ? layout(row, column + c) : layout(column + c, row)];
    }
  }
}

// Load a tile -> S in registers -> coefficients -> product with the prototypes, into the tile -> write it.
template <class T, int kEights, bool kRows>
__global__ void __launch_bounds__(Shape<T, kEights>::kMostThreads, Shape<T, kEights>::kBlocks)
    fast_gradients_kernel(const __grid_constant__ FastGradients job) {
  using S = Shape<T, kEights>;
  constexpr int kFragments = S::kFragments;
  DYNAMIC_SHARED(memory);
  const FastArguments& a = job.common;
  T* tile = reinterpret_cast<T*>(memory);
  SharedAddress ring = shared_address(memory + a.plan.tile_bytes);
  PixelArrays arrays = pixel_arrays(memory + a.plan.arrays_offset, a.plan.tile_pixels);
  ClassFactors* classes = reinterpret_cast<ClassFactors*>(arrays.log_weight + a.plan.tile_pixels);
  int eights = (static_cast<int>(a.pixels.num_classes) + 7) / 8, step_bytes = a.plan.rows / 8 * S::kBlock;
  TileLayout<T, kRows> layout = tile_layout<T, kRows>(a.plan);
  read_class_factors(job, classes);
  for (int n = blockIdx.x; n < a.plan.tiles; n += gridDim.x) {
    TilePlace place = place_of(a, n);
    SYNC_THREADS(tile_is_written);
    read_pixels(a, place, arrays, nullptr);
    float s[kFragments][kEights][4], undo[kFragments][2], along[kFragments][2];
    Direction<kFragments> direction;
    bool with_prototypes = !a.plan.resident || n == static_cast<int>(blockIdx.x);
    similarities<T, kEights, kRows>(a, place, tile, ring, with_prototypes, s, direction.inverse);
    coefficients<T, kEights>(job, n, MyPixels<kFragments>(arrays), shared_address(classes), s, along);
    MyPixels<kFragments> mine(pixel_arrays(memory + anew(a.plan.arrays_offset), a.plan.tile_pixels));
    if (job.sums.sum)
      add_prototype_gradient<T, kEights, kRows>(job, mine, arrays, s, direction.inverse, tile,
                                                reinterpret_cast<float*>(memory + a.plan.scratch_offset));
    if (!job.grad.data) continue;
    LowParts<T, kEights> lows;
    scale_and_split<T, kEights>(s, lows, undo, eights);
    direction.finish(mine, along, undo, Split<T>::kScale, static_cast<int>(a.features.channels));
    // nobody reads the ring or its scratch any more, nor other warps' pixels, which the product replaces
    if (!a.plan.resident || job.sums.sum)
      SYNC_THREADS(gradient_ring_is_free);
    else
      __syncwarp();
    PixelReader<T, kEights, kRows> pixels(shared_address(tile), layout);
    TileWriter<T, kEights, kRows> writer(shared_address(tile), layout);
    PrototypeCopy<T, kEights> prototypes(a, ring);
    RingReader<S> reading(ring, S::kSteps * step_bytes, a.plan.slots);
    int ahead = a.plan.ahead;
    int lane_offset = (threadIdx.x >> 3 & 1) * S::kBlock + (threadIdx.x >> 4 & 1) * 256 + (threadIdx.x & 7) * 16;
#pragma unroll 1
    for (int stage = a.plan.resident ? 0 : -ahead; stage < a.plan.stages; ++stage) {
      if (!a.plan.resident) {
        if (stage >= 0) {
          WAIT_FOR_COPIES(copies_of_prototypes_have_arrived, ahead - 1);
          SYNC_THREADS(prototypes_have_arrived);
        }
        if (stage + ahead < a.plan.stages) prototypes.next(true);
        commit_copies();
        if (stage < 0) continue;
      }
      SharedAddress block = reading.slot() + (S::kSize == 2 ? lane_offset : 0);
#pragma unroll 1
      for (int step = 0; step < S::kSteps; ++step) {
        float sum[S::kStep / 8][kFragments][4];
#pragma unroll
        for (int h = 0; h < S::kStep / 8; ++h) multiply_back<T, kEights>(sum[h], s, lows, block + h * 128, eights);
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
          uint32_t x[4];
          pixels.read(x, f, 0);
          __syncwarp();
          writer.write(f, x, sum, direction);
        }
        pixels.advance(), writer.advance(pixels.step_bytes), block = block + step_bytes;
      }
      reading.advance();
    }
    SYNC_THREADS(gradient_is_complete);
    write_tile<T, kRows>(job, place_of(a, anew(n)), tile);
  }
}

template <class T, int kEights>
cudaError_t fast_gradients_of(const FastGradients& job, cudaStream_t stream) {
  const FastPlan& plan = job.common.plan;
  auto kernel = plan.pixels_first ? fast_gradients_kernel<T, kEights, true> : fast_gradients_kernel<T, kEights, false>;
  return launch<FastGradients>(kernel, plan.blocks, plan.threads, plan.shared_bytes, stream, job);
}
template <class T>
cudaError_t fast_gradients_as(const FastGradients& job, cudaStream_t stream) {
  return with_eights(job.common.plan.classes / 8,
                     [&](auto eights) { return fast_gradients_of<T, decltype(eights)::value>(job, stream); });
}

}  // namespace proac::cuda
