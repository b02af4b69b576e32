// A block's per-channel values, worked out once in shared memory and kept in registers from there.
#pragma once

#include "cuda/affine.cuh"
#include "cuda/sweep.cuh"

namespace preact::cuda {

// kRows values for each channel of the block: fill(channel, values) gives those of one channel.
template <int kRows, typename A, typename Walk, typename Fill>
__device__ void channel_values(const Walk& walk, A (&values)[kRows][Walk::kLanes],
                               const Fill& fill) {
  PREACT_SHARED(A, table, kRows * kThreads);
  const int size = walk.table_size();
  if (const int t = threadIdx.x; t < size) {
    A own[kRows];
    fill(walk.first_channel() + t, own);
#pragma unroll
    for (int row = 0; row < kRows; ++row) table[row * kThreads + t] = own[row];
  }
  __syncthreads();
  const int first = walk.column() * Walk::kLanes;
#pragma unroll
  for (int lane = 0; lane < Walk::kLanes; ++lane) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) values[row][lane] = table[row * kThreads + first + lane];
  }
}

// The rows of a batch norm.
enum NormRow { kMean, kScale, kBias, kNormRows };

template <typename A>
__device__ inline void fill_norm(const Norm<A>& norm, int64_t channel, A* values) {
  const A invstd = inverse_std(norm.var[channel], norm.eps);
  values[kMean] = norm.mean[channel];
  values[kScale] = norm.weight == nullptr ? invstd : norm.weight[channel] * invstd;
  values[kBias] = norm.bias == nullptr ? A(0) : norm.bias[channel];
}

// z of a value of the thread's lane.
template <typename A, int kRows, int kLanes>
__device__ inline A z_of(const A (&values)[kRows][kLanes], int lane, A x) {
  return normalize(x, values[kMean][lane], values[kScale][lane], values[kBias][lane]);
}

}  // namespace preact::cuda
