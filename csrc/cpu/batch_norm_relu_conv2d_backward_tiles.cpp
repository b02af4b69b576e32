#define PREACT_TILES_KERNELS "cpu/batch_norm_relu_conv2d_backward_tiles_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {
#if PREACT_TILES
namespace {

// Rows [4, C], by lane.
LineVector<float> rows_by_lane(const Tensor& coefficients) {
  const int64_t channels = coefficients.size(1);
  LineVector<float> rows;
  for (int64_t row = 0; row < 4; ++row) {
    const auto lanes = by_lane(data<float>(coefficients) + row * channels, channels);
    rows.insert(rows.end(), lanes.begin(), lanes.end());
  }
  return rows;
}

// As of the direct convolution.
TileAbove compute_again(const UnitAfter& after, Conv2dShape shape) {
  const UnitAfter::Again& again = *after.again;
  const int64_t channels = shape.in_channels = shape.out_channels;
  shape.out_channels = again.conv_weight.size(0);
  const Staged staged_grad = stage_grad_output(shape);
  TileGather gather(backward_gathers(shape, staged_grad)[0], shape.out_channels);
  auto* const weights = reinterpret_cast<BFloat16*>(
      scratch(Slot::weights_above, (packed_tiles(channels, gather) + 1) / 2));
  with_element_type(again.conv_weight, [&](auto type) {
    pack_tiles(data<decltype(type)>(again.conv_weight), weight_strides(again.conv_weight), shape,
               gather, true, weights);
  });
  LineVector<float> shift(channels, 0.0f);
  if (again.bias) {
    const Tensor bias = channel_vector(*again.bias, after.grad_skip, "bias");
    std::copy_n(data<float>(bias), channels, shift.data());
  }
  return {staged_grad,
          std::move(gather),
          weights,
          by_lane(shift.data(), channels),
          data<BFloat16>(again.grad_output),
          data<BFloat16>(again.pending_input),
          rows_by_lane(again.coefficients)};
}

}  // namespace

void tiled_backward(const Tensor& grad_output, const Tensor& input, const Affine<float>& affine,
                    const Tensor& conv_weight, const OptionalTensor& grad_activation,
                    const OptionalTensor& grad_skip, const OptionalTensor& pending_input,
                    const OptionalTensor& coefficients, const std::optional<UnitAfter>& after,
                    const Conv2dShape& shape, const ConvGradients& found) {
  const DirectBlocks direct = DirectBlocks::of(shape);
  const Conv2dShape& blocks = direct.shape;
  const Staged staged = stage_input(blocks), staged_grad = stage_grad_output(blocks);
  const auto maybe = [](const OptionalTensor& tensor) {
    return tensor ? data<BFloat16>(*tensor) : nullptr;
  };
  const bool keeps = found.grad_z.defined();
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
                    nullptr,
                    nullptr,
                    nullptr,
                    grad_skip || !keeps ? nullptr : mutable_data<BFloat16>(found.grad_z),
                    wide_skip ? data<float>(*grad_skip) : nullptr,
                    wide_skip ? nullptr : maybe(grad_skip),
                    grad_skip ? mutable_data<float>(found.grad_z) : nullptr,
                    pixel_stride(input),
                    pixel_stride(grad_output)};
  if (coefficients) task.coefficients = rows_by_lane(*coefficients);
  std::optional<TileAbove> above;
  if (after) {
    task.pending_skip = data<BFloat16>(after->grad_skip);
    task.completed = mutable_data<BFloat16>(after->completed);
    if (after->again) {
      above = compute_again(*after, blocks);
      task.above = &*above;
      task.grad_output = nullptr;
    }
  }
  int64_t packed = 0;
  for (Gather& phase : backward_gathers(blocks, staged_grad)) {
    task.phases.emplace_back(std::move(phase), shape.out_channels);
    packed += packed_tiles(shape.in_channels, task.phases.back());
  }
  BFloat16* weights = packed_scratch(packed);
  for (const TileGather& phase : task.phases) {
    with_element_type(conv_weight, [&](auto type) {
      pack_tiles(data<decltype(type)>(conv_weight), weight_strides(conv_weight), blocks, phase,
                 true, weights);
    });
    task.weights.push_back(weights);
    weights += packed_tiles(shape.in_channels, phase);
  }

  const int64_t size = weight_sums(blocks), channels = shape.in_channels;
  const auto chunks = BlockChunks::of_gradients(blocks, size);
  float* const sums = scratch(Slot::sums, chunks.count * size);
  Partials norm_sums(chunks.count, channels);
  const auto run = PREACT_SELECT_TILES(batch_norm_relu_conv2d_backward_tiles);
  parallel_over_turns(chunks.count, [&](Turns turns) {
    run(task, chunks, turns, norm_sums.first.data(), norm_sums.second.data(), sums);
  });
  write_norm_gradients(norm_sums, chunks.count, affine, found.grad_weight, found.grad_bias);
  with_element_type(conv_weight, [&](auto type) {
    unpack_weight_sums(sums, chunks.count, weight_strides(found.grad_conv_weight), blocks,
                       mutable_data<decltype(type)>(found.grad_conv_weight));
  });
}
#else

void tiled_backward(const Tensor&, const Tensor&, const Affine<float>&, const Tensor&,
                    const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&, const std::optional<UnitAfter>&, const Conv2dShape&,
                    const ConvGradients&) {
  STD_TORCH_CHECK(false, "built without products of bfloat16");
}

#endif
}  // namespace preact::cpu
