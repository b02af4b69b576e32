#define PREACT_KERNELS "cpu/batch_norm_stats_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"

namespace preact::cpu {

// Mean and biased variance of each channel: [N, C, ...] -> [C], [C].
std::tuple<Tensor, Tensor> batch_norm_stats(const Tensor& input_) {
  const MemoryFormat format = memory_format_of(input_);
  const Tensor input = dense(input_, format);
  const FeatureMap map = feature_map(input, format);
  const Chunks chunks = Chunks::of(map);
  Tensor mean = empty_vector(input), var = empty_vector(input);
  Partials partials(map, chunks);
  dispatch(input.scalar_type(), [&]<typename T>() {
    const auto tasks = PREACT_SELECT(batch_norm_stats_tasks, T);
    parallel_over_tasks(
        map, chunks,
        [=, x = data<T>(input), first = partials.first.data(), second = partials.second.data()](
            int64_t begin, int64_t end) { tasks(x, map, chunks, begin, end, first, second); });
    write_statistics<accumulate_t<T>>(partials, map, chunks, mean, var);
  });
  return {mean, var};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("batch_norm_stats", TORCH_BOX(&preact::cpu::batch_norm_stats));
}
