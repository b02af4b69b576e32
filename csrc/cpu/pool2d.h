// What a pooling reads and writes: shared by kernels and host code.
#pragma once

#include <cstdint>

namespace preact::cpu {

// Windows over a channels_last map. Padding is never the maximum and counts for nothing.
struct PoolShape {
  int64_t batch, channels, in_h, in_w, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;

  // Of one element of a window in its mean.
  template <typename A>
  A share() const {
    return A(1) / static_cast<A>(kernel_h * kernel_w);
  }
};

// Where no activation of a window is positive none has a gradient.
constexpr int kNowhere = 255;

// Maps and the batch norm's values per channel.
template <typename T, typename A>
struct PoolForward {
  PoolShape shape;
  const A *mean, *scale, *bias;
  const T* input;
  T* output;
  uint8_t* positions;  // in the window, of the maximum; null where the mean is taken
};

template <typename T, typename A>
struct PoolBackward {
  PoolShape shape;
  const A *mean, *scale, *bias;
  const A *slope, *offset;  // what the sums add to the gradient: slope * (x - mean) + offset
  const T *input, *grad_output;
  const uint8_t* positions;
  T* grad_input;
};

}  // namespace preact::cpu
