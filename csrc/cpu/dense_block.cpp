// The dense block as one op each way: see preact/dense.py.
#define PREACT_KERNELS "cpu/dense_block_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"
#include "cpu/layers.h"
#include "cpu/ops.h"

namespace preact::cpu {
namespace {

// Layers of two norms and two convolutions, and where each layer's features begin.
struct Block {
  std::vector<Layer> halves;
  std::vector<ConvArguments> geometries;
  std::vector<int64_t> starts;

  Block(const std::vector<OptionalTensor>& parameters, const std::vector<double>& eps,
        const std::vector<int64_t>& numbers, int64_t features)
      : halves(layers_of(parameters, eps)),
        geometries(geometries_of(numbers, halves.size())),
        starts{features} {
    STD_TORCH_CHECK(halves.size() % 2 == 0, "eps must hold two elements for each layer");
    for (size_t i = 0; i < layers(); ++i) starts.push_back(starts[i] + growth(i));
  }
  size_t layers() const { return halves.size() / 2; }
  int64_t growth(size_t layer) const { return halves[2 * layer + 1].conv_weight.size(0); }
};

Tensor channels_of(const Tensor& map, int64_t first, int64_t count) {
  return part_of(map, 1, first, count);
}
Tensor first_of(const Tensor& vector, int64_t count) { return part_of(vector, 0, 0, count); }

std::vector<double> values_of(const Tensor& vector) {
  const int64_t count = vector.numel();
  if (vector.scalar_type() == ScalarType::Double) {
    return {data<double>(vector), data<double>(vector) + count};
  }
  return {data<float>(vector), data<float>(vector) + count};
}

void write_values(const std::vector<double>& values, const Tensor& vector, int64_t first) {
  if (vector.scalar_type() == ScalarType::Double) {
    std::copy(values.begin(), values.end(), mutable_data<double>(vector) + first);
  } else {
    std::transform(values.begin(), values.end(), mutable_data<float>(vector) + first,
                   [](double value) { return static_cast<float>(value); });
  }
}

// What the batch statistics of all layers add to the features' gradient: slope * (x - mean) +
// offset, the mean being the same in every layer.
class Deferred {
 public:
  explicit Deferred(const Tensor& mean)
      : mean_(mean), centre_(values_of(mean)), slope_(centre_.size()), offset_(centre_.size()) {}

  bool any() const { return any_; }

  void add(const Tensor& coefficients) {
    const std::vector<double> rows = values_of(coefficients);
    const size_t count = rows.size() / 4;
    for (size_t c = 0; c < count; ++c) {
      slope_[c] += rows[count + c];
      offset_[c] += rows[3 * count + c];
    }
    any_ = true;
  }

  // Of some features, as batch_norm_backward_coefficients has it, with a scale of one.
  Tensor coefficients(int64_t first, int64_t count) const {
    const int64_t sizes[2] = {4, count};
    const Tensor rows = empty({sizes, 2}, type_number(mean_), mean_);
    const auto part = [&](const std::vector<double>& of) {
      return std::vector<double>(of.begin() + first, of.begin() + first + count);
    };
    write_values(std::vector<double>(count, 1.0), rows, 0);
    write_values(part(slope_), rows, count);
    write_values(part(centre_), rows, 2 * count);
    write_values(part(offset_), rows, 3 * count);
    return rows;
  }

 private:
  Tensor mean_;
  std::vector<double> centre_, slope_, offset_;
  bool any_ = false;
};

// Rounded once: what is to be added to a rounded gradient is less than its last place.
Tensor complete_gradient(const Tensor& total, const Tensor& features, int64_t channels,
                         const Deferred& deferred) {
  const MemoryFormat format = memory_format_of(features);
  const Tensor grad_input =
      empty_map({features.size(0), channels, features.size(2), features.size(3)}, features, format);
  const FeatureMap map = feature_map(grad_input, format);
  const Tensor coefficients = deferred.coefficients(0, channels);
  dispatch(features.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const auto part = PREACT_SELECT(complete_gradient_part, T);
    parallel_over_map(
        map, [=, from = data<A>(total), x = data<T>(features), rows = data<A>(coefficients),
              to = mutable_data<T>(grad_input), stride = features.size(1)](
                 int64_t begin, int64_t end) { part(from, x, rows, to, map, stride, begin, end); });
  });
  return grad_input;
}

}  // namespace

// parameters holds mean, var, weight, bias of each norm and the weight of its convolution; mean and
// var are absent where the norm takes the batch's own. Returns all features with their mean and
// variance, those of each bottleneck in turn, and with `save` the bottlenecks.
std::vector<Tensor> dense_block(const Tensor& input, std::vector<OptionalTensor> parameters,
                                std::vector<double> eps, std::vector<int64_t> geometries,
                                bool save) {
  const int64_t first = input.size(1);
  const Block block(parameters, eps, geometries, first);
  const MemoryFormat format = memory_format_of(input);
  const auto map_of = [&](int64_t channels) {
    return empty_map({input.size(0), channels, input.size(2), input.size(3)}, input, format);
  };
  const Tensor features = map_of(block.starts.back());
  Tensor mean = empty_vector(features), var = empty_vector(features);
  Tensor copied = channels_of(features, 0, first);
  torch::stable::copy_(copied, input);
  bool takes_own = false;
  for (size_t i = 0; i < block.layers(); ++i) takes_own |= !block.halves[2 * i].mean;
  std::vector<double> first_mean(first), first_var(first);
  if (takes_own) {
    const auto [found_mean, found_var] = batch_norm_stats(input);
    first_mean = values_of(found_mean);
    first_var = values_of(found_var);
  }
  write_values(first_mean, mean, 0);
  write_values(first_var, var, 0);
  std::vector<Tensor> statistics, bottlenecks;
  for (size_t i = 0; i < block.layers(); ++i) {
    const Layer &norm = block.halves[2 * i], &next = block.halves[2 * i + 1];
    const ConvArguments &conv = block.geometries[2 * i], &next_conv = block.geometries[2 * i + 1];
    const int64_t read = block.starts[i];
    const Tensor bottleneck = map_of(norm.conv_weight.size(0));
    const auto [inner_mean, inner_var] = batch_norm_relu_conv2d_into(
        channels_of(features, 0, read), norm.mean ? *norm.mean : first_of(mean, read),
        norm.var ? *norm.var : first_of(var, read), norm.weight, norm.bias, norm.eps,
        norm.conv_weight, conv.stride, conv.padding, conv.dilation, conv.groups, bottleneck);
    const auto [growth_mean, growth_var] = batch_norm_relu_conv2d_into(
        bottleneck, next.mean ? *next.mean : inner_mean, next.var ? *next.var : inner_var,
        next.weight, next.bias, next.eps, next.conv_weight, next_conv.stride, next_conv.padding,
        next_conv.dilation, next_conv.groups, channels_of(features, read, block.growth(i)));
    write_values(values_of(growth_mean), mean, read);
    write_values(values_of(growth_var), var, read);
    statistics.insert(statistics.end(), {inner_mean, inner_var});
    if (save) bottlenecks.push_back(bottleneck);
  }
  std::vector<Tensor> results{features, mean, var};
  results.insert(results.end(), statistics.begin(), statistics.end());
  results.insert(results.end(), bottlenecks.begin(), bottlenecks.end());
  return results;
}

// `found` are the results of the forward, parameters as there. Returns the gradient of the input,
// empty without `needs_input`, then of each norm and convolution those of weight, bias and the
// convolution's weight.
std::vector<Tensor> dense_block_backward(const Tensor& grad_output, std::vector<Tensor> found,
                                         std::vector<OptionalTensor> parameters,
                                         std::vector<double> eps, std::vector<int64_t> geometries,
                                         bool needs_input) {
  STD_TORCH_CHECK(found.size() == 3 + 3 * eps.size() / 2,
                  "found must hold the results of dense_block, bottlenecks among them");
  const Tensor &features = found[0], &mean = found[1], &var = found[2];
  const int64_t growths = Block(parameters, eps, geometries, 0).starts.back();
  const Block block(parameters, eps, geometries, features.size(1) - growths);
  const Tensor* const inner = found.data() + 3;
  const Tensor* const bottlenecks = inner + 2 * block.layers();
  const MemoryFormat format = memory_format_of(features);
  check_like(grad_output, features, "grad_output");
  const Tensor total = empty(features.sizes(), accumulate_type_number(features), features, format);
  // What reads a feature after its layer is complete in `source` but for what is deferred.
  Tensor source = dense(grad_output, format);
  Deferred deferred(mean);
  std::vector<Tensor> results(1 + 3 * block.halves.size());
  for (size_t i = block.layers(); i-- > 0;) {
    const Layer &norm = block.halves[2 * i], &next = block.halves[2 * i + 1];
    const ConvArguments &conv = block.geometries[2 * i], &next_conv = block.geometries[2 * i + 1];
    const int64_t read = block.starts[i], growth = block.growth(i);
    const Tensor& bottleneck = bottlenecks[i];
    const bool pending = deferred.any() || source.scalar_type() != features.scalar_type();
    const Tensor &next_mean = next.mean ? *next.mean : inner[2 * i],
                 &next_var = next.var ? *next.var : inner[2 * i + 1];
    const auto [grad_z, of_next_weight, of_next_bias, of_next_conv] =
        batch_norm_relu_conv2d_backward(
            channels_of(source, read, growth), bottleneck, next_mean, next_var, next.weight,
            next.bias, next.eps, next.conv_weight, std::nullopt, next_conv.stride,
            next_conv.padding, next_conv.dilation, next_conv.groups,
            pending ? OptionalTensor(channels_of(features, read, growth)) : std::nullopt,
            pending ? OptionalTensor(deferred.coefficients(read, growth)) : std::nullopt);
    const auto own = [](bool is_own, const Tensor& sum) {
      return is_own ? OptionalTensor(sum) : std::nullopt;
    };
    const Tensor x = channels_of(features, 0, read);
    const Tensor x_mean = norm.mean ? *norm.mean : first_of(mean, read);
    const Tensor x_var = norm.var ? *norm.var : first_of(var, read);
    const auto [of_weight, of_bias, of_conv] = batch_norm_relu_conv2d_backward_add(
        grad_z, x, x_mean, x_var, norm.weight, norm.bias, norm.eps, norm.conv_weight, conv.stride,
        conv.padding, conv.dilation, conv.groups, bottleneck,
        batch_norm_backward_coefficients(bottleneck, next_mean, next_var, next.weight,
                                         own(!next.mean, of_next_weight),
                                         own(!next.mean, of_next_bias), next.eps),
        channels_of(source, 0, read), channels_of(total, 0, read));
    source = total;
    if (!norm.mean) {
      deferred.add(batch_norm_backward_coefficients(x, x_mean, x_var, norm.weight, of_weight,
                                                    of_bias, norm.eps));
    }
    const auto write = [&](size_t half, const Layer& layer, const Tensor& weight,
                           const Tensor& bias, const Tensor& conv_weight) {
      Tensor* const to = results.data() + 1 + 3 * half;
      to[0] = layer.weight ? as_type(weight, layer.weight->scalar_type()) : weight;
      to[1] = layer.bias ? as_type(bias, layer.bias->scalar_type()) : bias;
      to[2] = conv_weight;
    };
    write(2 * i, norm, of_weight, of_bias, of_conv);
    write(2 * i + 1, next, of_next_weight, of_next_bias, of_next_conv);
  }
  results[0] = needs_input ? complete_gradient(total, features, block.starts[0], deferred)
                           : empty_map({0, block.starts[0], 1, 1}, features, format);
  return results;
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("dense_block", TORCH_BOX(&preact::cpu::dense_block));
  m.impl("dense_block_backward", TORCH_BOX(&preact::cpu::dense_block_backward));
}
