#define PREACT_KERNELS "cpu/batch_norm_relu_conv2d_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_host.h"
#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {
namespace {

// Writes output and returns its mean and variance.
template <typename T>
std::tuple<Tensor, Tensor> direct(const Tensor& input, const Affine<float>& affine,
                                  const Tensor& conv_weight, const OptionalTensor& bias,
                                  const OptionalTensor& residual, const Conv2dShape& shape,
                                  const Tensor& output) {
  DirectForward<T> task;
  const int64_t staged_row = blocks_of(shape.in_channels) * kBlock * sizeof(float) * shape.in_w;
  task.blocks = DirectBlocks::of_result(
      shape, staged_row * shape.stride_h + shape.out_channels * sizeof(T) * shape.out_w);
  const Conv2dShape& blocks = task.blocks.shape;
  task.winograd = has_winograd(shape);
  float* weights;
  if (task.winograd) {
    task.staged = stage_winograd_input(blocks);
    weights = scratch(Slot::weights, transformed_size(blocks));
    transform_weights<T>(conv_weight, blocks, false, weights);
  } else {
    task.staged = stage_input(blocks);
    task.gather = forward_gather(blocks, task.staged);
    weights = scratch(Slot::weights, packed_size(blocks, blocks.taps()));
    pack_weights<T>(conv_weight, blocks, task.gather.kernel, false, weights);
  }
  Tensor mean = empty_vector(output), var = empty_vector(output);
  task.norm = direct_norm(affine);
  LineVector<float> wide_bias;
  if (bias) {
    const Tensor wide = as_type(*bias, ScalarType::Float);
    wide_bias.assign(data<float>(wide), data<float>(wide) + shape.out_channels);
  }
  task.input = data<T>(input);
  task.weights = weights;
  task.bias = bias ? wide_bias.data() : nullptr;
  task.residual = maybe_data<T>(residual);
  task.output = mutable_data<T>(output);
  task.input_stride = pixel_stride(input);
  task.output_stride = pixel_stride(output);

  const auto chunks = BlockChunks::of_result(blocks);
  Partials partials(chunks.count, shape.out_channels);
  const auto part = PREACT_SELECT(batch_norm_relu_conv2d_part, T);
  parallel_over_chunks(chunks.count, [&](int64_t chunk) {
    part(task, chunks.begin(chunk), chunks.end(chunk),
         partials.first.data() + chunk * shape.out_channels,
         partials.second.data() + chunk * shape.out_channels);
  });
  const auto count_of = [&](int64_t chunk) {
    return task.blocks.pixels(chunks.begin(chunk), chunks.end(chunk));
  };
  write_statistics<float>(partials, chunks.count, count_of, mean, var);
  return {mean, var};
}

// Which of them takes maps like input; in bfloat16 it is tiled where that may be.
auto forward_for(const Tensor& input, bool tiled) {
  if (tiled) return &tiled_forward;
  return input.scalar_type() == ScalarType::Float ? &direct<float> : &direct<BFloat16>;
}

}  // namespace

// conv2d(relu(batch_norm(input))) + conv_bias + residual, and the mean and biased variance of that.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& conv_bias, const OptionalTensor& residual, Pair stride, Pair padding,
    Pair dilation, int64_t groups) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight, {stride, padding, dilation, groups});
  const bool tiled = is_tiled(input, conv_weight, shape, groups);
  if (!tiled && !is_direct(input, conv_weight, shape, groups)) {
    return run_reference<3>("preact::batch_norm_relu_conv2d", input, mean, var, weight, bias, eps,
                            as_type(conv_weight, input.scalar_type()), conv_bias, residual, stride,
                            padding, dilation, groups);
  }
  check_conv2d_forward(input, shape, conv_bias, residual);
  const Affine<float> affine(input, mean, var, weight, bias, eps);
  const OptionalTensor its_bias = dense(conv_bias, MemoryFormat::Contiguous);
  const OptionalTensor added = dense(residual, MemoryFormat::ChannelsLast);
  Tensor output = empty_map({shape.batch, shape.out_channels, shape.out_h, shape.out_w}, input,
                            MemoryFormat::ChannelsLast);
  const auto [output_mean, output_var] =
      forward_for(input, tiled)(input, affine, conv_weight, its_bias, added, shape, output);
  return {output, output_mean, output_var};
}

// The op: as above, in the type of conv_weight.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d_op(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& conv_bias, const OptionalTensor& residual, Pair stride, Pair padding,
    Pair dilation, int64_t groups) {
  if (conv_weight.scalar_type() != input.scalar_type()) {
    return run_reference<3>("preact::batch_norm_relu_conv2d", input, mean, var, weight, bias, eps,
                            conv_weight, conv_bias, residual, stride, padding, dilation, groups);
  }
  return batch_norm_relu_conv2d(input, mean, var, weight, bias, eps, conv_weight, conv_bias,
                                residual, stride, padding, dilation, groups);
}

// The same, written into some channels of a wider map, whose statistics are returned.
std::tuple<Tensor, Tensor> batch_norm_relu_conv2d_into(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const Tensor& conv_weight, Pair stride, Pair padding,
    Pair dilation, int64_t groups, Tensor output) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight, {stride, padding, dilation, groups});
  check_result_like(output, shape, input, "output");
  const bool tiled = is_tiled_slice(input, conv_weight, shape, groups);
  if ((!tiled && !is_direct_slice(input, conv_weight, shape, groups)) ||
      pixel_stride(output) == 0) {
    return run_reference<2>("preact::batch_norm_relu_conv2d_into", input, mean, var, weight, bias,
                            eps, conv_weight, stride, padding, dilation, groups, output);
  }
  return forward_for(input, tiled)(input, Affine<float>(input, mean, var, weight, bias, eps),
                                   conv_weight, std::nullopt, std::nullopt, shape, output);
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_conv2d", TORCH_BOX(&preact::cpu::batch_norm_relu_conv2d_op));
  m.impl("batch_norm_relu_conv2d_into", TORCH_BOX(&preact::cpu::batch_norm_relu_conv2d_into));
}
