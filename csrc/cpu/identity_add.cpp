#define PREACT_KERNELS "cpu/identity_add_kernel.h"
#include "cpu/foreach_capability.h"

#include "cpu/host.h"

namespace preact::cpu {

// input + other, and the mean and biased variance of the rounded sum.
std::tuple<Tensor, Tensor, Tensor> identity_add(const Tensor& input_, const Tensor& other_) {
  check_like(other_, input_, "other");
  const MemoryFormat format = memory_format_of(input_);
  const Tensor input = dense(input_, format), other = dense(other_, format);
  const FeatureMap map = feature_map(input, format);
  const Chunks chunks = Chunks::of(map);
  Tensor output = empty_like(input, format);
  Tensor mean = empty_vector(input), var = empty_vector(input);
  Partials partials(map, chunks);
  dispatch(input.scalar_type(), [&]<typename T>() {
    const auto tasks = PREACT_SELECT(identity_add_tasks, T);
    parallel_over_tasks(map, chunks,
                        [=, x = data<T>(input), r = data<T>(other), y = mutable_data<T>(output),
                         first = partials.first.data(),
                         second = partials.second.data()](int64_t begin, int64_t end) {
                          tasks(x, r, y, map, chunks, begin, end, first, second);
                        });
    write_statistics<accumulate_t<T>>(partials, map, chunks, mean, var);
  });
  return {output, mean, var};
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("identity_add", TORCH_BOX(&preact::cpu::identity_add));
}
