#include "cpu/statistics.h"

template <typename T>
void batch_norm_stats_tasks(const T* input, const FeatureMap& map, const Chunks& chunks,
                            int64_t begin, int64_t end, double* mean, double* m2) {
  statistics_tasks<T>(InputSource<T>{input}, map, chunks, begin, end, mean, m2);
}
