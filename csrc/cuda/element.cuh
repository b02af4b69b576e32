// Element types: the type their arithmetic is done in, conversion, and neighbours in one access.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/target.cuh"

namespace preact::cuda {

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

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x) {
  return x;
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <typename T>
__device__ inline accumulate_t<T> to_accumulate(T x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return to_float(x);
  }
}
template <typename T>
__device__ inline T from_accumulate(accumulate_t<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    return x;
  } else {
    return from_float<T>(x);
  }
}

// What moves in one access of 16 bytes.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
__device__ inline void load_vector(T (&values)[kVector<T>], const void* pointer) {
  const uint4 bits = *static_cast<const uint4*>(pointer);
  memcpy(values, &bits, 16);
}
template <typename T>
__device__ inline void store_vector(void* pointer, const T (&values)[kVector<T>]) {
  uint4 bits;
  memcpy(&bits, values, 16);
  *static_cast<uint4*>(pointer) = bits;
}

// Eight neighbours, the first `count` of which exist; the others read as zero and are not written.
// `vector`: all eight exist and `pointer` is aligned to 16 bytes.
template <typename T>
__device__ inline void load_eight(float (&values)[8], const T* pointer, int count, bool vector) {
  if (vector) {
    for (int part = 0; part < 8 / kVector<T>; ++part) {
      T loaded[kVector<T>];
      load_vector(loaded, pointer + part * kVector<T>);
      for (int e = 0; e < kVector<T>; ++e) {
        values[part * kVector<T> + e] = to_float(loaded[e]);
      }
    }
  } else {
    for (int e = 0; e < 8; ++e) values[e] = e < count ? to_float(pointer[e]) : 0.0f;
  }
}
template <typename T>
__device__ inline void store_eight(T* pointer, const T (&values)[8], int count, bool vector) {
  if (vector) {
    for (int part = 0; part < 8 / kVector<T>; ++part) {
      T stored[kVector<T>];
      for (int e = 0; e < kVector<T>; ++e) stored[e] = values[part * kVector<T> + e];
      store_vector(pointer + part * kVector<T>, stored);
    }
  } else {
    for (int e = 0; e < 8; ++e) {
      if (e < count) pointer[e] = values[e];
    }
  }
}

}  // namespace preact::cuda
