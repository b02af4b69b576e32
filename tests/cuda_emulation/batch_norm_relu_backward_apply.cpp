#include "cuda/batch_norm_relu_backward_apply.cuh"

#include "streaming.h"

using namespace preact::cuda;

int main(int count, char** folders) {
  return harness::main_with_type(count, folders, []<typename T>(harness::Case& c) {
    using A = accumulate_t<T>;
    const preact::FeatureMap map = harness::feature_map(c);
    const int64_t offset = c.integer("offset");
    batch_norm_relu_backward_apply(
        c.input<T>("grad_output", c.integer("other_offset")), c.input<T>("input", offset),
        c.input<T>("grad_skip", offset), harness::norm<A>(c), c.input<A>("grad_weight"),
        c.input<A>("grad_bias"), c.output<T>("grad_input", harness::elements(map), offset), map,
        {});
  });
}
