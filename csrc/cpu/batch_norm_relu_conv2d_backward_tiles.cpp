#define PREACT_AMX_KERNELS "cpu/batch_norm_relu_conv2d_backward_amx_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {

void tiled_backward(const Tensor& grad_output, const Tensor& input, const Affine<float>& affine,
                    const Tensor& conv_weight, const OptionalTensor& grad_activation,
                    const OptionalTensor& grad_skip, const OptionalTensor& pending_input,
                    const OptionalTensor& coefficients, const Conv2dShape& shape,
                    const ConvGradients& found) {
#if PREACT_AMX
  // A chunk's sums of a large weight cost more than its blocks are worth to another thread.
  constexpr int64_t kSmallWeight = 8192, kMostChunks = 64, kMostLargeChunks = 16;
  const DirectBlocks direct = DirectBlocks::of(shape);
  const Conv2dShape& blocks = direct.shape;
  const Staged staged = stage_input(blocks), staged_grad = stage_grad_output(blocks);
  const auto maybe = [](const OptionalTensor& tensor) {
    return tensor ? data<BFloat16>(*tensor) : nullptr;
  };
  const bool wide = grad_output.scalar_type() == ScalarType::Float;
  const bool wide_skip = grad_skip && grad_skip->scalar_type() == ScalarType::Float;
  TileBackward task{direct,
                    staged,
                    staged_grad,
                    {},
                    {},
                    PairedPixels(blocks, staged),
                    TileNorm(direct_norm(affine), shape.in_channels),
                    data<BFloat16>(input),
                    wide ? nullptr : data<BFloat16>(grad_output),
                    maybe(grad_activation),
                    maybe(pending_input),
                    {},
                    wide ? data<float>(grad_output) : nullptr,
                    grad_skip ? nullptr : mutable_data<BFloat16>(found.grad_z),
                    wide_skip ? data<float>(*grad_skip) : nullptr,
                    wide_skip ? nullptr : maybe(grad_skip),
                    grad_skip ? mutable_data<float>(found.grad_z) : nullptr,
                    pixel_stride(input),
                    pixel_stride(grad_output)};
  for (int64_t row = 0; coefficients && row < 4; ++row) {
    const auto lanes =
        by_lane(data<float>(*coefficients) + row * shape.out_channels, shape.out_channels);
    task.coefficients.insert(task.coefficients.end(), lanes.begin(), lanes.end());
  }
  int64_t packed = 0;
  for (Gather& phase : backward_gathers(blocks, staged_grad)) {
    task.phases.emplace_back(std::move(phase), shape.out_channels);
    packed += packed_tiles(shape.in_channels, task.phases.back());
  }
  BFloat16* weights = packed_scratch(packed);
  for (const TileGather& phase : task.phases) {
    with_weight_type(conv_weight, [&](auto type) {
      pack_tiles(data<decltype(type)>(conv_weight), weight_strides(conv_weight), blocks, phase,
                 true, weights);
    });
    task.weights.push_back(weights);
    weights += packed_tiles(shape.in_channels, phase);
  }

  const int64_t size = weight_sums(blocks), channels = shape.in_channels;
  const BlockChunks chunks(blocks, size <= kSmallWeight ? kMostChunks : kMostLargeChunks);
  float* const sums = scratch(Slot::sums, chunks.count * size);
  std::vector<double> sum_dz(chunks.count * channels), sum_dz_x(chunks.count * channels);
  torch::stable::parallel_for(0, chunks.count, 1, [&](int64_t begin, int64_t end) {
    amx::batch_norm_relu_conv2d_backward_tiles(task, chunks, begin, end, sum_dz.data(),
                                               sum_dz_x.data(), sums);
  });
  write_norm_gradients(sum_dz, sum_dz_x, chunks.count, affine, found.grad_weight, found.grad_bias);
  with_weight_type(conv_weight, [&](auto type) {
    unpack_weight_sums(sums, chunks.count, weight_strides(found.grad_conv_weight), blocks,
                       mutable_data<decltype(type)>(found.grad_conv_weight));
  });
#else
  STD_TORCH_CHECK(false, "built without tile registers");
#endif
}

}  // namespace preact::cpu
