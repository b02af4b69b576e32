// input + other and the statistics of that sum: reads two maps, writes one.
#pragma once

#include "cuda/statistics.cuh"

namespace preact::cuda {

template <typename T>
struct AddSource {
  using A = accumulate_t<T>;
  struct Loaded {
    T a[kVector<T>], b[kVector<T>];
  };
  const T* input;
  const T* other;
  T* output;
  bool vector;

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const {
    load_slot(loaded.a, input, slot, vector);
    load_slot(loaded.b, other, slot, vector);
  }
  // The statistics are those of the sum as it is written.
  __device__ void finish(const Slot<T>& slot, Loaded& loaded) const {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) loaded.a[e] = sum(loaded.a[e], loaded.b[e]);
    store_slot(output, loaded.a, slot, vector);
  }
  __device__ A value(const Loaded& loaded, int e) const { return to_accumulate(loaded.a[e]); }
  __device__ A at(int64_t offset) const { return to_accumulate(sum(input[offset], other[offset])); }

 private:
  __device__ static T sum(T a, T b) {
    return from_accumulate<T>(to_accumulate(a) + to_accumulate(b));
  }
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    identity_add_kernel(const T* __restrict__ input, const T* __restrict__ other,
                        T* __restrict__ output, Moments* __restrict__ partials,
                        const Geometry geometry) {
  chunk_statistics<2, T, kChannelsLast>(AddSource<T>{input, other, output, geometry.vector},
                                        geometry, partials);
}

// Partial results to be given to identity_add.
template <typename T>
int64_t identity_add_partials(const T* input, const T* other, const T* output,
                              const FeatureMap& map) {
  const Geometry g = geometry<T>(map, input, other, output);
  return g.chunks * g.channels;
}

template <typename T>
void identity_add(const T* input, const T* other, T* output, const FeatureMap& map,
                  Moments* partials, accumulate_t<T>* mean, accumulate_t<T>* var, Stream stream) {
  const Geometry g = geometry<T>(map, input, other, output);
  if (g.blocks() > 0) {
    launch("identity_add_kernel",
           map.channels_last ? &identity_add_kernel<T, true> : &identity_add_kernel<T, false>,
           g.blocks(), kThreads, 0, stream, input, other, output, partials, g);
  }
  batch_norm_stats_join(partials, g, mean, var, stream);
}

}  // namespace preact::cuda
