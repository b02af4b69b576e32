#include "cuda/identity_add.cuh"

#include "streaming.h"

using namespace preact::cuda;

int main(int count, char** folders) {
  return harness::main_with_type(count, folders, []<typename T>(harness::Case& c) {
    using A = accumulate_t<T>;
    const preact::FeatureMap map = harness::feature_map(c);
    const T* input = c.input<T>("input", c.integer("offset"));
    const T* other = c.input<T>("other", c.integer("other_offset"));
    T* output = c.output<T>("output", harness::elements(map), c.integer("offset"));
    const int64_t partials = identity_add_partials(input, other, output, map);
    identity_add(input, other, output, map, c.workspace<Moments>(partials),
                 c.output<A>("mean", map.channels), c.output<A>("var", map.channels), {});
  });
}
