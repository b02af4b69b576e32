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

// Whether a convolution of ours takes the types: float32, or bfloat16, where the weight may be
// float32, as parameters are under autocast, and its gradient then is.
inline bool has_direct_types(const Tensor& input, const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Float
             ? input.scalar_type() == ScalarType::Float ||
                   input.scalar_type() == ScalarType::BFloat16
             : weight.scalar_type() == ScalarType::BFloat16 &&
                   input.scalar_type() == ScalarType::BFloat16;
}

// Whether the direct convolution takes some channels of a channels_last map: those types, no
// groups, a stride its tiles are compiled for. Everything else runs as the reference does.
inline bool is_direct_slice(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                            int64_t groups) {
  return has_direct_types(input, weight) && groups == 1 && has_direct_stride(shape) &&
         shape.batch > 0 && pixel_stride(input) > 0;
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

template <typename T>
const T* maybe_data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

// Calls function with a value of the tensor's element type.
template <typename Function>
void with_element_type(const Tensor& tensor, Function function) {
  if (tensor.scalar_type() == ScalarType::Float) {
    function(float{});
  } else {
    function(BFloat16{});
  }
}

// The weight for maps of T, packed for the direct convolution or for Winograd's.
template <typename T>
void pack_weights(const Tensor& weight, const Conv2dShape& shape,
                  const std::vector<int64_t>& kernel, bool transposed, float* packed) {
  with_element_type(weight, [&](auto type) {
    pack_weights<T>(data<decltype(type)>(weight), weight_strides(weight), shape, kernel, transposed,
                    packed);
  });
}
template <typename T>
void transform_weights(const Tensor& weight, const Conv2dShape& shape, bool transposed,
                       float* transformed) {
  with_element_type(weight, [&](auto type) {
    transform_weights<T>(data<decltype(type)>(weight), weight_strides(weight), shape, transposed,
                         transformed);
  });
}

struct ConvGradients {
  Tensor grad_z, grad_weight, grad_bias, grad_conv_weight;
};

}  // namespace preact::cpu
