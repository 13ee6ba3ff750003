// S of a warp's pixels and all classes, in its registers: both kernels of the fast path begin with it.
//
// The tensor cores truncate their sums, which over all channels would be a bias: a stage of 16 to 64 channels is summed there,
// and added to what came before in float32.
#pragma once
#include "fast_copy.cuh"
#include "fast_fragment.cuh"

namespace proac::cuda {

// 1 / |x|: 0 for a zero vector, NaN beyond float32. `squares` is what the thread has of pixels g and g + 8.
template <class T, bool kRows>
__device__ __forceinline__ void invert_norms(float (&inverse)[2], const float (&squares)[2], const T* tile,
                                             const TileLayout<T, kRows>& layout, int first_pixel, int channels) {
  Lane my;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float sum = SquaresOfStage<T>::over_threads(squares[j]), scale = 1.f;
    if (__any_sync(kAllLanes, !(sum <= 1e37f))) {  // squares that overflow: once more, scaled
      float again = 0.f;
      for (int d = my.q; d < channels; d += 4) {
        float v = widen<float>(tile[layout(first_pixel + my.g + 8 * j, d)]) * 0x1p-70f;
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

// A stage's products, added to `s` and `squares`. `offset`: bytes from the tile's first channels.
template <class T, int kEights, bool kRows>
__device__ __forceinline__ void multiply_stage(Accumulators<T, kEights>& s,
                                               float (&squares)[Shape<T, kEights>::kFragments][2],
                                               const PixelReader<T, kEights, kRows>& pixels, int offset,
                                               SharedAddress slot, int step_bytes, int eights) {
  using S = Shape<T, kEights>;
  PixelFragment<T> a[S::kSteps][S::kFragments];
#pragma unroll
  for (int f = 0; f < S::kFragments; ++f) {
    SquaresOfStage<T> of_stage;
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      uint32_t x[4];
      pixels.read(x, f, offset + step * pixels.step_bytes);
      if (step == 0)
        of_stage.template add<true>(x);
      else
        of_stage.template add<false>(x);
      split(a[step][f], x);
    }
    of_stage.finish(squares[f]);
  }
  ClassReader<T> classes;
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    if (n >= eights) break;
    float sum[S::kFragments][4];
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      ClassFragment b = classes.read(slot + step * step_bytes, n * S::kBlock);
#pragma unroll
      for (int f = 0; f < S::kFragments; ++f) {
        if (step == 0)
          multiply_parts<true>(sum[f], a[step][f], b);
        else
          multiply_parts<false>(sum[f], a[step][f], b);
      }
    }
#pragma unroll
    for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[f][n][e] += sum[f][e];
  }
}

// The cosine that stands for what does not count: its exponential is 0 at every temperature, and 0 times it is 0.
constexpr float kExcluded = -1e30f;

// Marks the classes beyond the last one.
template <class T, int kEights>
__device__ __forceinline__ void exclude_padding(int num_classes, Accumulators<T, kEights>& s) {
  int beyond =
      num_classes - 2 * static_cast<int>(threadIdx.x & 3);  // this thread's classes: those with 8 n + c < beyond
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    if (8 * n + 8 <= num_classes) continue;
#pragma unroll
    for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (8 * n + e % 2 >= beyond) s[f][n][e] = kExcluded;
  }
}

// Cosines of the warp's pixels and all classes, and the inverse norms of its pixels. On return the whole tile has arrived, for
// this warp's threads; others may still be at it.
//
// The tile has room for all channels, so that its stages may come far ahead: with a ring of R slots, prototypes are R - 1
// stages ahead and features R, each stage of either in a group of copies of its own.
template <class T, int kEights, bool kRows>
__device__ __forceinline__ void similarities(const FastArguments& a, const TilePlace& place, T* tile,
                                             SharedAddress ring, bool with_prototypes, Accumulators<T, kEights>& s,
                                             float (&inverse)[Shape<T, kEights>::kFragments][2]) {
  using S = Shape<T, kEights>;
  TileLayout<T, kRows> layout = tile_layout<T, kRows>(a.plan);
  PixelReader<T, kEights, kRows> pixels(shared_address(tile), layout);
  FeatureCopy<T, kEights, kRows> features(a, place, shared_address(tile));
  int stages = a.plan.stages, ahead = a.plan.ahead, eights = (static_cast<int>(a.pixels.num_classes) + 7) / 8,
      step_bytes = a.plan.rows / 8 * S::kBlock;
  PrototypeCopy<T, kEights> prototypes(a, ring);
  RingReader<S> reading(ring, S::kSteps * step_bytes, a.plan.slots);
  keep<S::kKeep>(step_bytes), keep<S::kKeep>(ahead), keep<S::kKeep>(stages), keep<S::kKeep>(eights);
  float squares[S::kFragments][2] = {};
#pragma unroll
  for (int f = 0; f < S::kFragments; ++f)
#pragma unroll
    for (int n = 0; n < kEights; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[f][n][e] = 0.f;
  int offset = 0;
#pragma unroll 1
  for (int stage = -ahead - 1; stage < stages; ++stage) {
    if (stage >= 0) {
      WAIT_FOR_COPIES(copies_of_stage_have_arrived, 2 * ahead - 1);
      SYNC_THREADS(stage_has_arrived);
    }
    if (stage + ahead >= 0 && stage + ahead < stages) prototypes.next(with_prototypes);
    commit_copies();
    if (stage + ahead + 1 < stages) features.next();
    commit_copies();
    if (stage < 0) continue;
    multiply_stage<T, kEights, kRows>(s, squares, pixels, offset, reading.slot(), step_bytes, eights);
    reading.advance();
    offset += S::kSteps * pixels.step_bytes;
  }
#pragma unroll
  for (int f = 0; f < S::kFragments; ++f) {
    invert_norms<T, kRows>(inverse[f], squares[f], tile, layout, (threadIdx.x >> 5) * S::kWarpPixels + 16 * f,
                           static_cast<int>(a.features.channels));
#pragma unroll
    for (int n = 0; n < kEights; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[f][n][e] *= inverse[f][e >> 1] * (1.f / Split<T>::kScale);
  }
  exclude_padding<T, kEights>(static_cast<int>(a.pixels.num_classes), s);
}

// What a thread knows of its pixels: g + 8 j of each fragment f.
template <int kFragments>
struct MyPixels {
  int label[kFragments][2];
  float weight[kFragments][2], log_weight[kFragments][2];
  __device__ __forceinline__ explicit MyPixels(const PixelArrays& arrays) {
#pragma unroll
    for (int f = 0; f < kFragments; ++f)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        int p = place(f, j);
        label[f][j] = arrays.label[p], weight[f][j] = arrays.weight[p], log_weight[f][j] = arrays.log_weight[p];
      }
  }
  static __device__ __forceinline__ int place(int f, int j) {
    return ((threadIdx.x >> 5) * kFragments + f) * 16 + (threadIdx.x >> 2 & 7) + 8 * j;
  }
};

// The cosine of each of the thread's pixels with its own class, to all four threads that share them. 0 outside V. With kExclude it
// leaves S.
template <class T, int kEights, bool kExclude>
__device__ __forceinline__ void own_cosines(const MyPixels<Shape<T, kEights>::kFragments>& mine,
                                            Accumulators<T, kEights>& s,
                                            float (&own)[Shape<T, kEights>::kFragments][2]) {
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      own[f][j] = 0.f;
      int k = mine.label[f][j] - 2 * static_cast<int>(threadIdx.x & 3);
#pragma unroll
      for (int n = 0; n < kEights; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          if (k == n * 8 + c) {
            own[f][j] = s[f][n][2 * j + c];
            if (kExclude) s[f][n][2 * j + c] = kExcluded;
          }
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) own[f][j] += __shfl_xor_sync(kAllLanes, own[f][j], o);
    }
}

// log2 of exp S of each pixel's most similar class; `to_log2` takes cosines to log2 exp S.
template <class T, int kEights>
__device__ __forceinline__ void largest_logits(float to_log2, const Accumulators<T, kEights>& s,
                                               float (&largest)[Shape<T, kEights>::kFragments][2]) {
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float maximum = minus_infinity();
#pragma unroll
      for (int n = 0; n < kEights; ++n) maximum = fmaxf(maximum, fmaxf(s[f][n][2 * j], s[f][n][2 * j + 1]));
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) maximum = fmaxf(maximum, __shfl_xor_sync(kAllLanes, maximum, o));
      largest[f][j] = shift_of(maximum) * to_log2;
    }
}

// log2 sum_c exp S_ci of each pixel, (5).
template <class T, int kEights>
__device__ __forceinline__ void pixel_log_z(float to_log2, const Accumulators<T, kEights>& s,
                                            float (&log_z)[Shape<T, kEights>::kFragments][2]) {
  largest_logits<T, kEights>(to_log2, s, log_z);
#pragma unroll
  for (int f = 0; f < Shape<T, kEights>::kFragments; ++f)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float shift = log_z[f][j], sum = 0.f;
#pragma unroll
      for (int n = 0; n < kEights; ++n)
        sum +=
            exp2_approx(fmaf(s[f][n][2 * j], to_log2, -shift)) + exp2_approx(fmaf(s[f][n][2 * j + 1], to_log2, -shift));
#pragma unroll
      for (int o = 1; o < 4; o <<= 1) sum += __shfl_xor_sync(kAllLanes, sum, o);
      log_z[f][j] = shift + log2f(sum);
    }
}

constexpr double kLog2E = 1.4426950408889634;

}  // namespace proac::cuda
