// What every kernel needs to know of a pixel: its label, its weight, its random key. The device's half of
// proac_cuda/stages/pixels.py; held once.
#pragma once
#include "portable.cuh"

namespace proac::cuda {

template <class C>
struct Pixel {
  int label;  // -1 outside V
  C weight;   // 0 outside V
  bool bad_label, bad_weight;
};

// quotient and remainder; 64-bit division costs five times as much, and is rarely needed
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t& remainder) {
  if ((static_cast<uint64_t>(a | b) >> 32) == 0) {
    uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    remainder = static_cast<uint32_t>(a) - q * static_cast<uint32_t>(b);
    return q;
  }
  int64_t q = a / b;
  remainder = a - q * b;
  return q;
}

// interpolate(mode="nearest") and "nearest-exact": min(floor((float32(index) + shift) * scale), H - 1), shift 0 and 0.5
__device__ __forceinline__ int64_t nearest(int64_t index, int64_t size, int64_t label_size, float scale, float shift) {
  if (size == label_size) return index;
  int64_t source = static_cast<int64_t>(floorf((static_cast<float>(index) + shift) * scale));
  return source < label_size - 1 ? source : label_size - 1;
}

struct Place {
  int64_t label, weight;  // offsets
};
__device__ __forceinline__ Place place_of(const Pixels& s, int64_t i) {
  int64_t x, y, z, b;
  int64_t rest = divide(i, s.size[2], x);
  rest = divide(rest, s.size[1], y);
  b = divide(rest, s.size[0], z);
  x = nearest(x, s.size[2], s.label_size[2], s.scale[2], s.shift);
  y = nearest(y, s.size[1], s.label_size[1], s.scale[1], s.shift);
  z = nearest(z, s.size[0], s.label_size[0], s.scale[0], s.shift);
  return {b * s.label_stride[0] + z * s.label_stride[1] + y * s.label_stride[2] + x * s.label_stride[3],
          b * s.weight_stride[0] + z * s.weight_stride[1] + y * s.weight_stride[2] + x * s.weight_stride[3]};
}

__device__ __forceinline__ int64_t read_label(const Pixels& s, int64_t offset) {
  switch (s.label_type) {
    case LabelType::uint8:
      return static_cast<const uint8_t*>(s.label)[offset];
    case LabelType::int16:
      return static_cast<const int16_t*>(s.label)[offset];
    case LabelType::int32:
      return static_cast<const int32_t*>(s.label)[offset];
    default:
      return static_cast<const int64_t*>(s.label)[offset];
  }
}

// The set V: label rule and weight rule. `i` is the pixel's linear index in (batch, spatial) order.
template <class C>
__device__ __forceinline__ Pixel<C> read_pixel(const Pixels& s, int64_t i) {
  Place place = place_of(s, i);
  int64_t label = read_label(s, place.label);
  bool in_range = label >= 0 && label < s.num_classes, ignored = label == s.ignore_index;
  Pixel<C> pixel = {-1, C(0), !in_range && !ignored, false};
  if (!in_range || ignored) return pixel;
  C weight = s.weight ? static_cast<const C*>(s.weight)[place.weight] : C(1);
  pixel.bad_weight =
      !(weight >= C(0) && weight <= static_cast<C>(sizeof(C) == 4 ? 3.402823466e38 : 1.7976931348623157e308));
  const C smallest_normal = static_cast<C>(sizeof(C) == 4 ? 0x1p-126 : 0x1p-1022);  // its inverse is finite
  if (weight >= smallest_normal && !pixel.bad_weight) {
    pixel.label = static_cast<int>(label);
    pixel.weight = weight;
  }
  return pixel;
}

// First output word of Philox4x32-10 (Salmon et al., SC 2011): key (seed), counter (index, 0, 0).
__device__ __forceinline__ uint32_t philox_key(int64_t seed, int64_t index) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(static_cast<uint64_t>(index) >> 32);
  uint32_t c2 = 0, c3 = 0;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    uint32_t high2 = __umulhi(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
    c0 = high2 ^ c1 ^ k0, c1 = low2, c2 = high0 ^ c3 ^ k1, c3 = low0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return c0;
}

// Whether a pixel with this key and index is among the drawn ones of class k (its label is looked at elsewhere).
__device__ __forceinline__ bool is_drawn(const Sampling& sampling, int k, uint32_t key, int64_t index) {
  int64_t last_key = sampling.thresholds[2 * k], mine = key;
  return mine < last_key || (mine == last_key && index <= sampling.thresholds[2 * k + 1]);
}

// Counts of invalid labels and weights, and ~i of the first of each, so that all zero is none; integer atomics, so any order gives
// the same.
struct Diagnostics {
  unsigned long long labels, first_label, weights, first_weight;
};
__device__ __forceinline__ void add_invalid(unsigned long long& count, unsigned long long& first,
                                            unsigned long long more, unsigned long long first_of_them) {
  if (!more) return;
  atomicAdd(&count, more);
  atomicMax(&first, first_of_them);
}
template <class C>
__device__ __forceinline__ void record(Diagnostics& d, const Pixel<C>& pixel, int64_t i) {
  add_invalid(d.labels, d.first_label, pixel.bad_label, ~static_cast<unsigned long long>(i));
  add_invalid(d.weights, d.first_weight, pixel.bad_weight, ~static_cast<unsigned long long>(i));
}

}  // namespace proac::cuda
