#include "cuda/batch_norm_relu_conv2d_backward_input.cuh"
#include "cuda/batch_norm_relu_conv2d_backward_weight.cuh"
#include "cuda/conv2d_host.h"

namespace preact::cuda {

// Masked gradient of the batch norm's result, its two sums (gradients of weight and bias), and the
// gradient of conv_weight. grad_activation is what other users of the activation add; grad_output
// is pending where pending_input and coefficients are given.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward_op(
    const Tensor& grad_output_, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    const Tensor& conv_weight_, const OptionalTensor& grad_activation_, Pair stride, Pair padding,
    Pair dilation, int64_t groups, const OptionalTensor& pending_input_,
    const OptionalTensor& coefficients_) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight_, {stride, padding, dilation, groups});
  if (!is_pointwise(input, conv_weight_, shape, groups)) {
    return run_reference<4>("preact::batch_norm_relu_conv2d_backward", grad_output_, input, mean,
                            var, weight, bias, eps, conv_weight_, grad_activation_, stride, padding,
                            dilation, groups, pending_input_, coefficients_);
  }
  check_conv2d_backward(grad_output_, input, shape, grad_activation_, pending_input_,
                        coefficients_);
  Call call(input);
  const NormVectors norm(input, mean, var, weight, bias, eps);
  const Tensor conv_weight = dense(conv_weight_, MemoryFormat::Contiguous);
  const Tensor grad_output = dense(grad_output_, MemoryFormat::ChannelsLast);
  const OptionalTensor grad_activation = dense(grad_activation_, MemoryFormat::ChannelsLast);
  const OptionalTensor pending_input = dense(pending_input_, MemoryFormat::ChannelsLast);
  const OptionalTensor coefficients = dense(coefficients_, MemoryFormat::Contiguous);
  Tensor grad_z = empty_like(input, MemoryFormat::ChannelsLast);
  Tensor grad_weight = empty_vector(input), grad_bias = empty_vector(input);
  Tensor grad_conv_weight = empty_like(conv_weight_, memory_format_of(conv_weight_));
  const int64_t channels = shape.in_channels, out_channels = shape.out_channels;
  const int in_rows = rows_in(shape), out_rows = rows_out(shape);

  const auto launch_both = [&]<typename Math, int kBlockN, bool kPending>() {
    using T = typename Math::T;
    const Matrix<T> grad = matrix<T>(grad_output, out_channels);
    const Pending<T> pending{matrix<T>(pending_input, out_channels), data<float>(coefficients)};
    const T *x = data<T>(input), *other = data<T>(grad_activation);
    T* const dz = mutable_data<T>(grad_z);
    const int64_t partials = ceil_div(in_rows, kBlockM) * channels;
    const Conv2dBackwardInput<T> for_input{grad,
                                           pending,
                                           matrix<T>(conv_weight, channels),
                                           row_map(shape, true),
                                           norm.get<float>(),
                                           x,
                                           other,
                                           dz,
                                           in_rows,
                                           static_cast<int>(channels),
                                           is_vector(channels, 8, x, other, dz),
                                           call.workspace<float>(partials),
                                           call.workspace<float>(partials)};
    launch_conv2d_backward_input<Math, kBlockN, kPending>(
        for_input, mutable_data<float>(grad_weight), mutable_data<float>(grad_bias), call.stream());

    using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN, kPending>;
    const Splits splits =
        Kernel::splits(out_rows, static_cast<int>(out_channels), static_cast<int>(channels));
    const Conv2dBackwardWeight<T> for_weight{
        grad,
        pending,
        matrix<T>(input, channels),
        row_map(shape, false),
        norm.get<float>(),
        out_rows,
        splits.rows,
        call.workspace<float>(splits.count * out_channels * channels)};
    launch_conv2d_backward_weight<Math, kBlockN, kPending>(
        for_weight, mutable_data<T>(grad_conv_weight), call.stream());
  };
  dispatch_math(input.scalar_type(), channels, [&]<typename Math, int kBlockN>() {
    // A pending gradient needs the registers that wide tiles would.
    if (pending_input) {
      launch_both.template operator()<Math, 64, true>();
    } else {
      launch_both.template operator()<Math, kBlockN, false>();
    }
  });
  return {grad_z, grad_weight, grad_bias, grad_conv_weight};
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_relu_conv2d_backward",
         TORCH_BOX(&preact::cuda::batch_norm_relu_conv2d_backward_op));
}
