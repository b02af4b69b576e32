#define PREACT_TILES_KERNELS "cpu/batch_norm_relu_conv2d_tiles_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_tiles_host.h"

namespace preact::cpu {
#if PREACT_TILES

std::tuple<Tensor, Tensor> tiled_forward(const Tensor& input, const Affine<float>& affine,
                                         const Tensor& conv_weight, const OptionalTensor& bias,
                                         const OptionalTensor& residual, const Conv2dShape& shape,
                                         const Tensor& output) {
  const int64_t row =
      padded(shape.in_channels) * shape.in_w * shape.stride_h + shape.out_channels * shape.out_w;
  const DirectBlocks direct = DirectBlocks::of_result(shape, row * sizeof(BFloat16));
  const Conv2dShape& blocks = direct.shape;
  const Staged staged = stage_input(blocks);
  Tensor mean = empty_vector(output), var = empty_vector(output);
  TileForward task{direct,
                   staged,
                   TileGather(forward_gather(blocks, staged), shape.in_channels),
                   TileNorm(direct_norm(affine), shape.in_channels),
                   {},
                   data<BFloat16>(input),
                   nullptr,
                   residual ? data<BFloat16>(*residual) : nullptr,
                   mutable_data<BFloat16>(output),
                   pixel_stride(input),
                   pixel_stride(output)};
  if (bias) task.bias = tile_bias(data<BFloat16>(*bias), shape.out_channels);
  BFloat16* const weights = packed_scratch(packed_tiles(shape.out_channels, task.gather));
  with_element_type(conv_weight, [&](auto type) {
    pack_tiles(data<decltype(type)>(conv_weight), weight_strides(conv_weight), blocks, task.gather,
               false, weights);
  });
  task.weights = weights;

  const auto chunks = BlockChunks::of_result(blocks);
  Partials partials(chunks.count, shape.out_channels);
  const auto run = PREACT_SELECT_TILES(batch_norm_relu_conv2d_tiles);
  parallel_over_turns(chunks.count, [&](Turns turns) {
    run(task, chunks, turns, partials.first.data(), partials.second.data());
  });
  const auto count_of = [&](int64_t chunk) {
    return direct.pixels(chunks.begin(chunk), chunks.end(chunk));
  };
  write_statistics<float>(partials, chunks.count, count_of, mean, var);
  return {mean, var};
}
#else

std::tuple<Tensor, Tensor> tiled_forward(const Tensor&, const Affine<float>&, const Tensor&,
                                         const OptionalTensor&, const OptionalTensor&,
                                         const Conv2dShape&, const Tensor&) {
  STD_TORCH_CHECK(false, "built without products of bfloat16");
}

#endif
}  // namespace preact::cpu
