#define PREACT_KERNELS "cpu/batch_norm_relu_backward_reduce_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"

namespace preact::cpu {

// Gradients of weight and bias: sums of dz * xhat and of dz, with dz = grad_output under the mask.
std::tuple<Tensor, Tensor> batch_norm_relu_backward_reduce(const Tensor& grad_output_,
                                                           const Tensor& input_, const Tensor& mean,
                                                           const Tensor& var,
                                                           const OptionalTensor& weight,
                                                           const OptionalTensor& bias, double eps) {
  check_like(grad_output_, input_, "grad_output");
  const MemoryFormat format = memory_format_of(input_);
  const Tensor input = dense(input_, format), grad_output = dense(grad_output_, format);
  const FeatureMap map = feature_map(input, format);
  const Chunks chunks = Chunks::of(map);
  Tensor grad_weight = empty_vector(input), grad_bias = empty_vector(input);
  Partials sums(map, chunks);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const Affine<A> affine(input, mean, var, weight, bias, eps);
    const auto tasks = PREACT_SELECT(batch_norm_relu_backward_reduce_tasks, T);
    parallel_over_tasks(
        map, chunks,
        [=, g = data<T>(grad_output), x = data<T>(input), mean = affine.mean.data(),
         scale = affine.scale.data(), bias = affine.bias.data(), sum_dz = sums.first.data(),
         sum_dz_x = sums.second.data()](int64_t begin, int64_t end) {
          tasks(g, x, map, chunks, mean, scale, bias, begin, end, sum_dz, sum_dz_x);
        });
    write_norm_gradients(sums, chunks.count, affine, grad_weight, grad_bias);
  });
  return {grad_weight, grad_bias};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_relu_backward_reduce",
         TORCH_BOX(&preact::cpu::batch_norm_relu_backward_reduce));
}
