#include "cpu/amx.h"

#include "cpu/conv2d_tile_amx.h"

#include "cpu/conv2d_stage_amx.h"

// What pack_tiles and unpack_weight_sums do a step and a block at a time, where 32 channels of the
// weight stand side by side in memory.

// Tiles of a step from rows of up to 32 inputs, one for each of up to 32 outputs.
inline void pack_rows(const BFloat16* from, int64_t stride, int64_t outputs, int64_t inputs,
                      BFloat16* to) {
  alignas(64) BFloat16 rows[2][16][32];
  const __mmask32 lanes = first_lanes(inputs);
  for (int64_t o = 0; o < 32; ++o) {
    const __mmask32 there = o < outputs ? lanes : __mmask32{0};
    _mm512_store_si512(rows[o % 2][o / 2], _mm512_maskz_loadu_epi16(there, from + o * stride));
  }
  transpose_words(rows[0][0], reinterpret_cast<char*>(to), 64);
  transpose_words(rows[1][0], reinterpret_cast<char*>(to + kTile), 64);
}

// The same from rows of outputs, one for each input.
inline void pack_columns(const BFloat16* from, int64_t stride, int64_t outputs, int64_t inputs,
                         BFloat16* to) {
  const __mmask32 lanes = first_lanes(outputs);
  for (int64_t i = 0; i < 32; i += 2, to += 32) {
    const BFloat16* const row = from + i * stride;
    const Bits a = _mm512_maskz_loadu_epi16(i < inputs ? lanes : __mmask32{0}, row);
    const Bits b = _mm512_maskz_loadu_epi16(i + 1 < inputs ? lanes : __mmask32{0}, row + stride);
    _mm512_storeu_si512(to, even_pairs(a, b));
    _mm512_storeu_si512(to + kTile, odd_pairs(a, b));
  }
}

// Adds up the chunks' sums of a block, `size` apart, and writes them as rows of inputs.
inline void unpack_rows(const float* sums, int64_t chunks, int64_t size, int64_t outputs,
                        int64_t inputs, int64_t stride, BFloat16* to) {
  alignas(64) float totals[2][2][16][16];  // [outputs % 2][inputs % 2][inputs / 2][outputs / 2]
  for (int64_t i = 0; i < 32; ++i) {
    for (int64_t half = 0; half < 2; ++half) {
      const float* const part = sums + i * 32 + half * 16;
      Floats total = _mm512_loadu_ps(part);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        total += _mm512_loadu_ps(part + chunk * size);
      }
      _mm512_store_ps(totals[half][i / 16][i % 16], total);
    }
  }
  alignas(64) float turned[2][16][16];  // [inputs % 2][outputs / 2][inputs / 2]
  const __mmask32 lanes = first_lanes(inputs);
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t parity = 0; parity < 2; ++parity) {
      transpose_words(reinterpret_cast<const BFloat16*>(totals[half][parity]),
                      reinterpret_cast<char*>(turned[parity]), 64);
    }
    for (int64_t o = half; o < std::min<int64_t>(outputs, 32); o += 2) {
      const Bits bits =
          rounded_pair(_mm512_load_ps(turned[0][o / 2]), _mm512_load_ps(turned[1][o / 2]));
      _mm512_mask_storeu_epi16(to + o * stride, lanes, bits);
    }
  }
}
