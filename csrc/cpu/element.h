// Element types in memory and the type their arithmetic is done in.
#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace preact {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

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
