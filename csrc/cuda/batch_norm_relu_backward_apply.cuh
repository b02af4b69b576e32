// Gradient of the input: reads grad_output, input (and grad_skip), writes grad_input.
#pragma once

#include "common/backward_terms.h"
#include "cuda/channel_table.cuh"

namespace preact::cuda {

enum BackwardRow { kSlope = kNormRows, kOffset, kBackwardRows };

template <typename T, bool kChannelsLast>
struct BackwardApplyOp {
  using A = accumulate_t<T>;
  using Position = Walk<T, kChannelsLast>;
  struct Loaded {
    T grad[kVector<T>], x[kVector<T>], skip[kVector<T>];
  };
  const T* grad_output;
  const T* input;
  const T* grad_skip;
  T* grad_input;
  bool vector;
  bool batch_statistics;
  A values[kBackwardRows][Position::kLanes];

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const {
    load_slot(loaded.grad, grad_output, slot, vector);
    load_slot(loaded.x, input, slot, vector);
    if (grad_skip != nullptr) load_slot(loaded.skip, grad_skip, slot, vector);
  }
  __device__ void use(const Slot<T>& slot, const Loaded& loaded) const {
    T dx[kVector<T>];
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const int lane = kChannelsLast ? e : 0;
      const A x = to_accumulate(loaded.x[e]), scale = values[kScale][lane];
      const A dz = where_active(z_of(values, lane, x), to_accumulate(loaded.grad[e]));
      A grad = scale * dz;
      if (batch_statistics) {
        const A centred = x - values[kMean][lane];
        grad = fused(scale, dz, fused(centred, values[kSlope][lane], values[kOffset][lane]));
      }
      if (grad_skip != nullptr) grad += to_accumulate(loaded.skip[e]);
      dx[e] = from_accumulate<T>(grad);
    }
    store_slot(grad_input, dx, slot, vector);
  }
};

// The sums of the reduce kernel; null where mean and var are constants.
template <typename A>
struct BackwardSums {
  const A* grad_weight;
  const A* grad_bias;
  A inverse_count;
};

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads)
    batch_norm_relu_backward_apply_kernel(const T* __restrict__ grad_output,
                                          const T* __restrict__ input,
                                          const T* __restrict__ grad_skip,
                                          Norm<accumulate_t<T>> norm,
                                          BackwardSums<accumulate_t<T>> sums,
                                          T* __restrict__ grad_input, const Geometry geometry) {
  using A = accumulate_t<T>;
  Walk<T, kChannelsLast> walk(geometry);
  BackwardApplyOp<T, kChannelsLast> op{
      grad_output, input, grad_skip, grad_input, geometry.vector, sums.grad_weight != nullptr, {}};
  channel_values(walk, op.values, [&](int64_t channel, A* values) {
    fill_norm(norm, channel, values);
    values[kSlope] = values[kOffset] = 0;
    if (sums.grad_weight != nullptr) {
      const BackwardTerms<A> terms(values[kScale], inverse_std(norm.var[channel], norm.eps),
                                   sums.grad_weight[channel], sums.grad_bias[channel],
                                   sums.inverse_count);
      values[kSlope] = terms.slope;
      values[kOffset] = terms.offset;
    }
  });
  sweep<2>(walk, op);
}

template <typename T>
void batch_norm_relu_backward_apply(const T* grad_output, const T* input, const T* grad_skip,
                                    const Norm<accumulate_t<T>>& norm,
                                    const accumulate_t<T>* grad_weight,
                                    const accumulate_t<T>* grad_bias, T* grad_input,
                                    const FeatureMap& map, Stream stream) {
  using A = accumulate_t<T>;
  const Geometry g = geometry<T>(map, grad_output, input, grad_skip, grad_input);
  if (g.blocks() == 0) return;
  const BackwardSums<A> sums{grad_weight, grad_bias, A(1) / static_cast<A>(map.count())};
  launch("batch_norm_relu_backward_apply_kernel",
         map.channels_last ? &batch_norm_relu_backward_apply_kernel<T, true>
                           : &batch_norm_relu_backward_apply_kernel<T, false>,
         g.blocks(), kThreads, 0, stream, grad_output, input, grad_skip, norm, sums, grad_input, g);
}

}  // namespace preact::cuda
