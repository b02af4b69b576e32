// One pass over a part of a feature map. Included by foreach_capability.h like vec.h.
//
// A pass is a struct with inlined members, each for a holder P (Pairs, Pack or Single):
//   begin<P, Get>(c)    -> Regs<P>: the per-channel values of channel c (and those after it)
//   element<P>(regs, at)          : the work on P::lanes elements at an Offset, or on a Rest
//   join(regs, other)             : what `other` accumulated is added to regs
//   end<P, Get>(regs, c)          : what was accumulated goes back to the per-channel arrays
// and kRows, how many rows of channels share one load of the per-channel values: 8 where maps are
// read only, 4 where one is written; of longer rows 4.
// Get says how a per-channel array is read: one value per lane, or one for all lanes.

// Still longer rows are walked one by one: at these distances lines of several rows and maps fall
// into few sets of the cache.
constexpr int64_t kShortRow = 512, kLongestShared = 2048;  // bytes
constexpr int kLongRows = 4;

struct AlongChannels {
  template <typename P, typename A>
  static PREACT_INLINE typename P::reg get(const A* values, int64_t c) {
    return P::load_channels(values + c);
  }
  template <typename P, typename A>
  static PREACT_INLINE void add(A* sums, int64_t c, typename P::reg value) {
    P::store_channels(sums + c, P::load_channels(sums + c) + value);
  }
};

struct WithinChannel {
  template <typename P, typename A>
  static PREACT_INLINE typename P::reg get(const A* values, int64_t c) {
    return P::broadcast(values[c]);
  }
  // A vector of sums for each channel: adding up its lanes can wait.
  template <typename P, typename A>
  static PREACT_INLINE void add(A* sums, int64_t c, typename P::reg value) {
    using V = Pack<A>;
    A* const own = sums + c * V::lanes;
    V::store(own, V::load(own) + P::folded(value));
  }
};

template <typename P, int Rows, typename Pass>
PREACT_INLINE void sweep_channels(const Pass& pass, int64_t row, int64_t channels, int64_t stride,
                                  int64_t ahead, int64_t& c) {
  for (; c + P::lanes <= channels; c += P::lanes) {
    auto regs = pass.template begin<P, AlongChannels>(c);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
      pass.template element<P>(regs, Offset{(row + r) * stride + c, ahead});
    pass.template end<P, AlongChannels>(regs, c);
  }
}

template <typename T, int Rows, typename Pass>
PREACT_INLINE void sweep_some_rows(const Pass& pass, int64_t row, int64_t channels,
                                   int64_t stride) {
  using P = VectorsOf<T>;
  // At least to the same place in the next rows.
  const int64_t ahead = std::max<int64_t>(kAhead, Rows * stride * static_cast<int64_t>(sizeof(T)));
  int64_t c = 0;
  sweep_channels<P, Rows>(pass, row, channels, stride, ahead, c);
  if constexpr (!std::is_same_v<P, Pairs>) {
    sweep_channels<Single<accumulate_t<T>>, Rows>(pass, row, channels, stride, ahead, c);
  } else if (c < channels) {
    auto regs = pass.template begin<P, AlongChannels>(c);
    for (int r = 0; r < Rows; ++r) {
      pass.template element<P>(regs, Rest{(row + r) * stride + c, channels - c});
    }
    pass.template end<P, AlongChannels>(regs, c);
  }
}

// Rows [begin, end) of a [rows, channels] matrix, `stride` apart; per-channel arrays are as
// to_lanes makes them.
template <typename T, typename Pass>
PREACT_INLINE void sweep_rows(const Pass& pass, int64_t begin, int64_t end, int64_t channels,
                              int64_t stride) {
  const int64_t bytes = channels * static_cast<int64_t>(sizeof(T));
  int64_t row = begin;
  for (; bytes <= kShortRow && row + Pass::kRows <= end; row += Pass::kRows) {
    sweep_some_rows<T, Pass::kRows>(pass, row, channels, stride);
  }
  for (; bytes <= kLongestShared && row + kLongRows <= end; row += kLongRows) {
    sweep_some_rows<T, kLongRows>(pass, row, channels, stride);
  }
  for (; row < end; ++row) sweep_some_rows<T, 1>(pass, row, channels, stride);
}

// `length` elements from offset `first` on, all of channel c. Independent accumulators hide the
// latency of an add.
template <typename T, typename Pass>
PREACT_INLINE void sweep_plane(const Pass& pass, int64_t first, int64_t length, int64_t c) {
  using P = VectorsOf<T>;
  auto regs = pass.template begin<P, WithinChannel>(c);
  auto second = regs, third = regs, fourth = regs;
  const int64_t end = first + length;
  int64_t i = first;
  for (; i + 4 * P::lanes <= end; i += 4 * P::lanes) {
    pass.template element<P>(regs, Offset{i, kAhead});
    pass.template element<P>(second, Offset{i + P::lanes, kAhead});
    pass.template element<P>(third, Offset{i + 2 * P::lanes, kAhead});
    pass.template element<P>(fourth, Offset{i + 3 * P::lanes, kAhead});
  }
  pass.join(third, fourth);
  for (; i + P::lanes <= end; i += P::lanes) pass.template element<P>(second, Offset{i, kAhead});
  if (i < end) pass.template element<P>(third, Rest{i, end - i});
  pass.join(regs, second);
  pass.join(regs, third);
  pass.template end<P, WithinChannel>(regs, c);
}

// A pass without sums over a part of the map: rows where channels_last, [image, channel] planes
// otherwise.
template <typename T, typename Pass>
PREACT_INLINE void sweep_map(const Pass& pass, const FeatureMap& map, int64_t begin, int64_t end) {
  if (map.channels_last) {
    sweep_rows<T>(pass, begin, end, map.channels, map.channels);
  } else {
    for (int64_t plane = begin; plane < end; ++plane) {
      sweep_plane<T>(pass, plane * map.spatial, map.spatial, plane % map.channels);
    }
  }
}

// Per-channel arrays as a sweep over a map of T reads them; copies only where that is not as they
// are. Absent arrays stay so.
template <typename T, int COUNT>
class ChannelArrays {
  using A = accumulate_t<T>;

 public:
  ChannelArrays(const FeatureMap& map, const A* const (&arrays)[COUNT]) {
    std::copy_n(arrays, COUNT, arrays_);
    if (!std::is_same_v<VectorsOf<T>, Pairs> || !map.channels_last) return;
    const int64_t size = lanes_for<VectorsOf<T>>(map.channels);
    copies_.resize(COUNT * size);
    for (int i = 0; i < COUNT; ++i) {
      if (arrays[i] == nullptr) continue;
      to_lanes<VectorsOf<T>>(arrays[i], map.channels, copies_.data() + i * size);
      arrays_[i] = copies_.data() + i * size;
    }
  }
  const A* operator[](int i) const { return arrays_[i]; }

 private:
  const A* arrays_[COUNT];
  std::vector<A> copies_;
};
