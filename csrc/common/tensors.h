// Checks and allocation on stable-ABI tensors, shared by the ops' host code.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/feature_map.h"

// Throws where a call of PyTorch's C interface fails; torch 2.10 has not the check that tells why.
#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define PREACT_CHECK_CALL(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define PREACT_CHECK_CALL(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace preact {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Whether a 4-d tensor is dense in NHWC order; strides of dimensions of one element do not count.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4) return false;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t expected = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (sizes[dim] != 1 && strides[dim] != expected) return false;
    expected *= sizes[dim];
  }
  return true;
}

// The layout results take from `input`: the rule of preact.reference.memory_format_of.
inline MemoryFormat memory_format_of(const Tensor& input) {
  return !input.is_contiguous() && is_channels_last(input) ? MemoryFormat::ChannelsLast
                                                           : MemoryFormat::Contiguous;
}

inline Tensor dense(const Tensor& tensor, MemoryFormat format) {
  const bool ready =
      format == MemoryFormat::ChannelsLast ? is_channels_last(tensor) : tensor.is_contiguous();
  return ready ? tensor : torch::stable::contiguous(tensor, format);
}

inline OptionalTensor dense(const OptionalTensor& tensor, MemoryFormat format) {
  return tensor ? OptionalTensor(dense(*tensor, format)) : std::nullopt;
}

inline Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

inline FeatureMap feature_map(const Tensor& input, MemoryFormat format) {
  STD_TORCH_CHECK(input.dim() >= 2, "input must have at least 2 dimensions [N, C, ...], got ",
                  input.dim());
  int64_t spatial = 1;
  for (int64_t dim = 2; dim < input.dim(); ++dim) spatial *= input.size(dim);
  // Without a spatial extent both orders are one; rows of channels are the faster walk.
  const bool channels_last = format == MemoryFormat::ChannelsLast || spatial == 1;
  return {input.size(0), input.size(1), spatial, channels_last};
}

inline void check_like(const Tensor& tensor, const Tensor& input, const char* name) {
  bool same = tensor.dim() == input.dim() && tensor.scalar_type() == input.scalar_type() &&
              tensor.device() == input.device();
  if (same) {
    const auto own = tensor.sizes(), expected = input.sizes();
    same = std::equal(own.begin(), own.end(), expected.begin());
  }
  STD_TORCH_CHECK(same, name, " must have the shape, dtype and device of input");
}

inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Straight from the allocator: an op called by its name is looked up each time, which for the
// vectors of a small map takes longer than the kernel does.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, int32_t type,
                    const Tensor& device_of, MemoryFormat format = MemoryFormat::Contiguous) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(dims);
  int64_t next = 1;
  const auto place = [&](int64_t dim) {
    strides[dim] = next;
    next *= std::max<int64_t>(sizes[dim], 1);
  };
  if (format == MemoryFormat::ChannelsLast) {
    for (const int dim : {1, 3, 2, 0}) place(dim);
  } else {
    for (int64_t dim = dims - 1; dim >= 0; --dim) place(dim);
  }
  int32_t device_type = 0, device_index = 0;
  PREACT_CHECK_CALL(aoti_torch_get_device_type(device_of.get(), &device_type));
  PREACT_CHECK_CALL(aoti_torch_get_device_index(device_of.get(), &device_index));
  AtenTensorHandle created = nullptr;
  PREACT_CHECK_CALL(aoti_torch_empty_strided(dims, sizes.data(), strides.data(), type, device_type,
                                             device_index, &created));
  return Tensor(created);
}

inline int32_t type_number(const Tensor& tensor) {
  int32_t type = 0;
  PREACT_CHECK_CALL(aoti_torch_get_dtype(tensor.get(), &type));
  return type;
}

inline Tensor empty_like(const Tensor& input, MemoryFormat format) {
  return empty(input.sizes(), type_number(input), input, format);
}

// Elements [first, first + count) of a dimension, in the same memory; narrow called by its name
// takes several times as long.
inline Tensor part_of(const Tensor& tensor, int64_t dim, int64_t first, int64_t count) {
  const auto own_sizes = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(first >= 0 && count >= 0 && first + count <= own_sizes[dim], "elements ", first,
                  " to ", first + count, " of ", own_sizes[dim]);
  std::vector<int64_t> sizes(own_sizes.begin(), own_sizes.end());
  sizes[dim] = count;
  AtenTensorHandle part = nullptr;
  PREACT_CHECK_CALL(aoti_torch__reinterpret_tensor(tensor.get(), tensor.dim(), sizes.data(),
                                                   strides.data(), first * strides[dim], &part));
  return Tensor(part);
}

inline int32_t accumulate_type_number(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64()
                                                    : aoti_torch_dtype_float32();
}

inline Tensor empty_vector(const Tensor& input) {
  const int64_t size = input.size(1);
  return empty({&size, 1}, accumulate_type_number(input), input);
}

// A per-channel vector [C], dense and in the accumulation type.
inline Tensor channel_vector(const Tensor& vector, const Tensor& input, const char* name) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == input.size(1), name, " must have ",
                  input.size(1), " elements, one per channel of input");
  STD_TORCH_CHECK(vector.device() == input.device(), name, " must be on the device of input");
  const ScalarType type = accumulate_type(input.scalar_type());
  const Tensor same = vector.scalar_type() == type ? vector : torch::stable::to(vector, type);
  return dense(same, MemoryFormat::Contiguous);
}

}  // namespace preact
