#include "cuda/batch_norm_stats.cuh"

#include "cuda/host.h"

namespace preact::cuda {

// Mean and biased variance of each channel, [C] each, in the accumulation type.
std::tuple<Tensor, Tensor> batch_norm_stats_op(const Tensor& input_) {
  const MemoryFormat format = memory_format_of(input_);
  const FeatureMap map = feature_map(input_, format);
  Call call(input_);
  const Tensor input = dense(input_, format);
  Tensor mean = empty_vector(input), var = empty_vector(input);
  dispatch(input.scalar_type(), [&]<typename T>() {
    using A = accumulate_t<T>;
    const T* x = data<T>(input);
    batch_norm_stats(x, map, call.workspace<Moments>(batch_norm_stats_partials(x, map)),
                     mutable_data<A>(mean), mutable_data<A>(var), call.stream());
  });
  return {mean, var};
}

}  // namespace preact::cuda

STABLE_TORCH_LIBRARY_IMPL(preact, CUDA, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&preact::cuda::batch_norm_stats_op));
}
