// Mean and biased variance per channel: one read of a map.
#pragma once

#include "cuda/statistics.cuh"

namespace preact::cuda {

template <typename T>
struct InputSource {
  struct Loaded {
    T x[kVector<T>];
  };
  const T* input;
  bool vector;

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const {
    load_slot(loaded.x, input, slot, vector);
  }
  __device__ void finish(const Slot<T>&, Loaded&) const {}
  __device__ accumulate_t<T> value(const Loaded& loaded, int e) const {
    return to_accumulate(loaded.x[e]);
  }
  __device__ accumulate_t<T> at(int64_t offset) const { return to_accumulate(input[offset]); }
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_stats_kernel(const T* __restrict__ input, Moments* __restrict__ partials,
                            const Geometry geometry) {
  chunk_statistics<4, T, kChannelsLast>(InputSource<T>{input, geometry.vector}, geometry, partials);
}

// Partial results to be given to batch_norm_stats.
template <typename T>
int64_t batch_norm_stats_partials(const T* input, const FeatureMap& map) {
  const Geometry g = geometry<T>(map, input);
  return g.chunks * g.channels;
}

template <typename T>
void batch_norm_stats(const T* input, const FeatureMap& map, Moments* partials,
                      accumulate_t<T>* mean, accumulate_t<T>* var, Stream stream) {
  const Geometry g = geometry<T>(map, input);
  if (g.blocks() > 0) {
    launch(
        "batch_norm_stats_kernel",
        map.channels_last ? &batch_norm_stats_kernel<T, true> : &batch_norm_stats_kernel<T, false>,
        g.blocks(), kThreads, 0, stream, input, partials, g);
  }
  batch_norm_stats_join(partials, g, mean, var, stream);
}

}  // namespace preact::cuda
