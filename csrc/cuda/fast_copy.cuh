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
      : a_(a), place_(place), channels_left_(static_cast<int>(a.features.channels)) {
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
    const T* first = static_cast<const T*>(x.data) + place.image * x.stride_batch + place.first * x.stride_pixel;
    from_ = reinterpret_cast<const char*>(first + channel * x.stride_channel + pixel * x.stride_pixel);
    nowhere_ = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(first) & ~uintptr_t(15));
    stage_from_ = S::kStage * x.stride_channel * S::kSize;
    full_ = place.pixels == a.plan.tile_pixels;
    keep<S::kKeep>(pass_to_), keep<S::kKeep>(pass_from_), keep<S::kKeep>(stage_from_);
  }

  // The next stage. What lies outside the image, or beyond the last channel, is zero.
  __device__ __forceinline__ void next() {
    bool whole = full_ && channels_left_ >= S::kStage;
    if (!a_.plan.aligned) {
      copy_unaligned(whole);
    } else if (whole) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_async<16>(to_ + pass * pass_to_, from_ + pass * pass_from_);
    } else {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) copy_piece<16>(pass, bytes_of(pass));
    }
    to_ = to_ + stage_to_, from_ += stage_from_, channels_left_ -= S::kStage;
  }

 private:
  // Of the 16 bytes of a pass, those that exist.
  __device__ __forceinline__ int bytes_of(int pass) const {
    int along = kRows ? place_.pixels : channels_left_, across = kRows ? channels_left_ : place_.pixels;
    int bytes = (across - across_) * S::kSize;
    bytes = bytes < 0 ? 0 : bytes < 16 ? bytes : 16;
    return along_ + pass * pass_ < along ? bytes : 0;
  }
  // The 16 bytes of a pass, kBytes at a time. What does not exist is not read, wherever it would lie.
  template <int kBytes>
  __device__ __forceinline__ void copy_piece(int pass, int exist) {
    SharedAddress to = to_ + pass * pass_to_;
    const char* from = from_ + pass * pass_from_;
#pragma unroll
    for (int at = 0; at < 16; at += kBytes) {
      int bytes = exist - at < 0 ? 0 : exist - at < kBytes ? exist - at : kBytes;
      copy_async<kBytes>(to + at, bytes ? from + at : nowhere_, bytes);
    }
  }

  // Rows of an odd number of pixels, for one: each 16 bytes of the tile come by copies as wide as the address allows, which in planes
  // is the same for all of a thread's. 16-bit numbers that lie between words pass through registers, two at a time.
  __device__ __forceinline__ void copy_unaligned(bool whole) {
    int offset = static_cast<int>(reinterpret_cast<uintptr_t>(from_) & 15);
    if (kRows) offset |= static_cast<int>(pass_from_ & 15);
    if (S::kSize == 2 && offset & 2)
      copy_between_words(whole);
    else if (offset & 4)
      copy_by<4>();
    else if (offset & 8)
      copy_by<8>();
    else
      copy_by<16>();
  }
  template <int kBytes>
  __device__ __forceinline__ void copy_by() {
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) copy_piece<kBytes>(pass, bytes_of(pass));
  }
  __device__ __forceinline__ void copy_between_words(bool whole) {
    uint4 piece[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const char* from = from_ + pass * pass_from_;
      auto one = [&](int at) -> uint32_t { return *reinterpret_cast<const uint16_t*>(from + at); };
      auto two = [&](int at) { return *reinterpret_cast<const uint32_t*>(from + at); };
      if (whole && (!kRows || reinterpret_cast<uintptr_t>(from) & 2)) {
        uint32_t first = one(0), a = two(2), b = two(6), c = two(10), last = one(14);
        piece[pass] = {a << 16 | first, b << 16 | a >> 16, c << 16 | b >> 16, last << 16 | c >> 16};
      } else {
        int exist = bytes_of(pass);
        uint32_t word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          word[i] = (4 * i < exist ? one(4 * i) : 0u) | (4 * i + 2 < exist ? one(4 * i + 2) : 0u) << 16;
        piece[pass] = {word[0], word[1], word[2], word[3]};
      }
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) store_shared(to_ + pass * pass_to_, piece[pass]);
  }

  const FastArguments& a_;
  const TilePlace& place_;
  SharedAddress to_;
  const char *from_, *nowhere_;
  int64_t pass_from_, stage_from_;
  int pass_to_, stage_to_, pass_, along_, across_, channels_left_;
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
