// One pass over a part of a feature map. Included by foreach_capability.h like vec.h.
//
// A pass is a struct with three inlined members, each for a holder P (Pack or Single):
//   begin<P, Get>(c)    -> Regs<P>: the per-channel values of channel c (and those after it)
//   element<P>(regs, i)           : the work on P::lanes elements from offset i
//   end<P, Get>(regs, c)          : what was accumulated goes back to the per-channel arrays
// and kMaps, the number of feature maps it reads or writes.
// Get says how a per-channel array is read: one value per lane, or one for all lanes.

constexpr int kUnroll = 4;
// Longer rows are walked one by one by passes over several maps: many lines of several maps in
// flight at once defeat the prefetchers (1.5 times slower at 256 channels, measured).
constexpr int64_t kSharedChannels = 128;

struct AlongChannels {
  template <typename P, typename A>
  static PREACT_INLINE typename P::reg get(const A* values, int64_t c) {
    return P::load(values + c);
  }
  template <typename P, typename A>
  static PREACT_INLINE void add(A* sums, int64_t c, typename P::reg value) {
    P::store(sums + c, P::load(sums + c) + value);
  }
};

struct WithinChannel {
  template <typename P, typename A>
  static PREACT_INLINE typename P::reg get(const A* values, int64_t c) {
    return P::broadcast(values[c]);
  }
  template <typename P, typename A>
  static PREACT_INLINE void add(A* sums, int64_t c, typename P::reg value) {
    sums[c] += P::sum(value);
  }
};

template <typename P, int Rows, typename Pass>
PREACT_INLINE void sweep_channels(const Pass& pass, int64_t row, int64_t channels, int64_t stride,
                                  int64_t& c) {
  for (; c + P::lanes <= channels; c += P::lanes) {
    auto regs = pass.template begin<P, AlongChannels>(c);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) pass.template element<P>(regs, (row + r) * stride + c);
    pass.template end<P, AlongChannels>(regs, c);
  }
}

// Rows [begin, end) of a [rows, channels] matrix, `stride` apart. Several rows share one load of
// the per-channel values; each row is still read from end to end, which is what the prefetchers
// follow.
template <typename A, typename Pass>
PREACT_INLINE void sweep_rows(const Pass& pass, int64_t begin, int64_t end, int64_t channels,
                              int64_t stride) {
  int64_t row = begin;
  const bool shared = Pass::kMaps == 1 || channels < kSharedChannels;
  for (; shared && row + kUnroll <= end; row += kUnroll) {
    int64_t c = 0;
    sweep_channels<Pack<A>, kUnroll>(pass, row, channels, stride, c);
    sweep_channels<Single<A>, kUnroll>(pass, row, channels, stride, c);
  }
  for (; row < end; ++row) {
    int64_t c = 0;
    sweep_channels<Pack<A>, 1>(pass, row, channels, stride, c);
    sweep_channels<Single<A>, 1>(pass, row, channels, stride, c);
  }
}

template <typename A, typename Pass>
PREACT_INLINE void sweep_rows(const Pass& pass, int64_t begin, int64_t end, int64_t channels) {
  sweep_rows<A>(pass, begin, end, channels, channels);
}

// Elements [begin, end), all of channel c. Independent accumulators hide the latency of an add.
template <typename A, typename Pass>
PREACT_INLINE void sweep_channel(const Pass& pass, int64_t begin, int64_t end, int64_t c) {
  using P = Pack<A>;
  using S = Single<A>;
  int64_t i = begin;
  if (i + P::lanes <= end) {
    auto first = pass.template begin<P, WithinChannel>(c);
    auto second = first, third = first, fourth = first;
    for (; i + 4 * P::lanes <= end; i += 4 * P::lanes) {
      pass.template element<P>(first, i);
      pass.template element<P>(second, i + P::lanes);
      pass.template element<P>(third, i + 2 * P::lanes);
      pass.template element<P>(fourth, i + 3 * P::lanes);
    }
    for (; i + P::lanes <= end; i += P::lanes) pass.template element<P>(first, i);
    pass.template end<P, WithinChannel>(first, c);
    pass.template end<P, WithinChannel>(second, c);
    pass.template end<P, WithinChannel>(third, c);
    pass.template end<P, WithinChannel>(fourth, c);
  }
  if (i < end) {
    auto regs = pass.template begin<S, WithinChannel>(c);
    for (; i < end; ++i) pass.template element<S>(regs, i);
    pass.template end<S, WithinChannel>(regs, c);
  }
}

// A pass without sums over a part of the map: rows where channels_last, [image, channel] planes
// otherwise.
template <typename A, typename Pass>
PREACT_INLINE void sweep_map(const Pass& pass, const FeatureMap& map, int64_t begin, int64_t end) {
  if (map.channels_last) {
    sweep_rows<A>(pass, begin, end, map.channels);
  } else {
    for (int64_t plane = begin; plane < end; ++plane) {
      sweep_channel<A>(pass, plane * map.spatial, (plane + 1) * map.spatial, plane % map.channels);
    }
  }
}
