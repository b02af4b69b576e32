// Vectors and single values under one set of names. Included by foreach_capability.h inside a
// namespace per instruction set; PREACT_VECTOR_BYTES says which. A vector's loop and the scalar
// loop over its tail run the same operations, fused where the set fuses, so that an element's
// result does not depend on which loop it fell into.

#define PREACT_INLINE inline __attribute__((always_inline))

using FloatVector = float __attribute__((vector_size(PREACT_VECTOR_BYTES)));
using DoubleVector = double __attribute__((vector_size(PREACT_VECTOR_BYTES)));
using WordVector = uint32_t __attribute__((vector_size(PREACT_VECTOR_BYTES)));
using HalfwordVector = uint16_t __attribute__((vector_size(PREACT_VECTOR_BYTES / 2)));

PREACT_INLINE double madd(double a, double b, double c) {
#if PREACT_VECTOR_BYTES >= 32
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}
PREACT_INLINE float madd(float a, float b, float c) {
#if PREACT_VECTOR_BYTES >= 32
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
PREACT_INLINE FloatVector madd(FloatVector a, FloatVector b, FloatVector c) {
#if PREACT_VECTOR_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif PREACT_VECTOR_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
PREACT_INLINE DoubleVector madd(DoubleVector a, DoubleVector b, DoubleVector c) {
#if PREACT_VECTOR_BYTES == 64
  return _mm512_fmadd_pd(a, b, c);
#elif PREACT_VECTOR_BYTES == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// How `Lanes` values of accumulation type A are held, and moved from and to memory.
template <typename A>
struct Single {
  using reg = A;
  static constexpr int lanes = 1;

  static PREACT_INLINE reg broadcast(A value) { return value; }
  static PREACT_INLINE reg load_channels(const A* p) { return *p; }
  static PREACT_INLINE void store_channels(A* p, reg value) { *p = value; }

  static PREACT_INLINE reg load(const A* p) { return *p; }
  static PREACT_INLINE reg load(const BFloat16* p) { return bfloat16_to_float(p->bits); }
  static PREACT_INLINE reg load(const Half* p) {
    return torch::headeronly::detail::fp16_ieee_to_fp32_value(p->bits);
  }
  static PREACT_INLINE void store(A* p, reg value) { *p = value; }
  static PREACT_INLINE void store(BFloat16* p, reg value) { p->bits = float_to_bfloat16(value); }
  static PREACT_INLINE void store(Half* p, reg value) {
    p->bits = torch::headeronly::detail::fp16_ieee_from_fp32_value(value);
  }
};

template <typename A>
struct Pack {
  using reg = std::conditional_t<std::is_same_v<A, double>, DoubleVector, FloatVector>;
  static constexpr int lanes = PREACT_VECTOR_BYTES / static_cast<int>(sizeof(A));

  // Less zero, not plus zero: the one is the value itself to the compiler, the other an addition.
  static PREACT_INLINE reg broadcast(A value) { return value - reg{}; }
  static PREACT_INLINE A sum(reg value) {
    A sums[lanes];
    std::memcpy(sums, &value, sizeof value);
    for (int half = lanes / 2; half > 0; half /= 2) {
      for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
    }
    return sums[0];
  }

  static PREACT_INLINE reg folded(reg value) { return value; }

  static PREACT_INLINE reg load_channels(const A* p) { return load(p); }
  static PREACT_INLINE void store_channels(A* p, reg value) { store(p, value); }

  static PREACT_INLINE reg load(const A* p) {
    reg value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  static PREACT_INLINE reg load(const BFloat16* p) {
    // Spelt out: GCC widens the halves of a vector one by one.
#if PREACT_VECTOR_BYTES == 64
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const auto wide = reinterpret_cast<WordVector>(_mm512_maskz_cvtepu16_epi32(0xffff, bits));
#elif PREACT_VECTOR_BYTES == 32
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const auto wide = reinterpret_cast<WordVector>(_mm256_cvtepu16_epi32(bits));
#else
    HalfwordVector bits;
    std::memcpy(&bits, p, sizeof bits);
    const WordVector wide = __builtin_convertvector(bits, WordVector);
#endif
    const WordVector words = wide << 16;
    reg value;
    std::memcpy(&value, &words, sizeof value);
    return value;
  }
  static PREACT_INLINE reg load(const Half* p) {
#if PREACT_VECTOR_BYTES == 64
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PREACT_VECTOR_BYTES == 32
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    reg value;
    for (int i = 0; i < lanes; ++i) value[i] = Single<A>::load(p + i);
    return value;
#endif
  }

  static PREACT_INLINE void store(A* p, reg value) { std::memcpy(p, &value, sizeof value); }
  static PREACT_INLINE void store(BFloat16* p, reg value) {
    WordVector words;
    std::memcpy(&words, &value, sizeof words);
    words = (words + 0x7fffu + ((words >> 16) & 1u)) >> 16;
    const WordVector quiet = WordVector{} + 0x7fc0u;
    words = value == value ? words : quiet;
    const HalfwordVector bits = __builtin_convertvector(words, HalfwordVector);
    std::memcpy(p, &bits, sizeof bits);
  }
  static PREACT_INLINE void store(Half* p, reg value) {
#if PREACT_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
#elif PREACT_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < lanes; ++i) Single<A>::store(p + i, value[i]);
#endif
  }
};

// A vector's lanes added up to four, or fewer where it has no more.
template <typename A>
constexpr int kFewLanes = std::min(Pack<A>::lanes, 4);

using FewFloats = float __attribute__((vector_size(16)));
PREACT_INLINE FewFloats few(FloatVector value) {
#if PREACT_VECTOR_BYTES == 64
  const __m256 half = _mm256_add_ps(_mm512_maskz_extractf32x8_ps(0xff, value, 0),
                                    _mm512_maskz_extractf32x8_ps(0xff, value, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif PREACT_VECTOR_BYTES == 32
  return _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
#else
  return value;
#endif
}
#if PREACT_VECTOR_BYTES == 64
using FewDoubles = double __attribute__((vector_size(32)));
PREACT_INLINE FewDoubles few(DoubleVector value) {
  return _mm256_add_pd(_mm512_maskz_extractf64x4_pd(0xf, value, 0),
                       _mm512_maskz_extractf64x4_pd(0xf, value, 1));
}
#else
PREACT_INLINE DoubleVector few(DoubleVector value) { return value; }
#endif
template <typename A>
PREACT_INLINE A sum_of_few(const A* lanes) {
  A total = lanes[0];
  for (int i = 1; i < kFewLanes<A>; ++i) total += lanes[i];
  return total;
}

// `value` where z is positive or NaN, zero elsewhere.
template <typename R>
PREACT_INLINE R where_active(R z, R value) {
  const R zero{};
  return z <= zero ? zero : value;
}

// ReLU as PyTorch computes it, a NaN for a NaN: that is what this instruction gives for its second
// operand.
template <typename R>
PREACT_INLINE R relu(R z) {
#if PREACT_X86
  if constexpr (std::is_same_v<R, FloatVector>) {
#if PREACT_VECTOR_BYTES == 64
    return _mm512_maskz_max_ps(0xffff, _mm512_setzero_ps(), z);
#elif PREACT_VECTOR_BYTES == 32
    return _mm256_max_ps(_mm256_setzero_ps(), z);
#else
    return _mm_max_ps(_mm_setzero_ps(), z);
#endif
  } else if constexpr (std::is_same_v<R, float>) {
    return _mm_cvtss_f32(_mm_max_ss(_mm_setzero_ps(), _mm_set_ss(z)));
  }
#endif
  return where_active(z, z);
}
