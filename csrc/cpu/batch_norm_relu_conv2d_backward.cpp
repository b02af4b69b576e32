#define PREACT_KERNELS "cpu/batch_norm_relu_conv2d_backward_kernel.h"
#include "cpu/foreach_capability.h"
#include "cpu/conv2d_host.h"
#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {
namespace {

void direct(const Tensor& grad_output, const Tensor& input, const Affine<float>& affine,
            const Tensor& conv_weight, const OptionalTensor& grad_activation,
            const OptionalTensor& pending_input, const OptionalTensor& coefficients,
            const Conv2dShape& shape, const ConvGradients& found) {
  // A chunk's sums of a large weight cost more than its blocks are worth to another thread.
  constexpr int64_t kSmallWeight = 8192, kMostChunks = 64, kMostLargeChunks = 16;
  DirectBackward task;
  task.blocks = DirectBlocks::of(shape);
  const Conv2dShape& blocks = task.blocks.shape;
  task.winograd = has_winograd(blocks);
  const int64_t size = packed_size(blocks, blocks.taps());
  float* weights = scratch(Slot::weights, task.winograd ? transformed_size(blocks) : size);
  if (task.winograd) {
    task.staged = stage_winograd_input(blocks);
    task.staged_grad = stage_winograd_grad_output(blocks);
    transform_weights(data<float>(conv_weight), weight_strides(conv_weight), blocks, true, weights);
    task.weights.push_back(weights);
  } else {
    task.staged = stage_input(blocks);
    task.staged_grad = stage_grad_output(blocks);
    task.gather = forward_gather(blocks, task.staged);
    task.phases = backward_gathers(blocks, task.staged_grad);
  }
  for (const Gather& phase : task.phases) {
    pack_weights(data<float>(conv_weight), weight_strides(conv_weight), blocks, phase.kernel, true,
                 weights);
    task.weights.push_back(weights);
    weights += packed_size(blocks, static_cast<int64_t>(phase.taps.size()));
  }
  task.norm = direct_norm(affine);
  task.input = data<float>(input);
  task.grad_output = data<float>(grad_output);
  task.grad_activation = maybe_data(grad_activation);
  task.pending_input = maybe_data(pending_input);
  task.coefficients = maybe_data(coefficients);
  task.grad_z = mutable_data<float>(found.grad_z);

  const BlockChunks chunks(blocks, size <= kSmallWeight ? kMostChunks : kMostLargeChunks);
  float* const sums = scratch(Slot::sums, chunks.count * size);
  const int64_t channels = shape.in_channels;
  std::vector<double> sum_dz(chunks.count * channels), sum_dz_x(chunks.count * channels);
  const auto part = PREACT_SELECT(batch_norm_relu_conv2d_backward_part, float);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      part(task, chunks.begin(chunk), chunks.end(blocks, chunk), sum_dz.data() + chunk * channels,
           sum_dz_x.data() + chunk * channels, sums + chunk * size);
    }
  });
  write_norm_gradients(sum_dz, sum_dz_x, chunks.count, affine, found);
  unpack_weight_gradient(sums, chunks.count, weight_strides(found.grad_conv_weight), blocks,
                         mutable_data<float>(found.grad_conv_weight));
}

}  // namespace

// Masked gradient of the batch norm's result, its two sums (gradients of weight and bias), and the
// gradient of conv_weight. grad_activation is what other users of the activation add; grad_output
// is pending where pending_input and coefficients are given.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_relu_conv2d_backward(
    const Tensor& grad_output, const Tensor& input, const Tensor& mean, const Tensor& var,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& conv_weight,
    const OptionalTensor& grad_activation, Pair stride, Pair padding, Pair dilation, int64_t groups,
    const OptionalTensor& pending_input, const OptionalTensor& coefficients) {
  const Conv2dShape shape =
      conv2d_shape(input, conv_weight, {stride, padding, dilation, groups});
  const bool tiled = is_tiled(input, conv_weight, shape, groups);
  if (!tiled && !is_direct(input, conv_weight, shape, groups)) {
    return run_reference<4>("preact::batch_norm_relu_conv2d_backward", grad_output, input, mean, var,
                            weight, bias, eps, conv_weight, grad_activation, stride, padding,
                            dilation, groups, pending_input, coefficients);
  }
  check_conv2d_backward(grad_output, input, shape, grad_activation, pending_input, coefficients);
  const ConvGradients found{empty_like(input, MemoryFormat::ChannelsLast), empty_vector(input),
                  empty_vector(input), empty_like(conv_weight, memory_format_of(conv_weight))};
  const auto run = tiled ? &tiled_backward : &direct;
  run(dense(grad_output, MemoryFormat::ChannelsLast), input,
      Affine<float>(input, mean, var, weight, bias, eps), conv_weight,
      dense(grad_activation, MemoryFormat::ChannelsLast),
      dense(pending_input, MemoryFormat::ChannelsLast),
      dense(coefficients, MemoryFormat::Contiguous), shape, found);
  return {found.grad_z, found.grad_weight, found.grad_bias, found.grad_conv_weight};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_conv2d_backward",
         TORCH_BOX(&preact::cpu::batch_norm_relu_conv2d_backward));
}
