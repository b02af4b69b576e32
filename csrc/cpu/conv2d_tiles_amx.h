// Products of tiles in AMX's tile registers. Included by conv2d_tiles.h. The assembler alone has to
// know the instructions.

// Of eight tiles seven are used at most: 0 to 3 hold sums, 4 pixels, 5 and 6 weights. Each has rows
// of 64 bytes, 16 of weights. A processor renames tiles, so that one is loaded while products of
// what it held are under way, as far as it has registers: for seconds on end, by all signs where
// its core runs another thread, there are too few, and the fewer tiles are written the more are
// left. Four products and four loads, of which each product takes 13 cycles else, then take 50 to
// 60 for each with eight tiles and 38 to 45 with seven; with six and a fifth load 33.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int pixels) {
    for (int i = 0; i < 7; ++i) {
      row_bytes[i] = 64;
      rows[i] = static_cast<uint8_t>(i < 5 ? pixels : 16);
    }
  }
};

PREACT_INLINE void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
PREACT_INLINE void end_tiles() { __asm__ volatile("tilerelease" ::: "memory"); }

template <int TILE>
PREACT_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(TILE));
}
template <int TILE>
PREACT_INLINE void tile_load(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(TILE)
                   : "memory");
}
template <int TILE>
PREACT_INLINE void tile_store(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(TILE)
                   : "memory");
}
// sums [M][16] += left [M][32] * right [16 pairs][16][2]
template <int SUMS, int LEFT, int RIGHT>
PREACT_INLINE void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));
}

constexpr int64_t kMostPixels = 16;  // of a tile

// Sums over steps of 2 tiles of pixels times 2 tiles of weights, or where NARROW 4 times 1, written
// as [pixels][32], or [pixels][16].
template <bool NARROW>
__attribute__((noinline)) void multiply_tiles(const BFloat16* const* pixels, int64_t pixel_bytes,
                                              const int64_t* offsets, int64_t steps,
                                              const BFloat16* weights, float* sums) {
  constexpr int64_t kRow = 64;
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t at = offsets[s];
    if constexpr (NARROW) {
      tile_load<5>(weights + s * kTile, kRow);
      tile_load<4>(pixels[0] + at, pixel_bytes);
      tile_multiply<0, 4, 5>();
      tile_load<4>(pixels[1] + at, pixel_bytes);
      tile_multiply<1, 4, 5>();
      tile_load<4>(pixels[2] + at, pixel_bytes);
      tile_multiply<2, 4, 5>();
      tile_load<4>(pixels[3] + at, pixel_bytes);
      tile_multiply<3, 4, 5>();
    } else {
      tile_load<5>(weights + 2 * s * kTile, kRow);
      tile_load<4>(pixels[0] + at, pixel_bytes);
      tile_multiply<0, 4, 5>();
      tile_load<6>(weights + (2 * s + 1) * kTile, kRow);
      tile_multiply<1, 4, 6>();
      tile_load<4>(pixels[1] + at, pixel_bytes);
      tile_multiply<2, 4, 5>();
      tile_multiply<3, 4, 6>();
    }
  }
  if constexpr (NARROW) {
    tile_store<0>(sums, kRow);
    tile_store<1>(sums + 256, kRow);
    tile_store<2>(sums + 512, kRow);
    tile_store<3>(sums + 768, kRow);
  } else {
    tile_store<0>(sums, 2 * kRow);
    tile_store<1>(sums + 16, 2 * kRow);
    tile_store<2>(sums + 512, 2 * kRow);
    tile_store<3>(sums + 528, 2 * kRow);
  }
}

template <bool NARROW>
class TileProduct {
 public:
  explicit TileProduct(int64_t pixels) { tile_configure(TileConfig(static_cast<int>(pixels))); }
  // As many tiles as there may be, whatever the count: all take the time of one.
  PREACT_INLINE void operator()(const TileGather& tiled, const BFloat16* const* pixels,
                                int64_t /*count*/, int64_t pixel_bytes, const BFloat16* weights,
                                float* sums) const {
    multiply_tiles<NARROW>(pixels, pixel_bytes, tiled.offsets.data(),
                           static_cast<int64_t>(tiled.steps.size()), weights, sums);
  }
};

PREACT_INLINE void begin_weight_tiles() {
  static const TileConfig config(16);
  tile_configure(config);
}

// Adds to sums [TAPS][INPUTS * 16][OUTPUTS * 16], or where `fresh` writes there, what `steps` steps
// of 32 pixels give: planes of the activation, shifted for each tap, times pairs of gradients.
template <int INPUTS, int OUTPUTS, int TAPS>
__attribute__((noinline)) void weight_tiles(const char* const* taps, int64_t plane_bytes,
                                            const BFloat16* grad, int64_t grad_tile, int64_t steps,
                                            bool fresh, float* sums) {
  constexpr int64_t kRow = OUTPUTS * 64, kStep = 64;
  constexpr int kSums = INPUTS * OUTPUTS * TAPS;
  static_assert(kSums <= 4 && (OUTPUTS == 1 || TAPS == 1) && (INPUTS == 1 || TAPS == 1));
  // Where sums i stand: a tap's, or a tile of inputs and of outputs.
  constexpr int64_t second = OUTPUTS == 2 ? 16 : 256;
  constexpr int64_t third = 512, fourth = OUTPUTS == 2 ? 528 : 768;
  if (fresh) {
    tile_zero<0>();
    if constexpr (kSums > 1) tile_zero<1>();
    if constexpr (kSums > 2) tile_zero<2>();
    if constexpr (kSums > 3) tile_zero<3>();
  } else {
    tile_load<0>(sums, kRow);
    if constexpr (kSums > 1) tile_load<1>(sums + second, kRow);
    if constexpr (kSums > 2) tile_load<2>(sums + third, kRow);
    if constexpr (kSums > 3) tile_load<3>(sums + fourth, kRow);
  }
  for (int64_t s = 0; s < steps; ++s, grad += kTile) {
    const int64_t at = s * kStep;
    tile_load<5>(grad, 64);
    tile_load<4>(taps[0] + at, plane_bytes);
    tile_multiply<0, 4, 5>();
    if constexpr (OUTPUTS == 2) {
      tile_load<6>(grad + grad_tile, 64);
      tile_multiply<1, 4, 6>();
    }
    if constexpr (INPUTS == 2) {
      tile_load<4>(taps[0] + at + 16 * plane_bytes, plane_bytes);
      tile_multiply<OUTPUTS, 4, 5>();
      if constexpr (OUTPUTS == 2) tile_multiply<3, 4, 6>();
    }
    if constexpr (TAPS == 3) {
      tile_load<4>(taps[1] + at, plane_bytes);
      tile_multiply<1, 4, 5>();
      tile_load<4>(taps[2] + at, plane_bytes);
      tile_multiply<2, 4, 5>();
    }
  }
  tile_store<0>(sums, kRow);
  if constexpr (kSums > 1) tile_store<1>(sums + second, kRow);
  if constexpr (kSums > 2) tile_store<2>(sums + third, kRow);
  if constexpr (kSums > 3) tile_store<3>(sums + fourth, kRow);
}
