// One pass over a part of a feature map. Included by foreach_capability.h like vec.h.
//
// A pass is a struct with inlined members, each for a holder P (Pairs, Pack or Single):
//   begin<P, Get>(c)    -> Regs<P>: the per-channel values of channel c (and those after it)
//   element<P>(regs, at)          : the work on P::lanes elements at an Offset, a Rest or a Tail
//   join(regs, other)             : what `other` accumulated is added to regs
//   end<P, Get>(regs, c)          : what was accumulated goes back to the per-channel arrays
// kRows, how many rows of channels share one load of the per-channel values: 8 where maps are read
// only, 4 where one is written; and kAgain, whether an element may be worked on twice: not where a
// map may be written that is read.
// Get says how a per-channel array is read: one value per lane, or one for all lanes.

// Of longer rows 4 share a load where maps are read only or are narrow, whose per-channel values
// take twice as many loads; others are walked one by one, as are longer ones up to kWideRow: at
// these distances lines of several rows and maps fall into few sets of the cache.
constexpr int64_t kShortRow = 512, kLongestShared = 2048;  // bytes; where maps are read only, 1024
constexpr int kLongRows = 4;

// Rows of so many bytes, twice as many where a map is written that is not narrow, are a page or
// more apart, which memory reads side by side, and their per-channel values crowd the first-level
// cache: half as many as of short rows share a load, and lines are asked for just ahead, as those
// of other rows would take their place. Measured on Zen 4 alone.
constexpr int64_t kWideRow = 4096, kWideAhead = kAhead / 4;  // bytes

// A chain of more additions into one float would round noticeably more than sums of sums do.
constexpr int64_t kChainRows = 32;

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
  // A few sums for each channel: adding them up can wait. Whole vectors of many channels would not
  // stay in the first-level cache from one image to the next, and short planes would wait for them.
  template <typename P, typename A>
  static PREACT_INLINE void add(A* sums, int64_t c, typename P::reg value) {
    auto total = few(P::folded(value));
    A* const own = sums + c * kFewLanes<A>;
    decltype(total) before;
    std::memcpy(&before, own, sizeof before);
    total += before;
    std::memcpy(own, &total, sizeof total);
  }
};

// Vectors side by side that keep what a pass holds in registers.
template <typename Pass, typename P>
constexpr int columns_of() {
  using Regs = decltype(std::declval<Pass>().template begin<P, AlongChannels>(0));
  constexpr int kEach = static_cast<int>(sizeof(Regs)) / PREACT_VECTOR_BYTES;
  // Of 16 registers too few are left where a result is rounded and written.
  constexpr int kHeld = PREACT_VECTOR_BYTES == 64 ? 24 : Pass::kRows > kLongRows ? 12 : 0;
  return kHeld >= 4 * kEach ? 4 : kHeld >= 2 * kEach ? 2 : 1;
}

// Columns vectors side by side, from channel c on, of the `rows` rows from offset `first` on; Rows
// of them at a time, each with sums of its own. Elements `ahead` are asked for.
template <typename P, int Rows, int Columns, typename Pass>
PREACT_INLINE void sweep_columns(const Pass& pass, int64_t first, int64_t rows, int64_t stride,
                                 int64_t ahead, int64_t c) {
  decltype(pass.template begin<P, AlongChannels>(c)) regs[Rows * Columns];
#pragma GCC unroll 4
  for (int i = 0; i < Rows * Columns; ++i) {
    regs[i] = pass.template begin<P, AlongChannels>(c + i % Columns * P::lanes);
  }
  int64_t at = first + c;
#pragma GCC unroll 4
  for (; rows >= Rows; rows -= Rows, at += Rows * stride) {
#pragma GCC unroll 4
    for (int i = 0; i < Rows * Columns; ++i) {
      const int64_t own = at + i / Columns * stride + i % Columns * P::lanes;
      pass.template element<P>(regs[i], Offset{own, own + ahead});
    }
  }
  for (; rows > 0; --rows, at += stride) {
#pragma GCC unroll 4
    for (int i = 0; i < Columns; ++i) {
      const int64_t own = at + i * P::lanes;
      pass.template element<P>(regs[i], Offset{own, own + ahead});
    }
  }
#pragma GCC unroll 4
  for (int i = Columns; i < Rows * Columns; ++i) pass.join(regs[i % Columns], regs[i]);
#pragma GCC unroll 4
  for (int i = 0; i < Columns; ++i) {
    pass.template end<P, AlongChannels>(regs[i], c + i * P::lanes);
  }
}

template <typename P, int Columns, typename Pass>
PREACT_INLINE void sweep_channels(const Pass& pass, int64_t first, int64_t rows, int64_t channels,
                                  int64_t stride, int64_t ahead, int64_t& c) {
  for (; c + Columns * P::lanes <= channels; c += Columns * P::lanes) {
    sweep_columns<P, 1, Columns>(pass, first, rows, stride, ahead, c);
  }
}

template <typename T, typename Pass>
PREACT_INLINE void sweep_some_rows(const Pass& pass, int64_t first, int64_t rows, int64_t channels,
                                   int64_t stride, int64_t ahead) {
  using P = VectorsOf<T>;
  // Where narrow elements are written, in the order that memory takes them best.
  constexpr bool kPlain = std::is_same_v<P, Pairs> && Pass::kRows <= kLongRows;
  constexpr int kColumns = kPlain ? 1 : columns_of<Pass, P>();
  int64_t c = 0;
  sweep_channels<P, kColumns>(pass, first, rows, channels, stride, ahead, c);
  if constexpr (kColumns > 1) sweep_channels<P, 1>(pass, first, rows, channels, stride, ahead, c);
  if constexpr (!std::is_same_v<P, Pairs>) {
    sweep_channels<Single<accumulate_t<T>>, 1>(pass, first, rows, channels, stride, ahead, c);
  } else if (c < channels) {
    auto regs = pass.template begin<P, AlongChannels>(c);
    for (int64_t row = 0; row < rows; ++row) {
      pass.template element<P>(regs, Rest{first + row * stride + c, channels - c});
    }
    pass.template end<P, AlongChannels>(regs, c);
  }
}

template <typename T>
constexpr int64_t ahead_of() {
  return kAhead / static_cast<int64_t>(sizeof(T));
}
// How far ahead lines are asked for: where nobody has to ask, those that are read just now, which
// costs next to nothing.
PREACT_INLINE int64_t asked(int64_t ahead) { return kFollowsStreams ? 0 : ahead; }
// Of several short rows at once, or planes that are written, where elements are narrow, no
// processor keeps up by itself, nor of columns.
template <typename P>
PREACT_INLINE int64_t asked_of_narrow(int64_t ahead) {
  return std::is_same_v<P, Pairs> ? ahead : asked(ahead);
}

// As sweep_rows_from, rows whose sums may be one chain of additions.
template <typename T, typename Pass>
PREACT_INLINE void sweep_chain(const Pass& pass, int64_t first, int64_t rows, int64_t channels,
                               int64_t stride) {
  using P = VectorsOf<T>;
  constexpr int kColumns = columns_of<Pass, P>();
  constexpr int64_t kAheadOf = ahead_of<T>(), kSize = sizeof(T);
  constexpr bool kReads = Pass::kRows > kLongRows;
  const int64_t bytes = channels * kSize;
  // Whole rows in registers, which sums leave at the end alone.
  const int64_t some_ahead = asked(kAhead / std::max<int64_t>(bytes, 1) * stride);
  if (channels == kColumns * P::lanes) {
    return sweep_columns<P, 1, kColumns>(pass, first, rows, stride, some_ahead, 0);
  }
  if constexpr (kColumns >= 2) {
    if (channels == P::lanes) {
      return sweep_columns<P, kColumns, 1>(pass, first, rows, stride, some_ahead, 0);
    }
  }
  if constexpr (kColumns == 4) {
    if (channels == 2 * P::lanes) {
      return sweep_columns<P, 2, 2>(pass, first, rows, stride, some_ahead, 0);
    }
  }
  // All rows of some columns, if these are four lines wide; of fewer, memory would not keep up.
  constexpr int64_t kSide = kColumns * P::lanes * kSize;
  if constexpr (kReads && kSide >= 256) {
    if (channels % P::lanes == 0 && stride * kSize <= kLongestShared) {
      return sweep_some_rows<T>(pass, first, rows, channels, stride, kAhead / kSide * stride);
    }
  }
  // Numbers of rows that the compiler knows.
  for (; bytes <= (kReads ? 2 * kShortRow : kShortRow) && rows >= Pass::kRows;
       rows -= Pass::kRows) {
    sweep_some_rows<T>(pass, first, Pass::kRows, channels, stride,
                       asked_of_narrow<P>(std::max(kAheadOf, Pass::kRows * stride)));
    first += Pass::kRows * stride;
  }
  constexpr int64_t kLongest = kReads || std::is_same_v<P, Pairs> ? kLongestShared : kShortRow;
  for (; bytes <= kLongest && rows >= kLongRows; rows -= kLongRows) {
    sweep_some_rows<T>(pass, first, kLongRows, channels, stride,
                       asked_of_narrow<P>(std::max(kAheadOf, kLongRows * stride)));
    first += kLongRows * stride;
  }
  constexpr int64_t kWide = kReads || std::is_same_v<P, Pairs> ? kWideRow : 2 * kWideRow;
  constexpr int kWideRows = Pass::kRows / 2;
  static_assert(kWideRows > 0);
  for (; bytes >= kWide && rows >= kWideRows; rows -= kWideRows) {
    sweep_some_rows<T>(pass, first, kWideRows, channels, stride, asked(kWideAhead / kSize));
    first += kWideRows * stride;
  }
  for (; rows > 0; --rows, first += stride) {
    sweep_some_rows<T>(pass, first, 1, channels, stride, asked(std::max(kAheadOf, stride)));
  }
}

// The `rows` rows from offset `first` on of a matrix whose rows are `stride` apart; per-channel
// arrays are as to_lanes makes them.
template <typename T, typename Pass>
PREACT_INLINE void sweep_rows_from(const Pass& pass, int64_t first, int64_t rows, int64_t channels,
                                   int64_t stride) {
  for (int64_t some; rows > 0; rows -= some, first += some * stride) {
    some = std::min(rows, kChainRows);
    sweep_chain<T>(pass, first, some, channels, stride);
  }
}

// Rows [begin, end) of a [rows, channels] matrix.
template <typename T, typename Pass>
PREACT_INLINE void sweep_rows(const Pass& pass, int64_t begin, int64_t end, int64_t channels,
                              int64_t stride) {
  sweep_rows_from<T>(pass, begin * stride, end - begin, channels, stride);
}

// `length` elements from offset `first` on, all of channel c. Independent accumulators hide the
// latency of an add; a short run has none to hide, others are worked on meanwhile.
template <typename T, typename Pass>
PREACT_INLINE void sweep_plane(const Pass& pass, int64_t first, int64_t length, int64_t c) {
  using P = VectorsOf<T>;
  constexpr int64_t kLong = 16 * P::lanes;
  constexpr bool kReads = Pass::kRows > kLongRows;
  const int64_t ahead = kReads ? asked(ahead_of<T>()) : asked_of_narrow<P>(ahead_of<T>());
  auto regs = pass.template begin<P, WithinChannel>(c);
  auto second = regs;
  const int64_t end = first + length;
  int64_t i = first;
  if (length >= kLong) {
    auto third = regs, fourth = regs;
    for (; i + 4 * P::lanes <= end; i += 4 * P::lanes) {
      pass.template element<P>(regs, Offset{i, i + ahead});
      pass.template element<P>(second, Offset{i + P::lanes, i + P::lanes + ahead});
      pass.template element<P>(third, Offset{i + 2 * P::lanes, i + 2 * P::lanes + ahead});
      pass.template element<P>(fourth, Offset{i + 3 * P::lanes, i + 3 * P::lanes + ahead});
    }
    pass.join(regs, third);
    pass.join(second, fourth);
  }
  for (; i + 2 * P::lanes <= end; i += 2 * P::lanes) {
    pass.template element<P>(regs, Offset{i, i + ahead});
    pass.template element<P>(second, Offset{i + P::lanes, i + P::lanes + ahead});
  }
  if (i + P::lanes <= end) {
    pass.template element<P>(regs, Offset{i, i + ahead});
    i += P::lanes;
  }
  if (i < end) {
    if (Pass::kAgain && length >= P::lanes) {
      pass.template element<P>(second, Tail{end - P::lanes, i - (end - P::lanes)});
    } else {
      pass.template element<P>(second, Rest{i, end - i});
    }
  }
  pass.join(regs, second);
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
  LineVector<A> copies_;
};
