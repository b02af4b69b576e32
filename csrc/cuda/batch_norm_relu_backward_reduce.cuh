// Gradients of weight and bias, the two sums of the backward: reads grad_output and input.
#pragma once

#include "cuda/channel_table.cuh"
#include "cuda/two_sums.cuh"

namespace preact::cuda {

template <typename T, bool kChannelsLast>
struct BackwardReduceOp {
  using A = accumulate_t<T>;
  using Position = Walk<T, kChannelsLast>;
  struct Loaded {
    T grad[kVector<T>], x[kVector<T>];
  };
  const T* grad_output;
  const T* input;
  bool vector;
  A values[kNormRows][Position::kLanes];
  A sums[2][kVector<T>];  // of dz * (x - mean), of dz

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const {
    load_slot(loaded.grad, grad_output, slot, vector);
    load_slot(loaded.x, input, slot, vector);
  }
  // What a slot does not hold was read as zero and adds nothing.
  __device__ void use(const Slot<T>&, const Loaded& loaded) {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const int lane = kChannelsLast ? e : 0;
      const A x = to_accumulate(loaded.x[e]);
      const A dz = where_active(z_of(values, lane, x), to_accumulate(loaded.grad[e]));
      sums[0][e] = fused(dz, x - values[kMean][lane], sums[0][e]);
      sums[1][e] += dz;
    }
  }
};

struct TwoSums {
  double dz_x, dz;
};

// Stage one; partials [chunks, channels].
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_relu_backward_reduce_kernel(const T* __restrict__ grad_output,
                                           const T* __restrict__ input, Norm<accumulate_t<T>> norm,
                                           TwoSums* __restrict__ partials,
                                           const Geometry geometry) {
  using A = accumulate_t<T>;
  Walk<T, kChannelsLast> walk(geometry);
  BackwardReduceOp<T, kChannelsLast> op{grad_output, input, geometry.vector, {}, {}};
  channel_values(walk, op.values,
                 [&](int64_t channel, A* values) { fill_norm(norm, channel, values); });
  sweep<2>(walk, op);
  A sums[2][Walk<T, kChannelsLast>::kLanes];
  fold(op.sums, sums);
  block_sums(walk, sums, geometry.columns, [&](int64_t channel, double dz_x, double dz) {
    partials[walk.chunk() * geometry.channels + channel] = {dz_x, dz};
  });
}

// Stage two.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    batch_norm_relu_backward_reduce_join_kernel(const TwoSums* __restrict__ partials,
                                                int64_t chunks, int64_t channels, Norm<A> norm,
                                                A* __restrict__ grad_weight,
                                                A* __restrict__ grad_bias) {
  const int64_t channel = join_channel();
  const bool active = channel < channels;
  TwoSums total{0, 0};
  join_chunks(total, partials + channel, chunks, active ? channels : 0,
              [](TwoSums& into, const TwoSums& other) {
                into.dz_x += other.dz_x;
                into.dz += other.dz;
              });
  if (active && threadIdx.x < kJoinChannels) {
    const A invstd = inverse_std(norm.var[channel], norm.eps);
    grad_weight[channel] = static_cast<A>(total.dz_x * invstd);
    grad_bias[channel] = static_cast<A>(total.dz);
  }
}

// Partial results to be given to batch_norm_relu_backward_reduce.
template <typename T>
int64_t batch_norm_relu_backward_reduce_partials(const T* grad_output, const T* input,
                                                 const FeatureMap& map) {
  const Geometry g = geometry<T>(map, grad_output, input);
  return g.chunks * g.channels;
}

template <typename T>
void batch_norm_relu_backward_reduce(const T* grad_output, const T* input,
                                     const Norm<accumulate_t<T>>& norm, const FeatureMap& map,
                                     TwoSums* partials, accumulate_t<T>* grad_weight,
                                     accumulate_t<T>* grad_bias, Stream stream) {
  using A = accumulate_t<T>;
  const Geometry g = geometry<T>(map, grad_output, input);
  if (g.channels == 0) return;
  if (g.blocks() > 0) {
    launch("batch_norm_relu_backward_reduce_kernel",
           map.channels_last ? &batch_norm_relu_backward_reduce_kernel<T, true>
                             : &batch_norm_relu_backward_reduce_kernel<T, false>,
           g.blocks(), kThreads, 0, stream, grad_output, input, norm, partials, g);
  }
  launch("batch_norm_relu_backward_reduce_join_kernel",
         &batch_norm_relu_backward_reduce_join_kernel<A>, join_blocks(g.channels), kThreads, 0,
         stream, partials, g.chunks, g.channels, norm, grad_weight, grad_bias);
}

}  // namespace preact::cuda
