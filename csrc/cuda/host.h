// What every CUDA op does around its kernels. Nothing here or there waits for the GPU, and memory
// comes from PyTorch's allocator alone, so that every op can be captured in a CUDA graph.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "common/tensors.h"
#include "cuda/affine.cuh"
#include "cuda/target.cuh"

namespace preact::cuda {

// Calls `function.template operator()<T>()` with the element type of `type`.
template <typename Function>
void dispatch(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function.template operator()<float>();
    case ScalarType::Double: return function.template operator()<double>();
    case ScalarType::BFloat16: return function.template operator()<__nv_bfloat16>();
    case ScalarType::Half: return function.template operator()<__half>();
    default: STD_TORCH_CHECK(false, "input must be float32, float64, bfloat16 or float16");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// One call of an op: makes the input's device the current one, and knows its stream.
class Call {
 public:
  explicit Call(const Tensor& input) : input_(input), guard_(input.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
    stream_ = static_cast<Stream>(stream);
  }

  Stream stream() const { return stream_; }

  // Memory for `count` values until the call ends. What the stream does later comes after what it
  // was given here, so the allocator may hand the memory out again at once.
  template <typename T>
  T* workspace(int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    workspaces_.push_back(
        torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, input_.device()));
    return static_cast<T*>(workspaces_.back().mutable_data_ptr());
  }

 private:
  Tensor input_;
  torch::stable::accelerator::DeviceGuard guard_;
  Stream stream_ = nullptr;
  std::vector<Tensor> workspaces_;
};

// The vectors of a batch norm, checked, dense and in the accumulation type.
class NormVectors {
 public:
  NormVectors(const Tensor& input, const Tensor& mean, const Tensor& var,
              const OptionalTensor& weight, const OptionalTensor& bias, double eps)
      : mean_(channel_vector(mean, input, "mean")),
        var_(channel_vector(var, input, "var")),
        weight_(optional_vector(weight, input, "weight")),
        bias_(optional_vector(bias, input, "bias")),
        eps_(eps) {}

  template <typename A>
  Norm<A> get() const {
    return {data<A>(mean_), data<A>(var_), data<A>(weight_), data<A>(bias_), static_cast<A>(eps_)};
  }

  static OptionalTensor optional_vector(const OptionalTensor& vector, const Tensor& input,
                                        const char* name) {
    return vector ? OptionalTensor(channel_vector(*vector, input, name)) : std::nullopt;
  }

 private:
  Tensor mean_, var_;
  OptionalTensor weight_, bias_;
  double eps_;
};

}  // namespace preact::cuda
