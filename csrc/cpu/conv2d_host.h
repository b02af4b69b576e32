// What the ops of the fused convolution share around their kernels.
#pragma once

#include "common/conv2d_arguments.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/host.h"

namespace preact::cpu {

// Whether the direct convolution takes these: float32 in channels_last, no groups, a stride its
// tiles are compiled for. Everything else runs as the reference does.
inline bool is_direct(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                      int64_t groups) {
  return input.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
         groups == 1 && has_direct_stride(shape) && shape.batch > 0 &&
         memory_format_of(input) == MemoryFormat::ChannelsLast;
}

inline WeightStrides weight_strides(const Tensor& weight) {
  return {weight.stride(0), weight.stride(1), weight.stride(2), weight.stride(3)};
}

inline DirectNorm direct_norm(const Affine<float>& affine) {
  return {affine.mean.data(), affine.scale.data(), affine.bias.data()};
}

inline const float* maybe_data(const OptionalTensor& tensor) {
  return tensor ? data<float>(*tensor) : nullptr;
}

}  // namespace preact::cpu
