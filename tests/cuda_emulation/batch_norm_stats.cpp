#include "cuda/batch_norm_stats.cuh"

#include "streaming.h"

using namespace preact::cuda;

int main(int count, char** folders) {
  return harness::main_with_type(count, folders, []<typename T>(harness::Case& c) {
    using A = accumulate_t<T>;
    const preact::FeatureMap map = harness::feature_map(c);
    const T* input = c.input<T>("input", c.integer("offset"));
    batch_norm_stats(input, map, c.workspace<Moments>(batch_norm_stats_partials(input, map)),
                     c.output<A>("mean", map.channels), c.output<A>("var", map.channels), {});
  });
}
