#include "cuda/identity_add.cuh"

#include "cuda/host.h"

namespace preact::cuda {

// input + other, and the mean and biased variance of that sum's channels.
std::tuple<Tensor, Tensor, Tensor> identity_add_op(const Tensor& input_, const Tensor& other_) {
  check_like(other_, input_, "other");
  const MemoryFormat format = memory_format_of(input_);
  const FeatureMap map = feature_map(input_, format);
  Call call(input_);
  const Tensor input = dense(input_, format), other = dense(other_, format);
  Tensor output = empty_like(input, format);
  Tensor mean = empty_vector(input), var = empty_vector(input);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T *a = data<T>(input), *b = data<T>(other);
    T* sum = mutable_data<T>(output);
    identity_add(a, b, sum, map, call.workspace<Moments>(identity_add_partials(a, b, sum, map)),
                 mutable_data<A>(mean), mutable_data<A>(var), call.stream());
  });
  return {output, mean, var};
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("identity_add", TORCH_BOX(&preact::cuda::identity_add_op));
}
