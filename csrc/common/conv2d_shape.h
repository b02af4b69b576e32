// Sizes of a 2-d convolution without groups, input [N, H, W, C] and output [N, H', W', O].
#pragma once

#include <cstdint>

namespace preact {

struct Conv2dShape {
  int64_t batch, in_channels, in_h, in_w;
  int64_t out_channels, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t padding_h, padding_w, dilation_h, dilation_w;

  int64_t taps() const { return kernel_h * kernel_w; }
};

}  // namespace preact
