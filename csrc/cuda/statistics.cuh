// Mean and biased variance per channel of values that a source reads, and may write on the way.
//
// Every chunk and channel has a shift of its own, the mean of a few of its values; sums are taken
// of x - shift, and chunks are joined by Chan's formula in double precision. So no more cancels
// than the chunk's own spread explains, whatever the mean.
#pragma once

#include "common/moments.h"
#include "cuda/affine.cuh"
#include "cuda/two_sums.cuh"

namespace preact::cuda {

// Source: Loaded, load(slot, loaded), finish(slot, loaded) which may write and after which
// value(loaded, e) is element e; at(offset) is one element, not written.
template <typename T, bool kChannelsLast, typename Source>
struct StatisticsOp {
  using A = accumulate_t<T>;
  using Position = Walk<T, kChannelsLast>;
  using Loaded = typename Source::Loaded;
  Source source;
  A shift[Position::kLanes];
  A sums[2][kVector<T>];

  __device__ void load(const Slot<T>& slot, Loaded& loaded) const { source.load(slot, loaded); }
  __device__ void use(const Slot<T>& slot, Loaded& loaded) {
    source.finish(slot, loaded);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (!slot.holds(e)) continue;
      const A d = source.value(loaded, e) - shift[kChannelsLast ? e : 0];
      sums[0][e] += d;
      sums[1][e] = fused(d, d, sums[1][e]);
    }
  }
};

// The mean of some of the chunk's values, the same in all threads of a channel. Pairs are added, so
// that equal values give that value exactly and leave no variance behind.
template <typename T, bool kChannelsLast, typename Source>
__device__ void choose_shift(const Walk<T, kChannelsLast>& walk, const Source& source,
                             accumulate_t<T> (&shift)[Walk<T, kChannelsLast>::kLanes]) {
  using A = accumulate_t<T>;
  const int64_t begin = walk.begin(), length = walk.end() - begin;
  if constexpr (kChannelsLast) {
    constexpr int kRows = 4;
    Slot<T> slots[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) slots[i] = walk.row(begin + length * i / kRows);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      A values[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        values[i] = slots[i].holds(e) ? source.at(slots[i].offset + e) : A(0);
      }
      shift[e] = ((values[0] + values[1]) + (values[2] + values[3])) * A(0.25);
    }
  } else {
    const int lane = threadIdx.x % 32;
    A value = source.at(walk.element(begin + length * lane / 32));
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, apart);
    }
    shift[0] = value * A(0.03125);
  }
}

// Of a chunk's values in one channel, and of a channel.
struct Moments {
  double count, mean, m2;
};

// Stage one; partials [chunks, channels].
template <int kBatch, typename T, bool kChannelsLast, typename Source>
__device__ void chunk_statistics(const Source& source, const Geometry& geometry,
                                 Moments* partials) {
  using A = accumulate_t<T>;
  constexpr int kLanes = Walk<T, kChannelsLast>::kLanes;
  Walk<T, kChannelsLast> walk(geometry);
  StatisticsOp<T, kChannelsLast, Source> op{source, {}, {}};
  choose_shift<T, kChannelsLast>(walk, source, op.shift);
  sweep<kBatch>(walk, op);

  A sums[2][kLanes];
  fold(op.sums, sums);
  PREACT_SHARED(A, shifts, kThreads);
  // Threads of one column have one shift, so the first row of threads speaks for all.
  if (static_cast<int>(threadIdx.x) < geometry.columns) {
#pragma unroll
    for (int lane = 0; lane < kLanes; ++lane) {
      shifts[walk.column() * kLanes + lane] = op.shift[lane];
    }
  }
  const auto count =
      static_cast<double>(walk.elements_before(walk.end()) - walk.elements_before(walk.begin()));
  block_sums(walk, sums, geometry.columns, [&](int64_t channel, double sum, double square) {
    const double offset = sum / count, m2 = square - sum * offset;
    partials[walk.chunk() * geometry.channels + channel] = {
        count, shifts[channel - walk.first_channel()] + offset, m2 < 0 ? 0 : m2};
  });
}

// Stage two.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    batch_norm_stats_join_kernel(const Moments* __restrict__ partials, int64_t chunks,
                                 int64_t channels, A* __restrict__ mean, A* __restrict__ var) {
  const int64_t channel = join_channel();
  const bool active = channel < channels;
  const auto merge = [](Moments& into, const Moments& other) {
    if (other.count == 0) return;
    MomentsMerge(into.count, other.count)(into.mean, into.m2, other.mean, other.m2);
    into.count += other.count;
  };
  Moments total{0, 0, 0};
  join_chunks(total, partials + channel, chunks, active ? channels : 0, merge);
  if (active && threadIdx.x < kJoinChannels) {
    const double none = total.count > 0 ? 0 : NAN;  // no values have no mean, as in PyTorch
    mean[channel] = static_cast<A>(total.mean + none);
    var[channel] = static_cast<A>(total.m2 / total.count + none);
  }
}

template <typename A>
void batch_norm_stats_join(const Moments* partials, const Geometry& g, A* mean, A* var,
                           Stream stream) {
  if (g.channels == 0) return;
  launch("batch_norm_stats_join_kernel", &batch_norm_stats_join_kernel<A>, join_blocks(g.channels),
         kThreads, 0, stream, partials, g.chunks, g.channels, mean, var);
}

}  // namespace preact::cuda
