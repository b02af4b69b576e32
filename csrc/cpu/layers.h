// Layers of BN, ReLU and a convolution as the ops of whole units and blocks take them.
#pragma once

#include <vector>

#include "common/conv2d_arguments.h"

namespace preact::cpu {

// Tensors of a layer as the ops take them.
constexpr size_t kTensors = 5;

struct Layer {
  OptionalTensor mean, var, weight, bias;
  Tensor conv_weight;
  double eps;
};

inline std::vector<Layer> layers_of(const std::vector<OptionalTensor>& parameters,
                                    const std::vector<double>& eps) {
  STD_TORCH_CHECK(!eps.empty() && parameters.size() == kTensors * eps.size(),
                  "parameters must hold ", kTensors, " tensors for each eps");
  std::vector<Layer> layers;
  for (size_t i = 0; i < eps.size(); ++i) {
    const OptionalTensor* const of = parameters.data() + kTensors * i;
    STD_TORCH_CHECK(of[4].has_value(), "parameters must hold the weight of every convolution");
    layers.push_back({of[0], of[1], of[2], of[3], *of[4], eps[i]});
  }
  return layers;
}

inline std::vector<ConvArguments> geometries_of(const std::vector<int64_t>& numbers,
                                                size_t layers) {
  constexpr size_t kNumbers = 7;
  STD_TORCH_CHECK(numbers.size() == kNumbers * layers, "geometries must hold ", kNumbers,
                  " numbers for each layer");
  std::vector<ConvArguments> found;
  for (size_t i = 0; i < layers; ++i) {
    const int64_t* const of = numbers.data() + kNumbers * i;
    found.push_back({{of[0], of[1]}, {of[2], of[3]}, {of[4], of[5]}, of[6]});
  }
  return found;
}

}  // namespace preact::cpu
