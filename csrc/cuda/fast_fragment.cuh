// Operands of the tensor cores, from shared memory into a warp's registers, and their products.
//
// mma.sync lays out a product of 16 pixels and 8 classes over a warp so that element e of a thread belongs to pixel g + 8 (e / 2)
// and class 2 q + e % 2, where g = lane / 4 and q = lane % 4. Everything here and in the files above follows that.
#pragma once
#include "fast_shape.cuh"

namespace proac::cuda {

// S of a warp's pixels and all classes: s[f][n] has sixteen f of the pixels and eight n of the classes.
template <class T, int kEights>
using Accumulators = float[Shape<T, kEights>::kFragments][kEights][4];

// Operand A: 16 pixels of a step's channels. 16-bit features are exact, float32 ones have two parts.
template <class T>
struct PixelFragment {
  uint32_t x[4];
};
template <>
struct PixelFragment<float> {
  uint32_t high[4], low[4];
};

// Operand B: 8 classes of a step's channels, high part and low part.
struct ClassFragment {
  uint32_t high[2], low[2];
};

// Reads the warp's pixels from the tile.
template <class T, int kEights, bool kRows>
struct PixelReader {
  using S = Shape<T, kEights>;
  static constexpr bool kPlanes32 = !kRows && S::kSize == 4;
  SharedAddress base[S::kFragments * (kPlanes32 ? 2 : 1)];
  int pitch, step_bytes;

  __device__ __forceinline__ PixelReader(SharedAddress tile, const TileLayout<T, kRows>& layout) {
    Lane my;
    int first = (threadIdx.x >> 5) * S::kWarpPixels;
    pitch = layout.pitch * S::kSize;
    step_bytes = kRows ? 32 : S::kStep * pitch;
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f) {
      int pixel = first + 16 * f;
      if constexpr (kRows)
        base[f] = tile + layout(pixel + (my.lane & 15), (my.lane >> 4) * S::kVector) * S::kSize;
      else if constexpr (S::kSize == 2)
        base[f] = tile + layout(pixel + (my.lane >> 3 & 1) * 8, (my.lane & 7) + (my.lane >> 4) * 8) * S::kSize;
      else
        for (int j = 0; j < 2; ++j) base[2 * f + j] = tile + layout(pixel + my.g + 8 * j, my.q) * S::kSize;
    }
#pragma unroll
    for (auto& place : base) keep<S::kKeep>(place);
  }

  __device__ __forceinline__ void advance() {
#pragma unroll
    for (auto& place : base) place = place + step_bytes;
  }
  // The step that lies `offset` bytes from the one at hand, which is the tile's first at the beginning.
  __device__ __forceinline__ void read(uint32_t (&x)[4], int f, int offset) const {
    if constexpr (kPlanes32) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = load_shared<uint32_t>(base[2 * f + (i & 1)] + offset + (i >> 1) * 4 * pitch);
    } else if constexpr (kRows) {
      ldmatrix(x, base[f] + offset);
    } else {
      ldmatrix_transposed(x, base[f] + offset);
    }
  }
};

__device__ __forceinline__ void split(PixelFragment<float>& a, const uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) split_tf32(x[i], a.high[i], a.low[i]);
}
template <class T>
__device__ __forceinline__ void split(PixelFragment<T>& a, const uint32_t (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a.x[i] = x[i];
}

// Reads a block of prototypes for S: channels are what is summed over.
template <class T>
struct ClassReader {
  int lane_offset;
  __device__ __forceinline__ ClassReader() {
    Lane my;
    lane_offset = sizeof(T) == 2 ? my.lane * 16 : PrototypeBlock<T>::row(my.g) * 32 + my.q * 8;
  }
  // The block that lies `offset` bytes behind the first.
  __device__ __forceinline__ ClassFragment read(SharedAddress first, int offset) const {
    ClassFragment b;
    if constexpr (sizeof(T) == 2) {
      uint32_t r[4];
      ldmatrix(r, first + lane_offset + offset);
      b.high[0] = r[0], b.high[1] = r[1], b.low[0] = r[2], b.low[1] = r[3];
    } else {
      uint2 pair = load_shared<uint2>(first + lane_offset, offset);
      split_tf32(pair.x, b.high[0], b.low[0]);
      split_tf32(pair.y, b.high[1], b.low[1]);
    }
    return b;
  }
};

// sum = features x prototypes where kFirst, else sum += it. Small products first.
template <bool kFirst, class T>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const PixelFragment<T>& a, const ClassFragment& b) {
  if constexpr (kFirst)
    multiply(T(), sum, a.x, b.low[0], b.low[1]);
  else
    mma(T(), sum, a.x, b.low[0], b.low[1]);
  mma(T(), sum, a.x, b.high[0], b.high[1]);
}
template <bool kFirst>
__device__ __forceinline__ void multiply_parts(float (&sum)[4], const PixelFragment<float>& a, const ClassFragment& b) {
  if constexpr (kFirst)
    multiply(0.f, sum, a.low, b.high[0], b.high[1]);
  else
    mma(0.f, sum, a.low, b.high[0], b.high[1]);
  mma(0.f, sum, a.high, b.low[0], b.low[1]);
  mma(0.f, sum, a.high, b.high[0], b.high[1]);
}

// Sums of squares of the warp's pixels g and g + 8 over channels. Of 16-bit features the tensor cores take them, as the diagonal
// of (pixels x channels) (channels x pixels); its elements lie with the threads for which g / 2 = q.
template <class T>
struct SquaresOfStage {
  float part[2][4];
  template <bool kFirst>
  __device__ __forceinline__ void add(const uint32_t (&x)[4]) {
    if constexpr (kFirst) {
      multiply(T(), part[0], x, x[0], x[2]);
      multiply(T(), part[1], x, x[1], x[3]);
    } else {
      mma(T(), part[0], x, x[0], x[2]);
      mma(T(), part[1], x, x[1], x[3]);
    }
  }
  __device__ __forceinline__ void finish(float (&squares)[2]) const {
    bool odd = threadIdx.x >> 2 & 1;
    squares[0] += odd ? part[0][1] : part[0][0];
    squares[1] += odd ? part[1][3] : part[1][2];
  }
  static __device__ __forceinline__ float over_threads(float sum) {
    int lane = threadIdx.x & 31;
    return __shfl_sync(kAllLanes, sum, (lane & 28) + (lane >> 3));
  }
};
template <>
struct SquaresOfStage<float> {
  float part[2];
  template <bool kFirst>
  __device__ __forceinline__ void add(const uint32_t (&x)[4]) {
    if constexpr (kFirst) part[0] = part[1] = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) add_square(part[i & 1], x[i]);
  }
  __device__ __forceinline__ void finish(float (&squares)[2]) const { squares[0] += part[0], squares[1] += part[1]; }
  static __device__ __forceinline__ float over_threads(float sum) {
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    return sum + __shfl_xor_sync(kAllLanes, sum, 2);
  }
};

}  // namespace proac::cuda
