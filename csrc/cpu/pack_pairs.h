// A tile of bfloat16 features packed as the tile unit reads them: pairs of channels, as tile_unit.h lays out a right
// factor. Half the bytes of a tile of floats, and nothing left to split: where no stage needs the floats (TileUse).
#pragma once

#include "tile.h"
#include "tile_pairs.h"

namespace proac::PROAC_ISA {

template <class F>
constexpr bool kIsBFloat16 = false;
template <>
constexpr bool kIsBFloat16<BFloat16> = true;
template <class X>
constexpr bool kIsPairs = false;

#if defined(PROAC_TILE_UNIT)
// Pairs of channels of the pixels of one tile.
struct PixelPairs {
  int8_t* tiles;
  int64_t strip;
  static constexpr int kRows = 2;

  PROAC_MEMBER PixelPairs(int8_t* memory, int64_t channels) : tiles(memory), strip(tile_strip(channels, 1)) {}

  // The pairs of channels 2 * group and 2 * group + 1, of pixels from i on.
  PROAC_MEMBER uint32_t* at(int64_t group, int i) const { return pixel_terms(tiles, strip, 1, group, i); }
  PROAC_MEMBER BFloat16* number(int64_t d, int i) const { return reinterpret_cast<BFloat16*>(at(d / 2, i)) + d % 2; }

  // The values are bfloat16 numbers.
  PROAC_MEMBER void put(int64_t d, int i, const Vec<float>* value) const {
    const auto first = reinterpret_cast<Vec<uint32_t>>(value[0]), second = reinterpret_cast<Vec<uint32_t>>(value[1]);
    store<uint32_t>(at(d / 2, i), first >> 16 | second);
  }
  PROAC_MEMBER void clear(int64_t) const { memset(tiles, 0, kTile / kTileLanes * strip * kTileBytes); }
  PROAC_MEMBER Vec<float> channel(int64_t d, int i) const {
    return reinterpret_cast<Vec<float>>(load(at(d / 2, i)) >> static_cast<uint32_t>(16 * (d % 2)) << 16);
  }
  PROAC_MEMBER float get(int64_t d, int i) const { return widen(*number(d, i)); }
  PROAC_MEMBER void set(int64_t d, int i, float value) const { narrow(value, number(d, i)); }
};

template <>
constexpr bool kIsPairs<PixelPairs> = true;

PROAC_INLINE Vec<float> first_of_pair(Vec<uint32_t> pair) { return reinterpret_cast<Vec<float>>(pair << 16); }
PROAC_INLINE Vec<float> second_of_pair(Vec<uint32_t> pair) { return reinterpret_cast<Vec<float>>(pair & 0xffff0000u); }

// Channels that lie side by side, as pack_columns has them: a pair is then one number of 32 bits already.
static void pack_columns(const BFloat16* const* pixel, int64_t channels, PixelPairs pairs, float* square) {
  constexpr int lanes = kLanes<float>;
  const int64_t whole = channels - channels % (2 * lanes);
  for (int begin = 0; begin < kTile; begin += lanes) {
    const BFloat16* const* group = pixel + begin;
    Vec<float> total{};
    for (int64_t d = 0; d < whole; d += 2 * lanes) {
      Vec<float> row[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        row[i] = group[i] ? load(reinterpret_cast<const float*>(group[i] + d)) : Vec<float>{};
      }
      transpose<float>(row);
      Vec<float> even{}, odd{};
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const auto pair = reinterpret_cast<Vec<uint32_t>>(row[i]);
        store<uint32_t>(pairs.at(d / 2 + i, begin), pair);
        even += first_of_pair(pair) * first_of_pair(pair);
        odd += second_of_pair(pair) * second_of_pair(pair);
      }
      total += even + odd;
    }
    for (int64_t d = whole; d < channels; ++d) {
      for (int i = 0; i < lanes; ++i) *pairs.number(d, begin + i) = group[i] ? group[i][d] : BFloat16{};
      const Vec<float> value = pairs.channel(d, begin);
      total += value * value;
    }
    store(square + begin, total);
  }
}
#endif

// Calls f with where the pixels of features F are packed: pairs or floats.
template <class F, class Body>
PROAC_INLINE void with_packed_pixels([[maybe_unused]] const AnchorView& anchors, [[maybe_unused]] int64_t channels,
                                     const Workspace& work, Body body) {
#if defined(PROAC_TILE_UNIT)
  if constexpr (kIsBFloat16<F>) {
    if (anchors.tile_use.pixels_as_pairs) {
      const PixelPairs pairs(work.pairs, channels);
      pairs.clear(channels);  // what the tiles have beyond the channels stays 0
      return body(pairs);
    }
  }
#endif
  body(PixelFloats<Compute<F>>{static_cast<Compute<F>*>(work.x)});
}

}  // namespace proac::PROAC_ISA
