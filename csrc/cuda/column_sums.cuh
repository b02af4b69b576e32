// Per-column results of a matrix product's tiles, in two stages of fixed order: one pair of floats
// a column and tile of rows, then one a column. No atomics, so every run gives the same bits.
#pragma once

#include "common/feature_map.h"
#include "cuda/gemm.cuh"

namespace preact::cuda {

// Mean and sum of squared deviations of a sample whose size is known, both zero for none.
struct TileMoments {
  float mean, m2;
};

// Joins a sample of `added` values to one of `count` by Chan, Golub & LeVeque's formula.
__device__ inline void join(TileMoments& moments, float count, const TileMoments& other,
                            float added) {
  if (added == 0) return;
  const float fraction = added / (count + added);
  const float delta = other.mean - moments.mean;
  moments.mean += delta * fraction;
  moments.m2 += other.m2 + delta * delta * count * fraction;
}

// How many of the rows `first`, `first + kSlabRows`, … are among the `limit` first of a tile.
__device__ inline int rows_below(int limit, int first) {
  return (limit - first + kSlabRows - 1) / kSlabRows;
}

constexpr int kWarpPairsBytes = kWarps * kSlabColumns * 2 * 4;

// A thread's moments of eight columns. Deviations are taken from its first value: with so few
// values the cancellation is worth a few units in the last place at most.
struct ColumnMoments {
  float shift[8], sum[8], square[8];

  __device__ void start() {
#pragma unroll
    for (int e = 0; e < 8; ++e) shift[e] = sum[e] = square[e] = 0;
  }
  __device__ void add(int e, float value, bool first) {
    if (first) shift[e] = value;
    const float deviation = value - shift[e];
    sum[e] += deviation;
    square[e] = __fmaf_rn(deviation, deviation, square[e]);
  }

  // Joins the block's threads and writes the slab's columns of the tile's partial results, the
  // mean first. `pairs` is shared memory of kWarpPairsBytes, `limit` the tile's rows.
  __device__ void finish(float* pairs, int limit, float* mean, float* m2, int columns) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    constexpr int kRowsPerWarp = 32 / kEights;
    const int row = static_cast<int>(threadIdx.x) / kEights;
    int count = rows_below(limit, row);
    TileMoments own[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const float average = sum[e] / static_cast<float>(count);  // NaN of no rows is not joined
      own[e].mean = shift[e] + average;
      // Rounding may leave less than nothing where all values are equal.
      const float m2 = square[e] - sum[e] * average;
      own[e].m2 = m2 < 0 ? 0.0f : m2;
    }
#pragma unroll
    for (int distance = kEights; distance < 32; distance *= 2) {
      const int added = __shfl_xor_sync(0xffffffffu, count, distance);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        TileMoments other;
        other.mean = __shfl_xor_sync(0xffffffffu, own[e].mean, distance);
        other.m2 = __shfl_xor_sync(0xffffffffu, own[e].m2, distance);
        join(own[e], static_cast<float>(count), other, static_cast<float>(added));
      }
      count += added;
    }
    if (lane < kEights) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        pairs[warp * kSlabColumns + lane * 8 + e] = own[e].mean;
        pairs[(kWarps + warp) * kSlabColumns + lane * 8 + e] = own[e].m2;
      }
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column < kSlabColumns && column < columns) {
      TileMoments all{0, 0};
      int before = 0;
      for (int w = 0; w < kWarps; ++w) {
        int added = 0;
        for (int r = 0; r < kRowsPerWarp; ++r) added += rows_below(limit, w * kRowsPerWarp + r);
        const TileMoments other{pairs[w * kSlabColumns + column],
                                pairs[(kWarps + w) * kSlabColumns + column]};
        join(all, static_cast<float>(before), other, static_cast<float>(added));
        before += added;
      }
      mean[column] = all.mean;
      m2[column] = all.m2;
    }
  }
};

// A thread's two plain sums of eight columns.
struct ColumnSums {
  float first[8], second[8];

  __device__ void start() {
#pragma unroll
    for (int e = 0; e < 8; ++e) first[e] = second[e] = 0;
  }

  __device__ void finish(float* pairs, float* first_of, float* second_of, int columns) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int distance = kEights; distance < 32; distance *= 2) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        first[e] += __shfl_xor_sync(0xffffffffu, first[e], distance);
        second[e] += __shfl_xor_sync(0xffffffffu, second[e], distance);
      }
    }
    if (lane < kEights) {
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        pairs[warp * kSlabColumns + lane * 8 + e] = first[e];
        pairs[(kWarps + warp) * kSlabColumns + lane * 8 + e] = second[e];
      }
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column < kSlabColumns && column < columns) {
      float one = 0, two = 0;
      for (int w = 0; w < kWarps; ++w) {
        one += pairs[w * kSlabColumns + column];
        two += pairs[(kWarps + w) * kSlabColumns + column];
      }
      first_of[column] = one;
      second_of[column] = two;
    }
  }
};

// The second stage: a block takes kMergeColumns columns and walks the tiles in kMergeLanes strides.
constexpr int kMergeColumns = 8, kMergeLanes = kThreads / kMergeColumns;

// Adds the block's values of each column in the order of their lanes; for lane 0 to read.
__device__ inline double sum_of_lanes(double* shared, double value) {
  const int column = threadIdx.x % kMergeColumns, lane = threadIdx.x / kMergeColumns;
  shared[lane * kMergeColumns + column] = value;
  __syncthreads();
  double total = 0;
  if (lane == 0) {
    for (int i = 0; i < kMergeLanes; ++i) total += shared[i * kMergeColumns + column];
  }
  __syncthreads();
  return total;
}

// Moments of the tiles' kBlockM rows (the last has fewer) into mean and biased variance, [columns].
template <typename A>
__global__ void merge_moments_kernel(const A* means, const A* m2s, int rows, int columns, A* mean,
                                     A* var) {
  PREACT_SHARED(double, shared, kThreads);
  const int lane = threadIdx.x / kMergeColumns;
  const int column = static_cast<int>(blockIdx.x * kMergeColumns + threadIdx.x % kMergeColumns);
  const int64_t tiles = (rows + kBlockM - 1) / kBlockM;
  const double shift = column < columns ? means[column] : 0.0;
  double sum = 0, square = 0;
  if (column < columns) {
    for (int64_t tile = lane; tile < tiles; tile += kMergeLanes) {
      const int64_t left = rows - tile * kBlockM;
      const double count = static_cast<double>(left < kBlockM ? left : kBlockM);
      const double deviation = means[tile * columns + column] - shift;
      sum += count * deviation;
      square += count * deviation * deviation + m2s[tile * columns + column];
    }
  }
  sum = sum_of_lanes(shared, sum);
  square = sum_of_lanes(shared, square);
  if (lane == 0 && column < columns) {
    const double average = sum / static_cast<double>(rows);
    mean[column] = static_cast<A>(shift + average);
    const double variance = (square - sum * average) / static_cast<double>(rows);
    var[column] = variance <= 0 ? A(0) : static_cast<A>(variance);
  }
}

// Sums of dz (x - mean) and dz of the tiles into the gradients of the norm's weight and bias.
template <typename A>
__global__ void merge_sums_kernel(const A* sums_dz_x, const A* sums_dz, int64_t tiles, int columns,
                                  Norm<A> norm, A* grad_weight, A* grad_bias) {
  PREACT_SHARED(double, shared, kThreads);
  const int lane = threadIdx.x / kMergeColumns;
  const int column = static_cast<int>(blockIdx.x * kMergeColumns + threadIdx.x % kMergeColumns);
  double dz_x = 0, dz = 0;
  if (column < columns) {
    for (int64_t tile = lane; tile < tiles; tile += kMergeLanes) {
      dz_x += sums_dz_x[tile * columns + column];
      dz += sums_dz[tile * columns + column];
    }
  }
  dz_x = sum_of_lanes(shared, dz_x);
  dz = sum_of_lanes(shared, dz);
  if (lane == 0 && column < columns) {
    const double invstd = inverse_std(norm.var[column], norm.eps);
    grad_weight[column] = static_cast<A>(dz_x * invstd);
    grad_bias[column] = static_cast<A>(dz);
  }
}

}  // namespace preact::cuda
