// Copies of the fast path from device to shared memory: a stage of the tile's features, a stage of the prototypes. Both are
// asynchronous wherever addresses allow, and both come in the order of the channels.
#pragma once
#include "fast_shape.cuh"

namespace proac::cuda {

// A thread's share of the tile's features, 16 bytes at a time. Where kRows, neighbouring threads take a pixel's channels of the
// stage, and eight of them pixels so far apart that padding parts their banks; else a channel's pixels.
template <class T, int kEights, bool kRows>
class FeatureCopy {
  using S = Shape<T, kEights>;
  static constexpr int kPasses = S::kSteps * S::kFragments;         // copies of a thread for each stage
  static constexpr int kPieces = 2 * S::kSteps;                     // of a pixel, where kRows
  static constexpr int kChannels = 2 * S::kVector / S::kFragments;  // of a pass, where planes

 public:
  __device__ __forceinline__ FeatureCopy(const FastArguments& a, const TilePlace& place, SharedAddress tile)
      : a_(a), place_(place), tile_(tile), channels_left_(static_cast<int>(a.features.channels)) {
    const Features& x = a.features;
    TileLayout<T, kRows> layout = tile_layout<T, kRows>(a.plan);
    unsigned t = anew(threadIdx.x);
    int pixel, channel;
    if constexpr (kRows) {
      constexpr int kTogether = 8 / kPieces, kApart = 8 / kTogether;
      unsigned order = t / kPieces;
      channel = t % kPieces * S::kVector;
      pixel = order / 8 * 8 + order % kTogether * kApart + order % 8 / kTogether;
      along_ = pixel, across_ = channel;
      int pixels = static_cast<int>(blockDim.x) / kPieces;  // of a pass
      pass_ = pixels, pass_to_ = pixels * layout.pitch * S::kSize, pass_from_ = pixels * x.stride_pixel * S::kSize;
      stage_to_ = S::kStage * S::kSize;
    } else {
      int shift = a.plan.tile_shift - (S::kVector == 8 ? 3 : 2);  // log2 of the copies of a channel
      channel = t >> shift, pixel = (t & ((1 << shift) - 1)) * S::kVector;
      along_ = channel, across_ = pixel;
      pass_ = kChannels, pass_to_ = kChannels * layout.pitch * S::kSize;
      pass_from_ = kChannels * x.stride_channel * S::kSize;
      stage_to_ = S::kStage * layout.pitch * S::kSize;
    }
    to_ = tile + layout(pixel, channel) * S::kSize;
    first_ = static_cast<const T*>(x.data) + place.image * x.stride_batch + place.first * x.stride_pixel;
    from_ = reinterpret_cast<const char*>(first_ + channel * x.stride_channel + pixel * x.stride_pixel);
    stage_from_ = S::kStage * x.stride_channel * S::kSize;
    full_ = place.pixels == a.plan.tile_pixels;
    keep<S::kKeep>(pass_to_), keep<S::kKeep>(pass_from_), keep<S::kKeep>(stage_from_);
  }

  // The next stage. What lies outside the image, or beyond the last channel, is zero.
  __device__ __forceinline__ void next() {
    if (!a_.plan.aligned) {
      copy_elements();
    } else if (full_ && channels_left_ >= S::kStage) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_async<16>(to_ + pass * pass_to_, from_ + pass * pass_from_);
    } else {
      int along = kRows ? place_.pixels : channels_left_, across = kRows ? channels_left_ : place_.pixels;
      int bytes = (across - across_) * S::kSize;
      bytes = bytes < 0 ? 0 : bytes < 16 ? bytes : 16;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        int exist = along_ + pass * pass_ < along ? bytes : 0;
        copy_async<16>(to_ + pass * pass_to_, exist ? from_ + pass * pass_from_ : reinterpret_cast<const char*>(first_),
                       exist);
      }
    }
    to_ = to_ + stage_to_, from_ += stage_from_, channels_left_ -= S::kStage, first_channel_ += S::kStage;
  }

 private:
  // Element by element: float32 asynchronously; of 16-bit numbers eight are on their way to a thread's registers at a time.
  __device__ __forceinline__ void copy_elements() {
    const Features& x = a_.features;
    TileLayout<T, kRows> layout = tile_layout<T, kRows>(a_.plan);
    constexpr int kEach = S::kFragments * S::kStage / 2, kTogether = kEach < 8 ? kEach : 8;  // elements of a thread
#pragma unroll 1
    for (int first = threadIdx.x; first < S::kStage << a_.plan.tile_shift; first += kTogether * blockDim.x) {
      T value[kTogether];
#pragma unroll
      for (int u = 0; u < kTogether; ++u) {
        int i = first + u * blockDim.x, shift = a_.plan.tile_shift;
        int pixel = kRows ? i / S::kStage : i & ((1 << shift) - 1), channel = kRows ? i % S::kStage : i >> shift;
        bool inside = pixel < place_.pixels && channel < channels_left_;
        const T* from = first_ + (first_channel_ + channel) * x.stride_channel + pixel * x.stride_pixel;
        if constexpr (S::kSize == 4)
          copy_async<4>(tile_ + layout(pixel, first_channel_ + channel) * 4, inside ? from : first_, inside ? 4 : 0);
        else
          value[u] = inside ? *from : narrow<T>(0.f);
      }
      if constexpr (S::kSize == 2) {
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
          int i = first + u * blockDim.x, shift = a_.plan.tile_shift;
          int pixel = kRows ? i / S::kStage : i & ((1 << shift) - 1), channel = kRows ? i % S::kStage : i >> shift;
          store_shared(tile_ + layout(pixel, first_channel_ + channel) * 2, value[u]);
        }
      }
    }
  }

  const FastArguments& a_;
  const TilePlace& place_;
  SharedAddress tile_, to_;
  const T* first_;
  const char* from_;
  int64_t pass_from_, stage_from_;
  int pass_to_, stage_to_, pass_, along_, across_, channels_left_, first_channel_ = 0;
  bool full_;
};

// The prototypes, stage after stage as they lie, into one slot of the ring after the other.
template <class T, int kEights>
class PrototypeCopy {
  using S = Shape<T, kEights>;

 public:
  __device__ __forceinline__ PrototypeCopy(const FastArguments& a, SharedAddress ring)
      : bytes_(S::kSteps * S::kBlock * (a.plan.rows / 8)),
        from_(static_cast<const char*>(a.split) + threadIdx.x * 16),
        to_(ring),
        first_(ring),
        last_(ring + (a.plan.slots - 1) * bytes_) {
    keep<S::kKeep>(bytes_), keep<S::kKeep>(last_);
  }
  __device__ __forceinline__ void next(bool wanted) {
    if (wanted) {
      int step = blockDim.x * 16;
      const char* from = from_;
      SharedAddress to = to_ + static_cast<int>(threadIdx.x) * 16;
#pragma unroll 1
      for (int left = bytes_ - static_cast<int>(threadIdx.x) * 16; left > 0; left -= step, to = to + step, from += step)
        copy_async<16>(to, from);
    }
    from_ += bytes_, to_ = to_ == last_ ? first_ : to_ + bytes_;
  }

 private:
  int bytes_;
  const char* from_;
  SharedAddress to_, first_, last_;
};

// The slots of the ring, as they are read.
template <class S>
class RingReader {
 public:
  __device__ __forceinline__ RingReader(SharedAddress ring, int bytes, int slots)
      : at_(ring), first_(ring), last_(ring + (slots - 1) * bytes), bytes_(bytes) {
    keep<S::kKeep>(last_), keep<S::kKeep>(bytes_);
  }
  __device__ __forceinline__ SharedAddress slot() const { return at_; }
  __device__ __forceinline__ void advance() { at_ = at_ == last_ ? first_ : at_ + bytes_; }

 private:
  SharedAddress at_, first_, last_;
  int bytes_;
};

}  // namespace proac::cuda
