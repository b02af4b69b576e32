// Products of tiles in vectors, with AVX512_BF16. Included by conv2d_tiles.h.

constexpr int64_t kMostPixels = 14;  // of a tile: with two vectors of weights 28 sums
constexpr int kMostSums = 28;        // of 32 registers

// sum + the products of the pairs in `left` and `right`
PREACT_INLINE Floats add_pairs(Floats sum, Bits left, Bits right) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
}
// The pair at `from` in every lane.
PREACT_INLINE Bits pair_everywhere(const char* from) {
  int32_t pair;
  std::memcpy(&pair, from, sizeof(pair));
  return _mm512_set1_epi32(pair);
}

// Sums over steps of TILES tiles of PIXELS pixels each times VECTORS tiles of weights, written as
// [TILES][16][VECTORS * 16].
template <int TILES, int PIXELS, int VECTORS>
PREACT_INLINE void multiply_pixels(const TileGather& tiled, const BFloat16* const* pixels,
                                   int64_t pixel_bytes, const BFloat16* weights, float* sums) {
  const auto steps = static_cast<int64_t>(tiled.steps.size());
  Floats sum[TILES * PIXELS][VECTORS] = {};
  for (int64_t s = 0; s < steps; ++s, weights += VECTORS * kTile) {
    const char* tiles[TILES];
    for (int t = 0; t < TILES; ++t) {
      tiles[t] = reinterpret_cast<const char*>(pixels[t] + tiled.offsets[s]);
    }
    const int64_t pairs = tiled.pairs[s];
    for (int64_t pair = 0; pair < pairs; ++pair) {
      Bits right[VECTORS];
      for (int v = 0; v < VECTORS; ++v) {
        right[v] = _mm512_loadu_si512(weights + v * kTile + pair * 32);
      }
#pragma GCC unroll 28
      for (int i = 0; i < TILES * PIXELS; ++i) {
        const Bits left = pair_everywhere(tiles[i / PIXELS] + i % PIXELS * pixel_bytes + pair * 4);
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = add_pairs(sum[i][v], left, right[v]);
      }
    }
  }
#pragma GCC unroll 28
  for (int i = 0; i < TILES * PIXELS; ++i) {
    float* const row = sums + (i / PIXELS * 16 + i % PIXELS) * VECTORS * 16;
    for (int v = 0; v < VECTORS; ++v) _mm512_storeu_ps(row + v * 16, sum[i][v]);
  }
}

// Sums over steps of tiles of pixels times 2 tiles of weights, or where NARROW times 1, written as
// [pixels][32], or [pixels][16].
template <bool NARROW>
class TileProduct {
 public:
  explicit TileProduct(int64_t pixels)
      : multiply_(choose(pixels, std::make_integer_sequence<int, kMostPixels>())) {}
  PREACT_INLINE void operator()(const TileGather& tiled, const BFloat16* const* pixels,
                                int64_t count, int64_t pixel_bytes, const BFloat16* weights,
                                float* sums) const {
    multiply_(tiled, pixels, count, pixel_bytes, weights, sums);
  }

 private:
  using Multiply = void (*)(const TileGather&, const BFloat16* const*, int64_t, int64_t,
                            const BFloat16*, float*);

  template <int PIXELS>
  static void multiply(const TileGather& tiled, const BFloat16* const* pixels, int64_t count,
                       int64_t pixel_bytes, const BFloat16* weights, float* sums) {
    constexpr int kVectors = NARROW ? 1 : 2, kTiles = NARROW ? 4 : 2;
    constexpr int kFit = kMostSums / (PIXELS * kVectors);
    constexpr int kAtOnce = kFit >= kTiles ? kTiles : kFit >= 2 ? 2 : 1;
    for (int64_t t = 0; t < count; t += kAtOnce) {
      multiply_pixels<kAtOnce, PIXELS, kVectors>(tiled, pixels + t, pixel_bytes, weights,
                                                 sums + t * 256 * kVectors);
    }
  }
  template <int... INDEX>
  static Multiply choose(int64_t pixels, std::integer_sequence<int, INDEX...>) {
    static constexpr Multiply kAll[] = {&multiply<INDEX + 1>...};
    return kAll[pixels - 1];
  }

  Multiply multiply_;
};

// The other level has registers to set up and to give back.
PREACT_INLINE void begin_weight_tiles() {}
PREACT_INLINE void end_tiles() {}

// Rows [first, first + ROWS) of weight_tiles, and one of its taps.
template <int ROWS, int OUTPUTS>
PREACT_INLINE void weight_rows(const char* plane, int64_t plane_bytes, const BFloat16* grad,
                               int64_t grad_tile, int64_t steps, bool fresh, float* sums) {
  Floats sum[ROWS][OUTPUTS] = {};
  if (!fresh) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      for (int v = 0; v < OUTPUTS; ++v) sum[i][v] = _mm512_loadu_ps(sums + (i * OUTPUTS + v) * 16);
    }
  }
  for (int64_t s = 0; s < steps; ++s, grad += kTile, plane += 64) {
    for (int64_t pair = 0; pair < 16; ++pair) {
      Bits right[OUTPUTS];
      for (int v = 0; v < OUTPUTS; ++v) {
        right[v] = _mm512_loadu_si512(grad + v * grad_tile + pair * 32);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const Bits left = pair_everywhere(plane + i * plane_bytes + pair * 4);
        for (int v = 0; v < OUTPUTS; ++v) sum[i][v] = add_pairs(sum[i][v], left, right[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i) {
    for (int v = 0; v < OUTPUTS; ++v) _mm512_storeu_ps(sums + (i * OUTPUTS + v) * 16, sum[i][v]);
  }
}

// Adds to sums [TAPS][INPUTS * 16][OUTPUTS * 16], or where `fresh` writes there, what `steps` steps
// of 32 pixels give: planes of the activation, shifted for each tap, times pairs of gradients.
template <int INPUTS, int OUTPUTS, int TAPS>
__attribute__((noinline)) void weight_tiles(const char* const* taps, int64_t plane_bytes,
                                            const BFloat16* grad, int64_t grad_tile, int64_t steps,
                                            bool fresh, float* sums) {
  constexpr int kRows = 8 * (3 - OUTPUTS);
  // Steps whose gradients, two tiles each, stay in the first-level cache for all rows.
  const int64_t some = cpu::fill_half(2 * kTile * sizeof(BFloat16));
  for (int64_t s = 0; s < steps; s += some) {
    float* to = sums;
    for (int tap = 0; tap < TAPS; ++tap) {
      for (int row = 0; row < INPUTS * 16; row += kRows, to += kRows * OUTPUTS * 16) {
        weight_rows<kRows, OUTPUTS>(taps[tap] + row * plane_bytes + s * 64, plane_bytes,
                                    grad + s * kTile, grad_tile, std::min(some, steps - s),
                                    fresh && s == 0, to);
      }
    }
  }
}
