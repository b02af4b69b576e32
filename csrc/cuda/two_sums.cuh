// Two sums per channel in two stages without atomics, in an order that shape alone decides.
//
// Stage one leaves partial results in double precision per chunk and channel, [chunks, channels];
// a thread's sums meet its warp's in registers, then the block's in shared memory. Stage two joins
// the chunks.
#pragma once

#include "cuda/sweep.cuh"

namespace preact::cuda {

constexpr int kWarps = kThreads / 32;

// Adds each lane's sums over the warp's threads of the same column.
template <typename A, int kLanes>
__device__ inline void warp_sums(A (&sums)[2][kLanes], int columns) {
  for (int apart = 16; apart >= columns; apart /= 2) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int lane = 0; lane < kLanes; ++lane) {
        sums[row][lane] += __shfl_xor_sync(0xffffffffu, sums[row][lane], apart);
      }
    }
  }
}

// Calls write(channel, first, second) once for each of the block's channels.
template <typename A, typename Walk, typename Write>
__device__ void block_sums(const Walk& walk, A (&sums)[2][Walk::kLanes], int columns,
                           const Write& write) {
  constexpr int kWidth = kMostColumns * Walk::kLanes;
  PREACT_SHARED(A, shared, kWarps * 2 * kWidth);
  warp_sums(sums, columns);
  const int warp = threadIdx.x / 32, column = threadIdx.x % 32;
  if (column < columns) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
#pragma unroll
      for (int lane = 0; lane < Walk::kLanes; ++lane) {
        shared[(warp * 2 + row) * kWidth + column * Walk::kLanes + lane] = sums[row][lane];
      }
    }
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t < walk.table_size()) {
    A totals[2] = {0, 0};
    for (int w = 0; w < kWarps; ++w) {
      for (int row = 0; row < 2; ++row) totals[row] += shared[(w * 2 + row) * kWidth + t];
    }
    write(walk.first_channel() + t, totals[0], totals[1]);
  }
}

// Adds a thread's own lanes where they are all of one channel.
template <typename A, int kSize, int kLanes>
__device__ inline void fold(const A (&own)[2][kSize], A (&sums)[2][kLanes]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if constexpr (kLanes == kSize) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[row][e] = own[row][e];
    } else {
      sums[row][0] = 0;
#pragma unroll
      for (int e = 0; e < kSize; ++e) sums[row][0] += own[row][e];
    }
  }
}

// Stage two: kJoinChannels channels a block, kJoinRows threads for the chunks of each.
constexpr int kJoinChannels = 8, kJoinRows = kThreads / kJoinChannels;

// Joins a channel's partials, `stride` apart, into `total` of the channel's first thread by
// merge(into, other), in an order that their number decides. A stride of 0 means no channel.
template <typename Total, typename Merge>
__device__ void join_chunks(Total& total, const Total* partials, int64_t chunks, int64_t stride,
                            const Merge& merge) {
  PREACT_SHARED(Total, shared, kThreads);
  const int row = threadIdx.x / kJoinChannels;
  // Each partial is under way while the one before is merged. Not unrolled: a merge divides in
  // double precision, whose calls would make the loads of several rounds spill.
  const int64_t end = stride > 0 ? chunks : 0;
  Total next{};
  if (row < end) next = partials[row * stride];
#pragma unroll 1
  for (int64_t chunk = row; chunk < end; chunk += kJoinRows) {
    const Total current = next;
    if (chunk + kJoinRows < end) next = partials[(chunk + kJoinRows) * stride];
    merge(total, current);
  }
#pragma unroll 1
  for (int half = kJoinRows / 2; half > 0; half /= 2) {
    if (row >= half && row < 2 * half) shared[threadIdx.x] = total;
    __syncthreads();
    if (row < half) merge(total, shared[threadIdx.x + half * kJoinChannels]);
  }
}

__device__ inline int64_t join_channel() {
  return static_cast<int64_t>(blockIdx.x) * kJoinChannels + threadIdx.x % kJoinChannels;
}
inline unsigned join_blocks(int64_t channels) {
  return static_cast<unsigned>(ceil_div(channels, kJoinChannels));
}

}  // namespace preact::cuda
