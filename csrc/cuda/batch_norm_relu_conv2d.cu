#include "cuda/batch_norm_relu_conv2d.cuh"

#include "cuda/conv2d_host.h"

namespace preact::cuda {

// conv2d(relu(batch_norm(input))) + conv_bias + residual, and the mean and biased variance of that.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d_op(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight_,
    const OptionalTensor& conv_bias_, const OptionalTensor& residual_, Pair stride, Pair padding,
    Pair dilation, int64_t groups) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight_, {stride, padding, dilation, groups});
  if (!is_pointwise(input, conv_weight_, shape, groups)) {
    return run_reference<3>("preact::batch_norm_relu_conv2d", input, mean, var, weight, bias, eps,
                            conv_weight_, conv_bias_, residual_, stride, padding, dilation, groups);
  }
  check_conv2d_forward(input, shape, conv_bias_, residual_);
  Call call(input);
  const NormVectors norm(input, mean, var, weight, bias, eps);
  const Tensor conv_weight = dense(conv_weight_, MemoryFormat::Contiguous);
  const OptionalTensor conv_bias = dense(conv_bias_, MemoryFormat::Contiguous);
  const OptionalTensor residual = dense(residual_, MemoryFormat::ChannelsLast);
  const int64_t columns = shape.out_channels;
  Tensor output = empty_map({shape.batch, columns, shape.out_h, shape.out_w}, input,
                            MemoryFormat::ChannelsLast);
  Tensor out_mean = empty_vector(output), out_var = empty_vector(output);
  const int rows = rows_out(shape);
  const int64_t partials = ceil_div(rows, kBlockM) * columns;
  dispatch_math(input.scalar_type(), columns, [&]<typename Math, int kBlockN>() {
    using T = typename Math::T;
    T* const result = mutable_data<T>(output);
    const T* const added = data<T>(residual);
    const Conv2dForward<T> p{matrix<T>(input, shape.in_channels),
                             matrix<T>(conv_weight, shape.in_channels),
                             row_map(shape, false),
                             norm.get<float>(),
                             data<T>(conv_bias),
                             added,
                             result,
                             rows,
                             static_cast<int>(columns),
                             is_vector(columns, 8, result, added),
                             call.workspace<float>(partials),
                             call.workspace<float>(partials)};
    launch_conv2d_forward<Math, kBlockN>(p, mutable_data<float>(out_mean),
                                         mutable_data<float>(out_var), call.stream());
  });
  return {output, out_mean, out_var};
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_relu_conv2d", TORCH_BOX(&preact::cuda::batch_norm_relu_conv2d_op));
}
