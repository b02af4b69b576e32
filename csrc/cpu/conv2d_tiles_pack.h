#include "cpu/conv2d_tiles.h"

#include "cpu/conv2d_tiles_stage.h"

// What pack_tiles and unpack_weight_sums do a step and a block at a time, where 32 channels of the
// weight stand side by side in memory.

// 32 weights in a row.
PREACT_INLINE Bits row_of(const BFloat16* from, __mmask32 lanes) {
  return _mm512_maskz_loadu_epi16(lanes, from);
}
PREACT_INLINE Bits row_of(const float* from, __mmask32 lanes) {
  return joined(_mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes), from),
                _mm512_maskz_loadu_ps(static_cast<__mmask16>(lanes >> 16), from + 16));
}

// Their gradients, those of even and of odd index.
PREACT_INLINE void store_row(BFloat16* to, __mmask32 lanes, Floats evens, Floats odds) {
  _mm512_mask_storeu_epi16(to, lanes, rounded_pair(evens, odds));
}
PREACT_INLINE void store_row(float* to, __mmask32 lanes, Floats evens, Floats odds) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(lanes),
                        _mm512_permutex2var_ps(evens, low, odds));
  _mm512_mask_storeu_ps(to + 16, static_cast<__mmask16>(lanes >> 16),
                        _mm512_permutex2var_ps(evens, high, odds));
}

// Tiles of a step from rows of up to 32 inputs, one for each of up to 32 outputs.
template <typename W>
void pack_rows(const W* from, int64_t stride, int64_t outputs, int64_t inputs, BFloat16* to) {
  alignas(64) BFloat16 rows[2][16][32];
  const __mmask32 lanes = first_lanes(inputs);
  for (int64_t o = 0; o < 32; ++o) {
    const __mmask32 there = o < outputs ? lanes : __mmask32{0};
    _mm512_store_si512(rows[o % 2][o / 2], row_of(from + o * stride, there));
  }
  transpose_words(rows[0][0], reinterpret_cast<char*>(to), 64);
  transpose_words(rows[1][0], reinterpret_cast<char*>(to + kTile), 64);
}

// The same from rows of outputs, one for each input.
template <typename W>
void pack_columns(const W* from, int64_t stride, int64_t outputs, int64_t inputs, BFloat16* to) {
  const __mmask32 lanes = first_lanes(outputs);
  for (int64_t i = 0; i < 32; i += 2, to += 32) {
    const W* const row = from + i * stride;
    const Bits a = row_of(row, i < inputs ? lanes : __mmask32{0});
    const Bits b = row_of(row + stride, i + 1 < inputs ? lanes : __mmask32{0});
    _mm512_storeu_si512(to, even_pairs(a, b));
    _mm512_storeu_si512(to + kTile, odd_pairs(a, b));
  }
}

// Adds up the chunks' sums of a block, `size` apart, and writes them as rows of inputs.
template <typename W>
void unpack_rows(const float* sums, int64_t chunks, int64_t size, int64_t outputs, int64_t inputs,
                 int64_t stride, W* to) {
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
      store_row(to + o * stride, lanes, _mm512_load_ps(turned[0][o / 2]),
                _mm512_load_ps(turned[1][o / 2]));
    }
  }
}

// The same of sums that are rows of inputs already.
template <typename W>
void unpack_turned(const float* sums, int64_t chunks, int64_t size, int64_t outputs, int64_t inputs,
                   int64_t stride, W* to) {
  const __mmask32 lanes = first_lanes(inputs);
  for (int64_t lane = 0; lane < 32; ++lane, sums += 32) {
    const int64_t o = lane % 16 * 2 + lane / 16;
    if (o >= outputs) continue;
    Floats evens = _mm512_loadu_ps(sums), odds = _mm512_loadu_ps(sums + 16);
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      evens += _mm512_loadu_ps(sums + chunk * size);
      odds += _mm512_loadu_ps(sums + chunk * size + 16);
    }
    store_row(to + o * stride, lanes, evens, odds);
  }
}
