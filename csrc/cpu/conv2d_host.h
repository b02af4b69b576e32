// What the ops of the fused convolution share around their kernels.
#pragma once

#include "common/conv2d_arguments.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/host.h"

namespace preact::cpu {

// Distance between the pixels of a map in NHWC order, its channels side by side; more than their
// number where the map is some of the channels of a wider one. 0 for every other layout.
inline int64_t pixel_stride(const Tensor& tensor) {
  if (tensor.dim() != 4 || (tensor.size(1) != 1 && tensor.stride(1) != 1)) return 0;
  int64_t stride = -1, pixels = 1;
  for (const int dim : {3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (stride < 0) stride = tensor.stride(dim);
    if (tensor.stride(dim) != stride * pixels) return 0;
    pixels *= tensor.size(dim);
  }
  if (stride < 0) return tensor.size(1);
  return stride >= tensor.size(1) ? stride : 0;
}

// Whether the direct convolution takes some channels of a channels_last map: float32, no groups, a
// stride its tiles are compiled for. Everything else runs as the reference does.
inline bool is_direct_slice(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                            int64_t groups) {
  return input.scalar_type() == ScalarType::Float && weight.scalar_type() == ScalarType::Float &&
         groups == 1 && has_direct_stride(shape) && shape.batch > 0 && pixel_stride(input) > 0;
}

// The same for a whole map, of a layout that its results take.
inline bool is_direct(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                      int64_t groups) {
  return memory_format_of(input) == MemoryFormat::ChannelsLast &&
         is_direct_slice(input, weight, shape, groups);
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

struct ConvGradients {
  Tensor grad_z, grad_weight, grad_bias, grad_conv_weight;
};

}  // namespace preact::cpu
