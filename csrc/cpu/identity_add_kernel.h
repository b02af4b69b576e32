#include "cpu/statistics.h"

// Adds and writes, then hands the sum on as it will be read back.
template <typename T>
struct AddSource {
  static constexpr int kRows = 4;
  const T* input;
  const T* other;
  T* output;

  template <typename P, typename At>
  PREACT_INLINE typename P::reg load(At at) const {
    const auto sum = load_at<P>(input, at) + load_at<P>(other, at);
    store_at<P>(output, at, sum);
    return rounded<P, T>(sum);
  }
};

template <typename T>
void identity_add_tasks(const T* input, const T* other, T* output, const FeatureMap& map,
                        const Chunks& chunks, int64_t begin, int64_t end, double* mean,
                        double* m2) {
  statistics_tasks<T>(AddSource<T>{input, other, output}, map, chunks, begin, end, mean, m2);
}
