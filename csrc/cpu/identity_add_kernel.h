#include "cpu/statistics.h"

// Adds and writes, then hands the sum on as it will be read back.
template <typename T>
struct AddSource {
  static constexpr int kMaps = 3;
  const T* input;
  const T* other;  // null: the sum was written before, read it again
  T* output;

  template <typename P>
  PREACT_INLINE typename P::reg load(int64_t i) const {
    if (other == nullptr) return P::load(output + i);
    const auto sum = P::load(input + i) + P::load(other + i);
    P::store(output + i, sum);
    return rounded<P, T>(sum);
  }
};

template <typename T>
void identity_add_task(const T* input, const T* other, T* output, const FeatureMap& map,
                       const Chunks& chunks, int64_t task, double* mean, double* m2) {
  statistics_task<T>(AddSource<T>{input, other, output}, AddSource<T>{input, nullptr, output}, map,
                     chunks, task, mean, m2);
}
