// Element types in memory and the type their arithmetic is done in.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cstdint>

namespace preact {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Always inlined: kernels compile it for their own instruction set, the linker would keep one.
inline __attribute__((always_inline)) float bfloat16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}
// Round to nearest, ties to even; any NaN becomes the quiet NaN PyTorch writes.
inline __attribute__((always_inline)) uint16_t float_to_bfloat16(float value) {
  if (value != value) return 0x7fc0;
  const auto word = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

inline __attribute__((always_inline)) BFloat16 as_bfloat16(BFloat16 value) { return value; }
inline __attribute__((always_inline)) BFloat16 as_bfloat16(float value) {
  return {float_to_bfloat16(value)};
}
inline void assign(BFloat16& to, float value) { to = as_bfloat16(value); }
inline void assign(float& to, float value) { to = value; }

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulate<T>::type;

}  // namespace preact
