#include "cpu/statistics.h"

template <typename T>
void batch_norm_stats_task(const T* input, const FeatureMap& map, const Chunks& chunks,
                           int64_t task, double* mean, double* m2) {
  const InputSource<T> source{input};
  statistics_task<T>(source, source, map, chunks, task, mean, m2);
}
