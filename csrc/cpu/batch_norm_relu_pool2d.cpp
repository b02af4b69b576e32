#define PREACT_KERNELS "cpu/batch_norm_relu_pool2d_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/conv2d_host.h"
#include "cpu/pool2d.h"

namespace preact::cpu {
namespace {

constexpr MemoryFormat kFormat = MemoryFormat::ChannelsLast;

PoolShape pool_shape(const Tensor& input, const Pair& kernel, const Pair& stride,
                     const Pair& padding) {
  STD_TORCH_CHECK(input.dim() == 4, "input must be [N, C, H, W]");
  STD_TORCH_CHECK(kernel.size() == 2 && stride.size() == 2 && padding.size() == 2,
                  "kernel, stride and padding must have two elements");
  const auto outputs = [&](int dim) {
    STD_TORCH_CHECK(
        kernel[dim] > 0 && stride[dim] > 0 && padding[dim] >= 0 && 2 * padding[dim] <= kernel[dim],
        "kernel and stride must be positive, padding at most half the kernel");
    const int64_t room = input.size(dim + 2) + 2 * padding[dim] - kernel[dim];
    STD_TORCH_CHECK(room >= 0, "kernel is larger than the padded input");
    return room / stride[dim] + 1;
  };
  STD_TORCH_CHECK(kernel[0] * kernel[1] < kNowhere, "kernel must have fewer than ", kNowhere,
                  " elements");
  return {input.size(0), input.size(1), input.size(2), input.size(3), outputs(0), outputs(1),
          kernel[0],     kernel[1],     stride[0],     stride[1],     padding[0], padding[1]};
}

// The rule of preact.reference: results lie in memory as the input does.
Tensor arranged(const Tensor& result, const Tensor& input) {
  return dense(result, memory_format_of(input));
}

}  // namespace

// The mean or the maximum over windows of relu((input - mean) / sqrt(var + eps) * weight + bias),
// and of a maximum where in its window it stood, kNowhere where it is zero.
std::tuple<Tensor, Tensor> batch_norm_relu_pool2d(const Tensor& input_, const Tensor& mean,
                                                  const Tensor& var, const OptionalTensor& weight,
                                                  const OptionalTensor& bias, double eps,
                                                  Pair kernel, Pair stride, Pair padding,
                                                  bool average) {
  const PoolShape shape = pool_shape(input_, kernel, stride, padding);
  STD_TORCH_CHECK(!average || (padding[0] == 0 && padding[1] == 0),
                  "padding must be zero where the mean is taken");
  const Tensor input = dense(input_, kFormat);
  const std::array<int64_t, 4> sizes{shape.batch, shape.channels, shape.out_h, shape.out_w};
  const Tensor output = empty_map(sizes, input, kFormat);
  const int64_t none = 0;
  const Tensor positions =
      average ? torch::stable::empty({&none, 1}, ScalarType::Byte, std::nullopt, input.device())
              : torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Byte, std::nullopt,
                                     input.device(), std::nullopt, kFormat);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, bias, eps);
    const PoolForward<T, A> task{shape,
                                 affine.mean.data(),
                                 affine.scale.data(),
                                 affine.bias.data(),
                                 data<T>(input),
                                 mutable_data<T>(output),
                                 average ? nullptr : mutable_data<uint8_t>(positions)};
    const auto part = PREACT_SELECT(batch_norm_relu_pool2d_part, T);
    parallel_over_parts(shape.batch * shape.out_h, 1,
                        [&](int64_t begin, int64_t end) { part(task, begin, end); });
  });
  return {arranged(output, input_), average ? positions : arranged(positions, input_)};
}

// Gradients of input, weight and bias. batch_stats says whether mean and var are the input's own.
std::tuple<Tensor, Tensor, Tensor> batch_norm_relu_pool2d_backward(
    const Tensor& grad_output_, const Tensor& positions_, const Tensor& input_, const Tensor& mean,
    const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias, double eps,
    bool batch_stats, Pair kernel, Pair stride, Pair padding, bool average) {
  const PoolShape shape = pool_shape(input_, kernel, stride, padding);
  const auto is_result = [&](const Tensor& tensor) {
    return tensor.dim() == 4 && tensor.size(0) == shape.batch && tensor.size(1) == shape.channels &&
           tensor.size(2) == shape.out_h && tensor.size(3) == shape.out_w;
  };
  STD_TORCH_CHECK(is_result(grad_output_) && grad_output_.scalar_type() == input_.scalar_type(),
                  "grad_output must have the shape and type of the result");
  STD_TORCH_CHECK(
      average || (is_result(positions_) && positions_.scalar_type() == ScalarType::Byte),
      "positions must be those of the result");
  const Tensor input = dense(input_, kFormat), grad_output = dense(grad_output_, kFormat);
  const Tensor positions = average ? positions_ : dense(positions_, kFormat);
  const Tensor grad_input = empty_like(input, kFormat);
  const Tensor grad_weight = empty_vector(input), grad_bias = empty_vector(input);
  const FeatureMap map{shape.batch, shape.channels, shape.in_h * shape.in_w, true};
  const Chunks chunks = Chunks::of(map);
  Partials sums(map, chunks);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, bias, eps);
    PoolBackward<T, A> task{shape,
                            affine.mean.data(),
                            affine.scale.data(),
                            affine.bias.data(),
                            nullptr,
                            nullptr,
                            data<T>(input),
                            data<T>(grad_output),
                            average ? nullptr : data<uint8_t>(positions),
                            mutable_data<T>(grad_input)};
    const auto reduce = PREACT_SELECT(batch_norm_relu_pool2d_reduce, T);
    parallel_over_chunks(chunks.count, [&](int64_t i) {
      reduce(task, chunks.begin(map, i), chunks.end(map, i), sums.first.data() + i * map.channels,
             sums.second.data() + i * map.channels);
    });
    write_norm_gradients(sums, chunks.count, affine, grad_weight, grad_bias);
    const BackwardSums<A> terms(
        input, affine, batch_stats ? OptionalTensor(grad_weight) : std::nullopt,
        batch_stats ? OptionalTensor(grad_bias) : std::nullopt, map.count());
    task.slope = terms.slope.data();
    task.offset = terms.offset.data();
    const auto apply = PREACT_SELECT(batch_norm_relu_pool2d_apply, T);
    parallel_over_map(map, [&](int64_t begin, int64_t end) { apply(task, begin, end); });
  });
  return {arranged(grad_input, input_), grad_weight, grad_bias};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_pool2d", TORCH_BOX(&preact::cpu::batch_norm_relu_pool2d));
  m.impl("batch_norm_relu_pool2d_backward",
         TORCH_BOX(&preact::cpu::batch_norm_relu_pool2d_backward));
}
