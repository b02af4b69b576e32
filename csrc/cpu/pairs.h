// bfloat16 maps two vectors at a time. Included by foreach_capability.h after vec.h.
//
// A vector of 32-bit words holds twice as many elements: those of even index by a shift, those of
// odd index by a mask, an operation each where widening a half of a vector takes two. Rounding
// works on all of them at once, on what the words' halves are.

struct FloatPair {
  FloatVector even, odd;
};
PREACT_INLINE FloatPair operator+(FloatPair a, FloatPair b) {
  return {a.even + b.even, a.odd + b.odd};
}
PREACT_INLINE FloatPair operator-(FloatPair a, FloatPair b) {
  return {a.even - b.even, a.odd - b.odd};
}
PREACT_INLINE FloatPair operator*(FloatPair a, FloatPair b) {
  return {a.even * b.even, a.odd * b.odd};
}
PREACT_INLINE FloatPair& operator+=(FloatPair& a, FloatPair b) { return a = a + b; }
PREACT_INLINE FloatPair madd(FloatPair a, FloatPair b, FloatPair c) {
  return {madd(a.even, b.even, c.even), madd(a.odd, b.odd, c.odd)};
}
PREACT_INLINE FloatPair where_active(FloatPair z, FloatPair value) {
  return {where_active(z.even, value.even), where_active(z.odd, value.odd)};
}
PREACT_INLINE FloatPair relu(FloatPair z) { return {relu(z.even), relu(z.odd)}; }

// Both halves of each word rounded to bfloat16 and joined: to nearest, ties to even, infinities and
// values without a normal exponent included. A NaN must have no bit set in its lower half, as
// those of bfloat16 elements and of arithmetic have none.
PREACT_INLINE WordVector narrow(FloatPair value) {
  WordVector even, odd;
  std::memcpy(&even, &value.even, sizeof even);
  std::memcpy(&odd, &value.odd, sizeof odd);
  // What is dropped rounds up where it, 0x7fff and the last bit kept carry: a mean, whose sum has
  // 17 bits, shows the carry in its first bit.
#if PREACT_X86 && PREACT_VECTOR_BYTES == 64
  const auto e = reinterpret_cast<__m512i>(even), o = reinterpret_cast<__m512i>(odd);
  const __m512i high = _mm512_mask_mov_epi16(reinterpret_cast<__m512i>(even >> 16), 0xaaaaaaaa, o);
  const __m512i low = _mm512_mask_mov_epi16(reinterpret_cast<__m512i>(odd << 16), 0x55555555, e);
  const __m512i bias = _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(1),
                                                 _mm512_set1_epi16(0x7ffe), (0xf0 & 0xcc) | 0xaa);
  const __m512i carry = _mm512_srai_epi16(_mm512_avg_epu16(low, bias), 15);
  return reinterpret_cast<WordVector>(_mm512_sub_epi16(high, carry));
#elif PREACT_X86 && PREACT_VECTOR_BYTES == 32
  const auto e = reinterpret_cast<__m256i>(even), o = reinterpret_cast<__m256i>(odd);
  const __m256i high = _mm256_blend_epi16(_mm256_srli_epi32(e, 16), o, 0xaa);
  const __m256i low = _mm256_blend_epi16(_mm256_slli_epi32(o, 16), e, 0x55);
  const __m256i bias =
      _mm256_or_si256(_mm256_and_si256(high, _mm256_set1_epi16(1)), _mm256_set1_epi16(0x7ffe));
  const __m256i carry = _mm256_srai_epi16(_mm256_avg_epu16(low, bias), 15);
  return reinterpret_cast<WordVector>(_mm256_sub_epi16(high, carry));
#else
  using Halfwords = uint16_t __attribute__((vector_size(PREACT_VECTOR_BYTES)));
  const WordVector joined[] = {(even >> 16) | (odd & 0xffff0000u), (even & 0xffffu) | (odd << 16)};
  Halfwords high, low;
  std::memcpy(&high, &joined[0], sizeof high);
  std::memcpy(&low, &joined[1], sizeof low);
  const Halfwords sum = low + ((high & 1) + 0x7fff);
  const auto carry = sum < low;  // all ones where true
  high -= reinterpret_cast<const Halfwords&>(carry);
  WordVector words;
  std::memcpy(&words, &high, sizeof words);
  return words;
#endif
}

struct Pairs {
  using reg = FloatPair;
  static constexpr int lanes = 2 * Pack<float>::lanes;

  static PREACT_INLINE reg broadcast(float value) {
    return {Pack<float>::broadcast(value), Pack<float>::broadcast(value)};
  }
  static PREACT_INLINE FloatVector folded(reg value) { return value.even + value.odd; }

  static PREACT_INLINE reg widen(WordVector words) {
    const WordVector even = words << 16, odd = words & 0xffff0000u;
    reg value;
    std::memcpy(&value.even, &even, sizeof even);
    std::memcpy(&value.odd, &odd, sizeof odd);
    return value;
  }
  static PREACT_INLINE reg load(const BFloat16* p) {
    WordVector words;
    std::memcpy(&words, p, sizeof words);
    return widen(words);
  }
  static PREACT_INLINE void store(BFloat16* p, reg value) {
    const WordVector words = narrow(value);
    std::memcpy(p, &words, sizeof words);
  }
  // As it will be read back after a store.
  static PREACT_INLINE reg rounded(reg value) { return widen(narrow(value)); }

  // Per-channel values in the order of to_lanes, below.
  static PREACT_INLINE reg load_channels(const float* p) {
    return {Pack<float>::load(p), Pack<float>::load(p + lanes / 2)};
  }
  static PREACT_INLINE void store_channels(float* p, reg value) {
    Pack<float>::store(p, value.even);
    Pack<float>::store(p + lanes / 2, value.odd);
  }
};

// What the vectors of a map of T are. Words hold the element of even index first on little-endian
// processors alone.
template <typename T>
using VectorsOf =
    std::conditional_t<std::is_same_v<T, BFloat16> && std::endian::native == std::endian::little,
                       Pairs, Pack<accumulate_t<T>>>;

// The last elements of a run, fewer than a vector: `count` of them from offset `first` on.
struct Rest {
  int64_t first;
  int64_t count;
};
// The last vector of a run, which begins with `again` elements of the vector before it.
struct Tail {
  int64_t first;
  int64_t again;
};

// Where a vector of elements lies in its maps, and where lines are asked for meanwhile: many
// processors' own prefetchers do not keep up with a pass whose arithmetic holds back its next
// loads.
struct Offset {
  int64_t first;
  int64_t fetched;

  PREACT_INLINE operator int64_t() const { return first; }
};
constexpr int64_t kAhead = 2048;      // bytes
constexpr int64_t kWriteAhead = 256;  // lines to be written wait in the first-level cache

template <typename P, typename T>
PREACT_INLINE typename P::reg load_at(const T* p, Offset at) {
  __builtin_prefetch(p + at.fetched);
  return P::load(p + at.first);
}
template <typename P, typename T>
PREACT_INLINE void store_at(T* p, Offset at, typename P::reg value) {
  __builtin_prefetch(reinterpret_cast<const char*>(p + at.first) + kWriteAhead, 1);
  P::store(p + at.first, value);
}
template <typename P, typename T>
PREACT_INLINE typename P::reg load_at(const T* p, Tail at) {
  return P::load(p + at.first);
}
template <typename P, typename T>
PREACT_INLINE void store_at(T* p, Tail at, typename P::reg value) {
  P::store(p + at.first, value);
}
// In pieces of half a vector, a quarter and so on: calls of memcpy for a few elements each cost
// more than the arithmetic.
template <int SIZE, typename T>
PREACT_INLINE void copy_few(T* to, const T* from, int64_t count) {
  if constexpr (SIZE > 0) {
    if (count & SIZE) {
      std::memcpy(to, from, SIZE * sizeof(T));
      to += SIZE;
      from += SIZE;
    }
    copy_few<SIZE / 2>(to, from, count);
  }
}
// Zeros beyond the rest.
template <typename P, typename T>
PREACT_INLINE typename P::reg load_at(const T* p, Rest at) {
  T held[P::lanes];
#if PREACT_VECTOR_BYTES == 64
  const __mmask64 bytes = (__mmask64{1} << (at.count * sizeof(T))) - 1;
  const __m512i all = _mm512_maskz_loadu_epi8(bytes, p + at.first);
  std::memcpy(held, &all, sizeof held);
#else
  std::memset(held, 0, sizeof held);
  copy_few<P::lanes / 2>(held, p + at.first, at.count);
#endif
  return P::load(held);
}
template <typename P, typename T>
PREACT_INLINE void store_at(T* p, Rest at, typename P::reg value) {
  T held[P::lanes];
  P::store(held, value);
#if PREACT_VECTOR_BYTES == 64
  const __mmask64 bytes = (__mmask64{1} << (at.count * sizeof(T))) - 1;
  __m512i all{};
  std::memcpy(&all, held, sizeof held);
  _mm512_mask_storeu_epi8(p + at.first, bytes, all);
#else
  copy_few<P::lanes / 2>(p + at.first, held, at.count);
#endif
}

// Lanes from `begin` up to `end` of a vector, zeros in the others.
PREACT_INLINE FloatVector some_lanes(FloatVector value, int64_t begin, int64_t end) {
#if PREACT_VECTOR_BYTES == 64
  return _mm512_maskz_mov_ps(static_cast<__mmask16>((1u << end) - (1u << begin)), value);
#else
  using Lanes = int32_t __attribute__((vector_size(PREACT_VECTOR_BYTES)));
  Lanes lane;
  for (int i = 0; i < Pack<float>::lanes; ++i) lane[i] = i;
  const Lanes in = (lane < static_cast<int32_t>(end)) & (lane >= static_cast<int32_t>(begin));
  return in ? value : FloatVector{};
#endif
}
PREACT_INLINE DoubleVector some_lanes(DoubleVector value, int64_t begin, int64_t end) {
  using Lanes = int64_t __attribute__((vector_size(PREACT_VECTOR_BYTES)));
  Lanes lane;
  for (int i = 0; i < Pack<double>::lanes; ++i) lane[i] = i;
  const Lanes in = (lane < end) & (lane >= begin);
  return in ? value : DoubleVector{};
}
PREACT_INLINE FloatPair some_lanes(FloatPair value, int64_t begin, int64_t end) {
  return {some_lanes(value.even, (begin + 1) / 2, (end + 1) / 2),
          some_lanes(value.odd, begin / 2, end / 2)};
}
// What of a value belongs to elements that are there.
template <typename R>
PREACT_INLINE R present(R value, Offset) {
  return value;
}
template <typename R>
PREACT_INLINE R present(R value, Rest at) {
  return some_lanes(value, 0, at.count);
}
template <typename R>
PREACT_INLINE R present(R value, Tail at) {
  constexpr size_t kLanes = sizeof(R) / (std::is_same_v<R, DoubleVector> ? 8 : 4);
  return some_lanes(value, at.again, kLanes);
}

// A value as it will be read back after a store in type T.
template <typename P, typename T>
PREACT_INLINE typename P::reg rounded(typename P::reg value) {
  if constexpr (std::is_same_v<T, accumulate_t<T>>) {
    return value;
  } else if constexpr (std::is_same_v<P, Pairs>) {
    return P::rounded(value);
  } else {
    T stored[P::lanes];
    P::store(stored, value);
    return P::load(stored);
  }
}

// Per-channel arrays of a map whose rows are channels, as its vectors meet them: their own order,
// but of pairs, for each vector's channels those of even index and then those of odd, zeros where
// channels run out.
template <typename P>
PREACT_INLINE int64_t lanes_for(int64_t channels) {
  return std::is_same_v<P, Pairs> ? (channels + P::lanes - 1) / P::lanes * P::lanes : channels;
}
template <typename P, typename V>
void to_lanes(const V* values, int64_t channels, V* lanes) {
  if constexpr (std::is_same_v<P, Pairs>) {
    constexpr int kHalf = P::lanes / 2;
    for (; channels >= P::lanes; channels -= P::lanes, values += P::lanes, lanes += P::lanes) {
      for (int i = 0; i < kHalf; ++i) lanes[i] = values[2 * i];
      for (int i = 0; i < kHalf; ++i) lanes[kHalf + i] = values[2 * i + 1];
    }
    if (channels == 0) return;
    std::fill_n(lanes, P::lanes, V(0));
    for (int64_t c = 0; c < channels; ++c) lanes[c % 2 * kHalf + c / 2] = values[c];
  } else {
    std::copy_n(values, channels, lanes);
  }
}
template <typename P, typename V>
void from_lanes(const V* lanes, int64_t channels, V* values) {
  if constexpr (std::is_same_v<P, Pairs>) {
    constexpr int kHalf = P::lanes / 2;
    for (; channels >= P::lanes; channels -= P::lanes, values += P::lanes, lanes += P::lanes) {
      for (int i = 0; i < kHalf; ++i) values[2 * i] = lanes[i];
      for (int i = 0; i < kHalf; ++i) values[2 * i + 1] = lanes[kHalf + i];
    }
    for (int64_t c = 0; c < channels; ++c) values[c] = lanes[c % 2 * kHalf + c / 2];
  } else {
    std::copy_n(lanes, channels, values);
  }
}
