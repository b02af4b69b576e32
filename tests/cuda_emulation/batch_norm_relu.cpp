#include "cuda/batch_norm_relu.cuh"

#include "streaming.h"

using namespace preact::cuda;

int main(int count, char** folders) {
  return harness::main_with_type(count, folders, []<typename T>(harness::Case& c) {
    const preact::FeatureMap map = harness::feature_map(c);
    batch_norm_relu(c.input<T>("input", c.integer("offset")), harness::norm<accumulate_t<T>>(c),
                    c.output<T>("output", harness::elements(map), c.integer("other_offset")), map,
                    {});
  });
}
