// relu((input - mean) / sqrt(var + eps) * weight + bias): one read and one write of a map.
#pragma once

#include "cuda/channel_table.cuh"

namespace preact::cuda {

template <typename T, bool kChannelsLast>
struct BatchNormReluOp {
  using A = accumulate_t<T>;
  using Position = Walk<T, kChannelsLast>;
  struct Loaded {
    T x[kVector<T>];
  };
  const T* input;
  T* output;
  bool vector;
  A values[kNormRows][Position::kLanes];

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const {
    load_slot(loaded.x, input, slot, vector);
  }
  __device__ void use(const Slot<T>& slot, const Loaded& loaded) const {
    T y[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const A z = z_of(values, kChannelsLast ? e : 0, to_accumulate(loaded.x[e]));
      y[e] = from_accumulate<T>(where_active(z, z));
    }
    store_slot(output, y, slot, vector);
  }
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_relu_kernel(const T* __restrict__ input, Norm<accumulate_t<T>> norm,
                           T* __restrict__ output, const Geometry geometry) {
  Walk<T, kChannelsLast> walk(geometry);
  BatchNormReluOp<T, kChannelsLast> op{input, output, geometry.vector, {}};
  channel_values(walk, op.values, [&](int64_t channel, accumulate_t<T>* values) {
    fill_norm(norm, channel, values);
  });
  sweep<4>(walk, op);
}

template <typename T>
void batch_norm_relu(const T* input, const Norm<accumulate_t<T>>& norm, T* output,
                     const FeatureMap& map, Stream stream) {
  const Geometry g = geometry<T>(map, input, output);
  if (g.blocks() == 0) return;
  launch("batch_norm_relu_kernel",
         map.channels_last ? &batch_norm_relu_kernel<T, true> : &batch_norm_relu_kernel<T, false>,
         g.blocks(), kThreads, 0, stream, input, norm, output, g);
}

}  // namespace preact::cuda
