// Staging for the convolutions by tiles. Included like conv2d_tiles.h.
//
// A source makes of 32 elements what is staged: get(lane) loads the per-channel values of 32 lanes,
// value(values, at) reads its maps where `at` says.

// 32 channels of a pixel, or two narrow pixels that stand side by side; zeros beyond `lanes`.
struct Together {
  int64_t at;
  __mmask32 lanes;
  PREACT_INLINE Bits operator()(const BFloat16* map) const {
    return _mm512_maskz_loadu_epi16(lanes, map + at);
  }
  PREACT_INLINE LaneValues values(const BFloat16* map) const { return values_of((*this)(map)); }
  PREACT_INLINE LaneValues values(const float* map) const {
    return float_lanes(map + at, map + at + 16, lanes);
  }
  PREACT_INLINE void store(BFloat16* map, Bits bits) const {
    _mm512_mask_storeu_epi16(map + at, lanes, bits);
  }
};
// Two narrow pixels.
struct Apart {
  int64_t first, second;
  PREACT_INLINE Bits operator()(const BFloat16* map) const {
    return two_pixels(map + first, map + second);
  }
  PREACT_INLINE LaneValues values(const BFloat16* map) const { return values_of((*this)(map)); }
  PREACT_INLINE LaneValues values(const float* map) const {
    return float_lanes(map + first, map + second, ~__mmask32{0});
  }
  PREACT_INLINE void store(BFloat16* map, Bits bits) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(map + first), _mm512_castsi512_si256(bits));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(map + second),
                        _mm512_extracti64x4_epi64(bits, 1));
  }
};

PREACT_INLINE LaneValues lane_values(const float* by_lane, int64_t lane) {
  return {_mm512_loadu_ps(by_lane + lane), _mm512_loadu_ps(by_lane + lane + 16)};
}

// A tile's own sums join those of the map: long running sums would round worse.
PREACT_INLINE void add_lanes(float* sums, const LaneValues& values) {
  _mm512_storeu_ps(sums, _mm512_loadu_ps(sums) + values.even);
  _mm512_storeu_ps(sums + 16, _mm512_loadu_ps(sums + 16) + values.odd);
}

// relu((x - mean) * scale + shift)
struct TileActivation {
  const float *mean, *scale, *shift;  // by lane
  const BFloat16* map;

  struct Values {
    LaneValues mean, scale, shift;
  };
  PREACT_INLINE Values get(int64_t lane) const {
    return {lane_values(mean, lane), lane_values(scale, lane), lane_values(shift, lane)};
  }
  // A NaN passes, as where_active lets it.
  static PREACT_INLINE Floats active(Floats x, Floats mean, Floats scale, Floats shift) {
    return _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(x - mean, scale, shift));
  }
  template <typename At>
  PREACT_INLINE Bits value(const Values& v, const At& at) const {
    const Bits x = at(map);
    return rounded_pair(active(even(x), v.mean.even, v.scale.even, v.shift.even),
                        active(odd(x), v.mean.odd, v.scale.odd, v.shift.odd));
  }
};

// A map as it is: the gradient of the convolution's result.
struct TileCopy {
  const BFloat16* map;

  struct Values {};
  PREACT_INLINE Values get(int64_t) const { return {}; }
  template <typename At>
  PREACT_INLINE Bits value(const Values&, const At& at) const {
    return at(map);
  }
};

// The same where the following norm's backward has yet to be applied:
// scale * dz + slope * (x - centre) + offset.
template <typename G>
struct TilePending {
  const G* dz;
  const BFloat16* input;
  const float *scale, *slope, *centre, *offset;  // by lane

  struct Values {
    LaneValues scale, slope, centre, offset;
  };
  PREACT_INLINE Values get(int64_t lane) const {
    return {lane_values(scale, lane), lane_values(slope, lane), lane_values(centre, lane),
            lane_values(offset, lane)};
  }
  template <typename At>
  PREACT_INLINE Bits value(const Values& v, const At& at) const {
    const LaneValues g = at.values(dz), x = at.values(input);
    return rounded_pair(
        _mm512_fmadd_ps(v.scale.even, g.even,
                        _mm512_fmadd_ps(v.slope.even, x.even - v.centre.even, v.offset.even)),
        _mm512_fmadd_ps(v.scale.odd, g.odd,
                        _mm512_fmadd_ps(v.slope.odd, x.odd - v.centre.odd, v.offset.odd)));
  }
};

// The same plus what came over the shortcut, written on the way. Where MASK, dz lies in a map of
// its own, of which this is a block, and has yet to pass the ReLU of the norm, whose scale and mean
// are the pending gradient's scale and centre.
template <bool MASK>
struct TileCompleted {
  TilePending<BFloat16> pending;
  const BFloat16* skip;
  BFloat16* completed;
  const float* shift;  // by lane

  struct Values {
    typename TilePending<BFloat16>::Values pending;
    LaneValues shift;
  };
  PREACT_INLINE Values get(int64_t lane) const {
    return {pending.get(lane), MASK ? lane_values(shift, lane) : LaneValues{}};
  }
  static PREACT_INLINE Floats active(Floats centred, Floats scale, Floats shift, Floats dz) {
    const __mmask16 passes = _mm512_cmp_ps_mask(_mm512_fmadd_ps(centred, scale, shift),
                                                _mm512_setzero_ps(), _CMP_NLE_UQ);
    return _mm512_maskz_mov_ps(passes, dz);
  }
  template <typename At>
  PREACT_INLINE Bits value(const Values& values, const At& at) const {
    const auto& v = values.pending;
    LaneValues dz = at.values(pending.dz), x = at.values(pending.input);
    const LaneValues added = at.values(skip);
    x.even -= v.centre.even;
    x.odd -= v.centre.odd;
    if constexpr (MASK) {
      dz.even = active(x.even, v.scale.even, values.shift.even, dz.even);
      dz.odd = active(x.odd, v.scale.odd, values.shift.odd, dz.odd);
    }
    dz.even = _mm512_fmadd_ps(v.scale.even, dz.even,
                              _mm512_fmadd_ps(v.slope.even, x.even, v.offset.even));
    dz.odd =
        _mm512_fmadd_ps(v.scale.odd, dz.odd, _mm512_fmadd_ps(v.slope.odd, x.odd, v.offset.odd));
    const Bits bits = rounded_pair(dz.even + added.even, dz.odd + added.odd);
    at.store(completed, bits);
    return bits;
  }
};

// Pixels between two loads of the per-channel values, where there are several groups of channels:
// few, so that memory is read nearly in order.
constexpr int64_t kStagePixels = 4;

// Writes a map [height][width][channels], its pixels `pixel` elements apart, into a staged one.
template <typename Source>
void stage_tiles(const Source& source, int64_t height, int64_t width, int64_t row_pixels,
                 int64_t pixel, const Staged& layout, BFloat16* staged) {
  const int64_t channels = layout.channels, in = cpu::padded(channels);
  for (int64_t y = 0; y < height; ++y) {
    const int64_t row = y * row_pixels * pixel;
    BFloat16* const to = staged + ((layout.top + y) * layout.columns + layout.left) * in;
    if (cpu::is_narrow(channels)) {
      const auto values = source.get(0);
      for (int64_t x = 0; x < width; x += 2) {
        const int64_t first = row + x * pixel;
        const __mmask32 lanes = first_lanes((width - x) * channels);
        const Bits bits =
            pixel == channels
                ? source.value(values, Together{first, lanes})
                : source.value(values, Apart{first, x + 1 < width ? first + pixel : first});
        _mm512_mask_storeu_epi16(to + x * channels, lanes, bits);
      }
      if (width < row_pixels) {  // the neighbour of the last pixel is multiplied by zeros
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + width * channels), __m256i{});
      }
      continue;
    }
    for (int64_t first = 0; first < width; first += kStagePixels) {
      const int64_t last = std::min(first + kStagePixels, width);
      for (int64_t c = 0; c < in; c += 32) {
        const auto values = source.get(c);
        const __mmask32 lanes = first_lanes(channels - c);
        for (int64_t x = first; x < last; ++x) {
          _mm512_storeu_si512(to + x * in + c,
                              source.value(values, Together{row + x * pixel + c, lanes}));
        }
      }
    }
  }
}

// Where stage_pairs reads: pixels of `channels` elements, rows of `row` of them.
struct PairedMap {
  int64_t height, width, channels, pixel, row;
  int64_t top, left, stride;  // of the padded map that the pixels are counted in
};

// Writes pixels in pairs, [phases][groups of 16 lanes][pairs][16 lanes][2].
template <typename Source>
void stage_pairs(const Source& source, const PairedMap& map, const cpu::PairedPixels& paired,
                 int64_t pairs, BFloat16* to) {
  const int64_t stride = map.stride, groups = cpu::padded(map.channels) / 16;
  const int64_t plane = pairs * 32;  // elements
  for (int64_t y = 0; y < map.height; ++y) {
    const int64_t down = y + map.top;
    for (int64_t phase = 0; phase < stride; ++phase) {
      const int64_t begin = ((phase - map.left) % stride + stride) % stride;
      const int64_t lead = stride == 1 && map.left == 0 ? 0 : paired.leads[phase];
      BFloat16* const row =
          to + (down % stride * stride + phase) * groups * plane +
          (lead + down / stride * paired.pitch + (begin + map.left) / stride) / 2 * 32;
      if (cpu::is_narrow(map.channels)) {
        const auto values = source.get(0);
        BFloat16* pair = row;
        for (int64_t x = begin; x < map.width; x += 2 * stride, pair += 32) {
          const int64_t first = y * map.row + x * map.pixel;
          const bool two = x + stride < map.width;
          const Apart at{first, two ? first + stride * map.pixel : first};
          Bits bits = source.value(values, at);
          if (!two) bits = _mm512_maskz_mov_epi16(0xffff, bits);
          _mm512_storeu_si512(pair, interleaved(bits));
        }
        continue;
      }
      for (int64_t first = begin; first < map.width; first += kStagePixels * stride) {
        const int64_t last = std::min(first + kStagePixels * stride, map.width);
        for (int64_t c = 0; c < map.channels; c += 32) {
          const auto values = source.get(c);
          const __mmask32 lanes = first_lanes(map.channels - c);
          BFloat16* pair = row + c / 16 * plane + (first - begin) / stride / 2 * 32;
          for (int64_t x = first; x < last; x += 2 * stride, pair += 32) {
            const int64_t at = y * map.row + x * map.pixel + c;
            const Bits a = source.value(values, Together{at, lanes});
            Bits b{};
            if (x + stride < map.width) {
              b = source.value(values, Together{at + stride * map.pixel, lanes});
            }
            _mm512_storeu_si512(pair, even_pairs(a, b));
            _mm512_storeu_si512(pair + plane, odd_pairs(a, b));
          }
        }
      }
    }
  }
}

// Rows of 16 words become columns.
PREACT_INLINE void transpose_words(const BFloat16* from, char* to, int64_t row_bytes) {
  Bits a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * 32);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
      a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
    }
  }
  // Quarter q of a[4 r + k] is column 4 q + k, rows 4 r to 4 r + 3.
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Bits low0 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0x88);  // quarters 0, 2
    const Bits low1 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0x88);
    const Bits high0 = _mm512_shuffle_i32x4(a[k], a[4 + k], 0xdd);  // quarters 1, 3
    const Bits high1 = _mm512_shuffle_i32x4(a[8 + k], a[12 + k], 0xdd);
    _mm512_storeu_si512(to + k * row_bytes, _mm512_shuffle_i32x4(low0, low1, 0x88));
    _mm512_storeu_si512(to + (8 + k) * row_bytes, _mm512_shuffle_i32x4(low0, low1, 0xdd));
    _mm512_storeu_si512(to + (4 + k) * row_bytes, _mm512_shuffle_i32x4(high0, high1, 0x88));
    _mm512_storeu_si512(to + (12 + k) * row_bytes, _mm512_shuffle_i32x4(high0, high1, 0xdd));
  }
}
