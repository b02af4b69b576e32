// What the ops of the fused 1x1 convolution share around their kernels.
#pragma once

#include <limits>

#include "common/conv2d_arguments.h"
#include "cuda/gemm.cuh"
#include "cuda/host.h"

namespace preact::cuda {

// Most channels of input and of output: the vectors of all of them stand in shared memory, which on
// the smallest GPU served has room for no more beside the stages.
constexpr int64_t kMostChannels = 2048;

// Whether the matrix product takes these; everything else runs as the reference does.
inline bool is_pointwise(const Tensor& input, const Tensor& weight, const Conv2dShape& shape,
                         int64_t groups) {
  constexpr int64_t kMostRows = std::numeric_limits<int>::max() - kBlockM;
  const ScalarType type = input.scalar_type();
  const bool served =
      type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
  const int64_t in_rows = shape.batch * shape.in_h * shape.in_w;
  return served && weight.scalar_type() == type && weight.device() == input.device() &&
         groups == 1 && shape.taps() == 1 && shape.padding_h == 0 && shape.padding_w == 0 &&
         memory_format_of(input) == MemoryFormat::ChannelsLast && in_rows > 0 &&
         in_rows <= kMostRows && shape.out_channels > 0 && shape.out_channels <= kMostChannels &&
         shape.in_channels <= kMostChannels;
}

inline int rows_in(const Conv2dShape& shape) {
  return static_cast<int>(shape.batch * shape.in_h * shape.in_w);
}
inline int rows_out(const Conv2dShape& shape) {
  return static_cast<int>(shape.batch * shape.out_h * shape.out_w);
}

inline RowMap row_map(const Conv2dShape& s, bool scatter) {
  const int in_h = static_cast<int>(s.in_h), in_w = static_cast<int>(s.in_w);
  const int out_h = static_cast<int>(s.out_h), out_w = static_cast<int>(s.out_w);
  const int stride_h = static_cast<int>(s.stride_h), stride_w = static_cast<int>(s.stride_w);
  return scatter ? RowMap{in_h, in_w, out_h, out_w, stride_h, stride_w, true}
                 : RowMap{out_h, out_w, in_h, in_w, stride_h, stride_w, false};
}

// Whether rows of so many elements can be read in accesses of 16 bytes.
template <typename... Pointers>
bool is_vector(int64_t columns, int64_t width, const Pointers*... pointers) {
  return columns % width == 0 && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A dense tensor as rows of `columns` elements; no rows where there is no tensor.
template <typename T>
Matrix<T> matrix(const OptionalTensor& tensor, int64_t columns) {
  const T* const pointer = data<T>(tensor);
  return {pointer, static_cast<int>(columns), is_vector(columns, kVector<T>, pointer)};
}

// Whether the user lets convolutions of float32 multiply in TF32.
inline bool allows_tf32() {
  StableIValue result = 0;
  PREACT_CHECK_CALL(torch_call_dispatcher("preact::allows_tf32", "", &result, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(result);
}

// Calls function.template operator()<Math, kBlockN>() for a product of `columns` columns.
template <typename Function>
void dispatch_math(ScalarType type, int64_t columns, const Function& function) {
  const bool wide = columns > 64;
  switch (type) {
    case ScalarType::Half:
      return wide ? function.template operator()<HalfMath<__half>, 128>()
                  : function.template operator()<HalfMath<__half>, 64>();
    case ScalarType::BFloat16:
      return wide ? function.template operator()<HalfMath<__nv_bfloat16>, 128>()
                  : function.template operator()<HalfMath<__nv_bfloat16>, 64>();
    default:
      return allows_tf32() ? function.template operator()<Tf32Math, 64>()
                           : function.template operator()<FloatMath, 64>();
  }
}

}  // namespace preact::cuda
