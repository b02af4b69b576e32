// The bfloat16 convolutions by tiles, in tile registers or in vectors, of processors that multiply
// bfloat16. Included by kernels of those levels.

#include "cpu/ahead.h"

using cpu::Staged;
using cpu::TileGather;
using Bits = __m512i;  // 32 bfloat16
using Floats = __m512;

constexpr int64_t kTile = 512;  // elements of a tile: 16 rows of 32

#if PREACT_TILE_REGISTERS
#include "cpu/conv2d_tiles_amx.h"
#else
#include "cpu/conv2d_tiles_avx512.h"
#endif

// Values of even and of odd index.
PREACT_INLINE Floats even(Bits bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)); }
PREACT_INLINE Floats odd(Bits bits) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)));
}
// Rounded, `low` before `high`.
PREACT_INLINE Bits joined(Floats low, Floats high) {
  return reinterpret_cast<Bits>(_mm512_cvtne2ps_pbh(high, low));
}
// The halves of a vector taken in turn.
PREACT_INLINE Bits interleaved(Bits halves) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                      21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                      11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), halves);
}
PREACT_INLINE Bits rounded_pair(Floats evens, Floats odds) {
  return interleaved(joined(evens, odds));
}
// Values of even and of odd index, one of each of two vectors in turn.
PREACT_INLINE Bits even_pairs(Bits a, Bits b) {
  return _mm512_or_si512(_mm512_andnot_si512(_mm512_set1_epi32(-0x10000), a),
                         _mm512_slli_epi32(b, 16));
}
PREACT_INLINE Bits odd_pairs(Bits a, Bits b) {
  return _mm512_or_si512(_mm512_srli_epi32(a, 16),
                         _mm512_and_si512(b, _mm512_set1_epi32(-0x10000)));
}
PREACT_INLINE __mmask32 first_lanes(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : (__mmask32{1} << count) - 1;
}

struct LaneValues {
  Floats even, odd;
};
PREACT_INLINE LaneValues values_of(Bits bits) { return {even(bits), odd(bits)}; }

// 16 floats at `a` and 16 at `b`, zeros beyond `lanes`, and their way back.
PREACT_INLINE LaneValues float_lanes(const float* a, const float* b, __mmask32 lanes) {
  const Bits evens = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const Bits odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const Floats low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), a);
  const Floats high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), b);
  return {_mm512_permutex2var_ps(low, evens, high), _mm512_permutex2var_ps(low, odds, high)};
}
PREACT_INLINE void store_float_lanes(float* a, float* b, __mmask32 lanes, const LaneValues& v) {
  const Bits low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const Bits high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_mask_storeu_ps(a, static_cast<__mmask16>(lanes),
                        _mm512_permutex2var_ps(v.even, low, v.odd));
  _mm512_mask_storeu_ps(b, static_cast<__mmask16>(lanes >> 16),
                        _mm512_permutex2var_ps(v.even, high, v.odd));
}

// 32 elements at `a`, or the 16 of a narrow pixel at `a` and the 16 at `b`; null is zeros.
PREACT_INLINE Bits two_pixels(const BFloat16* a, const BFloat16* b) {
  const auto* const first = reinterpret_cast<const __m256i*>(a);
  const auto* const second = reinterpret_cast<const __m256i*>(b);
  const Bits low = _mm512_castsi256_si512(_mm256_loadu_si256(first));
  return _mm512_inserti64x4(low, b ? _mm256_loadu_si256(second) : __m256i{}, 1);
}

// Pixels of a tile: rows of the map are cut evenly.
PREACT_INLINE int64_t tile_pixels(int64_t columns) {
  const int64_t tiles = (columns + kMostPixels - 1) / kMostPixels;
  return (columns + tiles - 1) / tiles;
}

// Where the sums of a tile's pixels belong.
struct TileOutput {
  int64_t pixels, offset, stride;  // elements of the map: of the first pixel, between pixels
  int64_t lane;                    // of the group's first channel in vectors by lane
  __mmask32 lanes;                 // channels that exist
};

// Groups of tiles that tile_map takes for these.
template <bool NARROW>
int64_t tile_work(const TileGather& tiled, int64_t columns, int64_t channels) {
  constexpr int kTiles = NARROW ? 4 : 2;
  const int64_t most = tile_pixels(tiled.gather.columns), in_row = (columns + most - 1) / most;
  return (channels + 31) / 32 * ((tiled.gather.rows * in_row + kTiles - 1) / kTiles);
}

// All outputs of a gather, columns limited to `columns`, handed to epilogue(sums, output, lines),
// which counts elements from `offset` on, `pixel` from one pixel of the map to the next, and
// fetches of lines for every vector.
template <bool NARROW, typename Epilogue>
void tile_map(const TileGather& tiled, int64_t columns, int64_t step, const BFloat16* staged,
              const Staged& layout, const BFloat16* weights, int64_t channels, int64_t width,
              int64_t pixel, int64_t offset, const Epilogue& epilogue, Ahead& ahead) {
  constexpr int kTiles = NARROW ? 4 : 2, kSums = NARROW ? 256 : 512;
  const cpu::Gather& gather = tiled.gather;
  const auto steps = static_cast<int64_t>(tiled.steps.size());
  const int64_t most = tile_pixels(gather.columns), in_row = (columns + most - 1) / most;
  const int64_t in_channels = cpu::padded(layout.channels), total = gather.rows * in_row;
  alignas(64) float sums[1024];
  const TileProduct<NARROW> multiply(most);
  for (int64_t c = 0; c < channels; c += 32, weights += steps * (NARROW ? 1 : 2) * kTile) {
    for (int64_t first = 0; first < total; first += kTiles) {
      const int64_t count = std::min<int64_t>(kTiles, total - first);
      Ahead::Lines lines = ahead.take(1, NARROW ? (count * most + 1) / 2 : count * most);
      const BFloat16* pixels[kTiles];
      TileOutput outputs[kTiles];
      for (int i = 0; i < kTiles; ++i) {
        const int64_t tile = std::min(first + i, total - 1), y = tile / in_row;
        const int64_t x = tile % in_row * most;
        pixels[i] = staged + (y * gather.input_step_y * layout.columns + x * step) * in_channels;
        outputs[i] = {std::min(most, columns - x),
                      offset +
                          ((gather.first_y + y * gather.step_y) * width + gather.first_x +
                           x * gather.step_x) *
                              pixel +
                          c,
                      gather.step_x * pixel, c, first_lanes(channels - c)};
      }
      multiply(tiled, pixels, count, step * in_channels * 2, weights, sums);
      for (int64_t i = 0; i < count; ++i) epilogue(sums + i * kSums, outputs[i], lines);
      ahead.fetch(lines);
    }
  }
}

// Two narrow pixels as tiles leave them, in order of their channels.
struct NarrowPair {
  Floats first, second;

  PREACT_INLINE void add(Bits bits) {
    first += widened(_mm512_castsi512_si256(bits));
    second += widened(_mm512_extracti64x4_epi64(bits, 1));
  }
  static PREACT_INLINE Floats widened(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

// A wide pixel of an output's map, or two narrow ones, of which there may be but one.
template <bool NARROW>
PREACT_INLINE Bits load_pixels(const BFloat16* map, const TileOutput& out, int64_t i, bool two) {
  if constexpr (NARROW) {
    return two_pixels(map + i, two ? map + i + out.stride : nullptr);
  } else {
    return _mm512_maskz_loadu_epi16(out.lanes, map + i);
  }
}
template <bool NARROW>
PREACT_INLINE void store_pixels(BFloat16* map, const TileOutput& out, int64_t i, bool two,
                                Bits bits) {
  if constexpr (NARROW) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(map + i), _mm512_castsi512_si256(bits));
    if (two) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(map + i + out.stride),
                          _mm512_extracti64x4_epi64(bits, 1));
    }
  } else {
    _mm512_mask_storeu_epi16(map + i, out.lanes, bits);
  }
}

// The same of a map of floats.
template <bool NARROW>
PREACT_INLINE LaneValues load_floats(const float* map, const TileOutput& out, int64_t i, bool two) {
  if constexpr (NARROW) {
    return float_lanes(map + i, map + i + out.stride, first_lanes(two ? 32 : 16));
  } else {
    return float_lanes(map + i, map + i + 16, out.lanes);
  }
}
template <bool NARROW>
PREACT_INLINE void store_floats(float* map, const TileOutput& out, int64_t i, bool two,
                                const LaneValues& values) {
  if constexpr (NARROW) {
    store_float_lanes(map + i, map + i + out.stride, first_lanes(two ? 32 : 16), values);
  } else {
    store_float_lanes(map + i, map + i + 16, out.lanes, values);
  }
}
