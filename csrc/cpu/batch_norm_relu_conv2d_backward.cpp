#define PREACT_KERNELS "cpu/batch_norm_relu_conv2d_backward_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_host.h"
#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {
namespace {

// The gradient of the result completed on the way, and computed again in `above` if it is to be.
template <typename T>
void complete(const UnitAfter& after, DirectAbove<T>& above, DirectBackward<T>& task) {
  task.pending_skip = data<T>(after.grad_skip);
  task.completed = mutable_data<T>(after.completed);
  if (!after.again) return;
  const UnitAfter::Again& again = *after.again;
  Conv2dShape shape = task.blocks.shape;  // of the blocks, which pointwise convolutions share
  shape.in_channels = shape.out_channels;
  shape.out_channels = again.conv_weight.size(0);
  above.staged_grad = stage_grad_output(shape);
  above.gather = backward_gathers(shape, above.staged_grad)[0];
  float* const weights = scratch(Slot::weights_above, packed_size(shape, 1));
  pack_weights<T>(again.conv_weight, shape, above.gather.kernel, true, weights);
  above.weights = weights;
  above.shift.assign(shape.in_channels, 0.0f);
  if (again.bias) {
    const Tensor bias = channel_vector(*again.bias, after.grad_skip, "bias");
    std::copy_n(data<float>(bias), shape.in_channels, above.shift.data());
  }
  above.grad_output = data<T>(again.grad_output);
  above.pending_input = data<T>(again.pending_input);
  above.coefficients = data<float>(again.coefficients);
  task.above = &above;
  task.grad_output = nullptr;
}

// `task` says where the gradient of the input goes.
template <typename T>
void direct(DirectBackward<T> task, const Tensor& grad_output, const Tensor& input,
            const Affine<float>& affine, const Tensor& conv_weight,
            const OptionalTensor& pending_input, const OptionalTensor& coefficients,
            const std::optional<UnitAfter>& after, const Conv2dShape& shape,
            const ConvGradients& found) {
  task.blocks = DirectBlocks::of(shape);
  const Conv2dShape& blocks = task.blocks.shape;
  task.winograd = has_winograd(blocks);
  const int64_t size = packed_size(blocks, blocks.taps());
  float* weights = scratch(Slot::weights, task.winograd ? transformed_size(blocks) : size);
  if (task.winograd) {
    task.staged = stage_winograd_input(blocks);
    task.staged_grad = stage_winograd_grad_output(blocks);
    transform_weights<T>(conv_weight, blocks, true, weights);
    task.weights.push_back(weights);
  } else {
    task.staged = stage_input(blocks);
    task.staged_grad = stage_grad_output(blocks);
    task.gather = forward_gather(blocks, task.staged);
    task.phases = backward_gathers(blocks, task.staged_grad);
  }
  for (const Gather& phase : task.phases) {
    pack_weights<T>(conv_weight, blocks, phase.kernel, true, weights);
    task.weights.push_back(weights);
    weights += packed_size(blocks, static_cast<int64_t>(phase.taps.size()));
  }
  task.norm = direct_norm(affine);
  task.input = data<T>(input);
  if (grad_output.scalar_type() == input.scalar_type()) {
    task.grad_output = data<T>(grad_output);
  } else {
    task.wide_grad = data<float>(grad_output);
  }
  task.pending_input = maybe_data<T>(pending_input);
  task.coefficients = maybe_data<float>(coefficients);
  task.input_stride = pixel_stride(input);
  task.output_stride = pixel_stride(grad_output);
  DirectAbove<T> above;
  if (after) complete(*after, above, task);

  const auto chunks = BlockChunks::of_gradients(blocks, size);
  float* const sums = scratch(Slot::sums, chunks.count * size);
  const int64_t channels = shape.in_channels;
  Partials norm_sums(chunks.count, channels);
  const auto part = PREACT_SELECT(batch_norm_relu_conv2d_backward_part, T);
  parallel_over_chunks(chunks.count, [&](int64_t chunk) {
    part(task, chunks.begin(chunk), chunks.end(chunk), norm_sums.first.data() + chunk * channels,
         norm_sums.second.data() + chunk * channels, sums + chunk * size);
  });
  write_norm_gradients(norm_sums, chunks.count, affine, found.grad_weight, found.grad_bias);
  with_element_type(conv_weight, [&](auto type) {
    unpack_weight_gradient(sums, chunks.count, weight_strides(found.grad_conv_weight), blocks,
                           mutable_data<decltype(type)>(found.grad_conv_weight));
  });
}

}  // namespace

// Masked gradient of the batch norm's result, its two sums (gradients of weight and bias), and the
// gradient of conv_weight. grad_activation is what other users of the activation add; grad_output
// is pending where pending_input and coefficients are given.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& grad_activation, Pair stride, Pair padding, Pair dilation, int64_t groups,
    const OptionalTensor& pending_input, const OptionalTensor& coefficients,
    const std::optional<UnitAfter>& after, bool keeps_grad_z) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight, {stride, padding, dilation, groups});
  const Tensor& result = pending_input ? *pending_input : grad_output;
  const bool like = result.scalar_type() == input.scalar_type();
  const bool tiled = like && is_tiled(input, conv_weight, shape, groups);
  if (!tiled && !(like && is_direct(input, conv_weight, shape, groups))) {
    return run_reference<4>("preact::batch_norm_relu_conv2d_backward", grad_output, input, mean,
                            var, weight, bias, eps, conv_weight, grad_activation, stride, padding,
                            dilation, groups, pending_input, coefficients);
  }
  check_conv2d_backward(grad_output, input, shape, grad_activation, pending_input, coefficients);
  const ConvGradients found{keeps_grad_z ? empty_like(input, MemoryFormat::ChannelsLast) : Tensor(),
                            empty_vector(input), empty_vector(input),
                            empty_like(conv_weight, memory_format_of(conv_weight))};
  const Affine<float> affine(input, mean, var, weight, bias, eps);
  const OptionalTensor activation = dense(grad_activation, MemoryFormat::ChannelsLast);
  const OptionalTensor rows = dense(coefficients, MemoryFormat::Contiguous);
  // Some channels of a wider map are read where they are.
  const bool strided =
      pixel_stride(grad_output) > 0 &&
      (!pending_input || pixel_stride(*pending_input) == pixel_stride(grad_output));
  const Tensor gradient = strided ? grad_output : dense(grad_output, MemoryFormat::ChannelsLast);
  const OptionalTensor following =
      strided ? pending_input : dense(pending_input, MemoryFormat::ChannelsLast);
  if (tiled) {
    tiled_backward(gradient, input, affine, conv_weight, activation, std::nullopt, following, rows,
                   after, shape, found);
  } else {
    with_element_type(input, [&](auto type) {
      using T = decltype(type);
      DirectBackward<T> task{};
      task.grad_z = keeps_grad_z ? mutable_data<T>(found.grad_z) : nullptr;
      task.grad_activation = maybe_data<T>(activation);
      direct(task, gradient, input, affine, conv_weight, following, rows, after, shape, found);
    });
  }
  return {found.grad_z, found.grad_weight, found.grad_bias, found.grad_conv_weight};
}

bool completes_gradient(const Tensor& input, const Tensor& conv_weight, const ConvArguments& conv) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight, conv);
  return is_direct(input, conv_weight, shape, conv.groups) ||
         is_tiled(input, conv_weight, shape, conv.groups);
}

bool computes_again(const Tensor& input, const Tensor& conv_weight, const ConvArguments& conv) {
  // Multiplications grow with the square of the channels, what they save with their number.
  constexpr int64_t kMostChannels = 64;
  return completes_gradient(input, conv_weight, conv) &&
         is_pointwise(conv2d_shape(input, conv_weight, conv)) &&
         std::min(conv_weight.size(0), conv_weight.size(1)) <= kMostChannels;
}

// The op.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward_op(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& grad_activation, Pair stride, Pair padding, Pair dilation, int64_t groups,
    const OptionalTensor& pending_input, const OptionalTensor& coefficients) {
  return batch_norm_relu_conv2d_backward(grad_output, input, mean, var, weight, bias, eps,
                                         conv_weight, grad_activation, stride, padding, dilation,
                                         groups, pending_input, coefficients);
}

// The same for some channels of a wider map: what grad_z contributes to their gradient is added to
// grad_skip, and their sum written to grad_input, which may be grad_skip itself. What the sums
// contribute is left out, linear in input as batch_norm_backward_coefficients have it. grad_input
// is of the accumulation type, grad_skip of that or of input's.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward_add(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    Pair stride, Pair padding, Pair dilation, int64_t groups, const OptionalTensor& pending_input,
    const OptionalTensor& coefficients, const Tensor& grad_skip, Tensor grad_input) {
  const Conv2dShape shape = conv2d_shape(input, conv_weight, {stride, padding, dilation, groups});
  const int64_t step = pixel_stride(input), grad_step = pixel_stride(grad_output);
  const bool tiled = is_tiled_slice(input, conv_weight, shape, groups);
  if ((!tiled && !is_direct_slice(input, conv_weight, shape, groups)) ||
      pixel_stride(grad_skip) != step || pixel_stride(grad_input) != step || grad_step == 0 ||
      (pending_input && pixel_stride(*pending_input) != grad_step)) {
    return run_reference<3>("preact::batch_norm_relu_conv2d_backward_add", grad_output, input, mean,
                            var, weight, bias, eps, conv_weight, stride, padding, dilation, groups,
                            pending_input, coefficients, grad_skip, grad_input);
  }
  check_conv2d_backward(grad_output, input, shape, std::nullopt, pending_input, coefficients);
  if (grad_skip.scalar_type() == input.scalar_type()) {
    check_like(grad_skip, input, "grad_skip");
  } else {
    check_accumulated(grad_skip, input, "grad_skip");
  }
  check_accumulated(grad_input, input, "grad_input");
  const ConvGradients found{grad_input, empty_vector(input), empty_vector(input),
                            empty_like(conv_weight, memory_format_of(conv_weight))};
  const Affine<float> affine(input, mean, var, weight, bias, eps);
  const OptionalTensor rows = dense(coefficients, MemoryFormat::Contiguous);
  if (tiled) {
    tiled_backward(grad_output, input, affine, conv_weight, std::nullopt, grad_skip, pending_input,
                   rows, std::nullopt, shape, found);
  } else {
    with_element_type(input, [&](auto type) {
      using T = decltype(type);
      DirectBackward<T> task{};
      if (grad_skip.scalar_type() == input.scalar_type()) {
        task.grad_skip = data<T>(grad_skip);
      } else {
        task.wide_skip = data<float>(grad_skip);
      }
      task.grad_input = mutable_data<float>(grad_input);
      direct(task, grad_output, input, affine, conv_weight, pending_input, rows, std::nullopt,
             shape, found);
    });
  }
  return {found.grad_weight, found.grad_bias, found.grad_conv_weight};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_conv2d_backward",
         TORCH_BOX(&preact::cpu::batch_norm_relu_conv2d_backward_op));
  m.impl("batch_norm_relu_conv2d_backward_add",
         TORCH_BOX(&preact::cpu::batch_norm_relu_conv2d_backward_add));
}
