#include "cuda/batch_norm_relu_backward_reduce.cuh"

#include "streaming.h"

using namespace preact::cuda;

int main(int count, char** folders) {
  return harness::main_with_type(count, folders, []<typename T>(harness::Case& c) {
    using A = accumulate_t<T>;
    const preact::FeatureMap map = harness::feature_map(c);
    const T* grad = c.input<T>("grad_output", c.integer("other_offset"));
    const T* input = c.input<T>("input", c.integer("offset"));
    const int64_t partials = batch_norm_relu_backward_reduce_partials(grad, input, map);
    batch_norm_relu_backward_reduce(
        grad, input, harness::norm<A>(c), map, c.workspace<TwoSums>(partials),
        c.output<A>("grad_weight", map.channels), c.output<A>("grad_bias", map.channels), {});
  });
}
