// Identity units in sequence as one op: the same kernels in the same order as the ops one by one,
// without the way back to Python between them.
#include <vector>

#include "cpu/layers.h"
#include "cpu/ops.h"

namespace preact::cpu {
namespace {

std::vector<Layer> unit_layers_of(const std::vector<OptionalTensor>& parameters,
                                  const std::vector<double>& eps, int64_t depth) {
  STD_TORCH_CHECK(depth > 0 && !eps.empty() && eps.size() % static_cast<size_t>(depth) == 0,
                  "eps must hold a multiple of depth=", depth, " numbers");
  return layers_of(parameters, eps);
}

}  // namespace

// parameters holds mean, var, weight, bias of each norm and the weight of its convolution; mean and
// var are absent where they are to be those of the layer before. A unit has `depth` layers. Returns
// the last sum and its statistics, then input and statistics of each layer but the first.
std::vector<Tensor> residual_units(const Tensor& input, std::vector<OptionalTensor> parameters,
                                   std::vector<double> eps, std::vector<int64_t> geometries,
                                   int64_t depth) {
  const std::vector<Layer> layers = unit_layers_of(parameters, eps, depth);
  const std::vector<ConvArguments> of = geometries_of(geometries, layers.size());
  STD_TORCH_CHECK(layers[0].mean && layers[0].var, "the first norm's mean and var must be given");
  std::vector<Tensor> inner;
  Tensor shortcut = input, x = input, mean = *layers[0].mean, var = *layers[0].var;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    if (layer.mean) mean = *layer.mean;
    if (layer.var) var = *layer.var;
    const bool last = (i + 1) % depth == 0;
    std::tie(x, mean, var) =
        batch_norm_relu_conv2d(x, mean, var, layer.weight, layer.bias, layer.eps, layer.conv_weight,
                               std::nullopt, last ? OptionalTensor(shortcut) : std::nullopt,
                               of[i].stride, of[i].padding, of[i].dilation, of[i].groups);
    if (last) shortcut = x;
    if (i + 1 < layers.size()) inner.insert(inner.end(), {x, mean, var});
  }
  std::vector<Tensor> results{x, mean, var};
  results.insert(results.end(), inner.begin(), inner.end());
  return results;
}

// inputs are those of the layers; parameters as in the forward, with every mean and var.
// batch_stats says of each norm whether they are its input's own. Returns the gradient of the first
// unit's input, then of each layer those of weight, bias and the convolution's weight.
std::vector<Tensor> residual_units_backward(const Tensor& grad_output, std::vector<Tensor> inputs,
                                            std::vector<OptionalTensor> parameters,
                                            std::vector<double> eps,
                                            std::vector<int64_t> batch_stats,
                                            std::vector<int64_t> geometries, int64_t depth) {
  const std::vector<Layer> layers = unit_layers_of(parameters, eps, depth);
  const std::vector<ConvArguments> of = geometries_of(geometries, layers.size());
  STD_TORCH_CHECK(inputs.size() == layers.size() && batch_stats.size() == layers.size(),
                  "inputs and batch_stats must hold one element for each layer");
  std::vector<Tensor> results(1 + 3 * layers.size());
  check_like(grad_output, inputs[0], "grad_output");
  Tensor grad = dense(grad_output, memory_format_of(inputs[0])), grad_sum = grad;
  OptionalTensor pending_input, coefficients;
  std::optional<UnitAfter> after;
  for (size_t i = layers.size(); i-- > 0;) {
    const Layer& layer = layers[i];
    STD_TORCH_CHECK(layer.mean && layer.var, "mean and var of every norm must be given");
    const Tensor& x = inputs[i];
    const bool first = i % depth == 0;
    const bool completes =
        first && i > 0 && completes_gradient(inputs[i - 1], layers[i - 1].conv_weight, of[i - 1]);
    const bool again = completes && pending_input && !after &&
                       computes_again(x, layer.conv_weight, of[i]) &&
                       computes_again(inputs[i - 1], layers[i - 1].conv_weight, of[i - 1]);
    auto [grad_z, grad_weight, grad_bias, grad_conv_weight] = batch_norm_relu_conv2d_backward(
        grad, x, *layer.mean, *layer.var, layer.weight, layer.bias, layer.eps, layer.conv_weight,
        std::nullopt, of[i].stride, of[i].padding, of[i].dilation, of[i].groups, pending_input,
        coefficients, after, !again);
    if (after) grad_sum = after->completed;
    after.reset();
    const OptionalTensor sum_dz_x = batch_stats[i] ? OptionalTensor(grad_weight) : std::nullopt;
    const OptionalTensor sum_dz = batch_stats[i] ? OptionalTensor(grad_bias) : std::nullopt;
    if (!first || completes) {
      if (again) {
        // The caller's gradient is not to be written.
        const bool own = grad_sum.data_ptr() != grad_output.data_ptr();
        after = {
            grad_sum, own ? grad_sum : empty_like(x, MemoryFormat::ChannelsLast),
            UnitAfter::Again{grad, *pending_input, *coefficients, layer.conv_weight, layer.bias}};
        grad = grad_sum;
      } else {
        if (completes) after = {grad_sum, grad_z, std::nullopt};
        grad = grad_z;
      }
      pending_input = x;
      coefficients = batch_norm_backward_coefficients(x, *layer.mean, *layer.var, layer.weight,
                                                      sum_dz_x, sum_dz, layer.eps);
    } else {
      // In place: a map of its own would have to be fetched before it is written.
      const MemoryFormat format = memory_format_of(x);
      grad = dense(grad_z, format);
      write_backward_apply(grad, dense(x, format), *layer.mean, *layer.var, layer.weight,
                           layer.bias, sum_dz_x, sum_dz, dense(grad_sum, format), layer.eps, grad);
      grad_sum = grad;
      pending_input.reset();
      coefficients.reset();
    }
    results[1 + 3 * i] =
        layer.weight ? as_type(grad_weight, layer.weight->scalar_type()) : grad_weight;
    results[2 + 3 * i] = layer.bias ? as_type(grad_bias, layer.bias->scalar_type()) : grad_bias;
    results[3 + 3 * i] = grad_conv_weight;
  }
  results[0] = grad;
  return results;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("residual_units", TORCH_BOX(&preact::cpu::residual_units));
  m.impl("residual_units_backward", TORCH_BOX(&preact::cpu::residual_units_backward));
}
