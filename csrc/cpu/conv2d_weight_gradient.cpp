#define PREACT_KERNELS "cpu/conv2d_weight_gradient_kernel.h"
#include "cpu/foreach_capability.h"
#include "cpu/host.h"

namespace preact::cpu {

// Gradient [O, C, KH, KW], in channels_last memory, of a convolution's weight: float32, no groups,
// a number of input channels that fills whole vectors of every instruction set.
Tensor conv2d_weight_gradient(const Tensor& grad_output_, const Tensor& input_, int64_t kernel_h,
                              int64_t kernel_w, int64_t stride_h, int64_t stride_w,
                              int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                              int64_t dilation_w) {
  constexpr int64_t kVector = 16;  // floats of the widest set, and 4 or 2 of the others'
  constexpr int64_t kMostChunks = 16;
  STD_TORCH_CHECK(input_.dim() == 4 && grad_output_.dim() == 4,
                  "input and grad_output must be [N, C, H, W]");
  STD_TORCH_CHECK(input_.scalar_type() == ScalarType::Float &&
                      grad_output_.scalar_type() == ScalarType::Float,
                  "input and grad_output must be float32");
  const Tensor input = dense(input_, MemoryFormat::ChannelsLast);
  const Tensor grad_output = dense(grad_output_, MemoryFormat::ChannelsLast);
  const Conv2dShape shape{input.size(0),       input.size(1),       input.size(2),
                          input.size(3),       grad_output.size(1), grad_output.size(2),
                          grad_output.size(3), kernel_h,            kernel_w,
                          stride_h,            stride_w,            padding_h,
                          padding_w,           dilation_h,          dilation_w};
  const auto outputs = [](int64_t size, int64_t kernel, int64_t stride, int64_t padding,
                          int64_t dilation) {
    return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
  };
  STD_TORCH_CHECK(shape.in_channels % kVector == 0, "input must have a multiple of ", kVector,
                  " channels, got ", shape.in_channels);
  STD_TORCH_CHECK(
      grad_output.size(0) == shape.batch &&
          shape.out_h == outputs(shape.in_h, kernel_h, stride_h, padding_h, dilation_h) &&
          shape.out_w == outputs(shape.in_w, kernel_w, stride_w, padding_w, dilation_w),
      "grad_output must have the shape of the convolution's result");

  const int64_t sizes[4] = {shape.out_channels, shape.in_channels, kernel_h, kernel_w};
  Tensor grad_weight = torch::stable::empty({sizes, 4}, ScalarType::Float, std::nullopt,
                                            input.device(), std::nullopt,
                                            MemoryFormat::ChannelsLast);
  const int64_t elements = shape.out_channels * kernel_h * kernel_w * shape.in_channels;
  // Chunks of images by shape alone, added in order: the result is the same on any threads.
  const int64_t size = ceil_div(shape.batch, kMostChunks);
  const int64_t chunks = ceil_div(shape.batch, size);
  std::vector<float> partial(chunks * elements, 0.0f);
  const auto part = PREACT_SELECT(conv2d_weight_gradient_part, float);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      part(data<float>(grad_output), data<float>(input), shape, chunk * size,
           std::min((chunk + 1) * size, shape.batch), partial.data() + chunk * elements);
    }
  });
  float* const sums = mutable_data<float>(grad_weight);
  std::copy_n(partial.data(), elements, sums);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    for (int64_t i = 0; i < elements; ++i) sums[i] += partial[chunk * elements + i];
  }
  return grad_weight;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("conv2d_weight_gradient", TORCH_BOX(&preact::cpu::conv2d_weight_gradient));
}
