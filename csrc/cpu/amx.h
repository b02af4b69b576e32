// Tile registers: their layout, loads, stores and the product of bfloat16 pairs. Included by
// kernels of the AMX level. The assembler alone has to know the instructions.

// Every tile has `rows` rows of 64 bytes, but for the last two or four, which always have 16.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0 to 3 hold sums, 4 and 5 pixels, and 6 and 7 weights; `narrow` gives 6 to the pixels.
  TileConfig(int pixels, bool narrow) {
    for (int i = 0; i < 8; ++i) {
      row_bytes[i] = 64;
      rows[i] = static_cast<uint8_t>(i < (narrow ? 7 : 6) ? pixels : 16);
    }
  }
};

PREACT_INLINE void tile_configure(const TileConfig& config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}
PREACT_INLINE void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

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
