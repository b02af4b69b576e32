// Running statistics of a chunk while its elements stream by. Included by kernels, per capability.
//
// Sums are taken of x - shift, with the mean so far as the shift: whatever the mean of the data,
// no cancellation exceeds what the total variance already contains. Only a chunk's first tile has
// no mean yet and is read twice, from the cache.

// Values per channel between two merges into double precision. The first tile is shorter, so that
// its second read comes from the cache.
constexpr int64_t kFirstTileRows = 64, kTileRows = 512;
constexpr int64_t kTileElements = 4096;  // the same within one channel's plane

template <typename A>
struct ShiftedSums {
  A* shift;
  A* sum;
  A* square;

  template <typename P>
  struct Regs {
    typename P::reg shift, sum, square;
  };
  template <typename P, typename Get>
  PREACT_INLINE Regs<P> begin(int64_t c) const {
    return {Get::template get<P>(shift, c), P::broadcast(0), P::broadcast(0)};
  }
  template <typename P>
  static PREACT_INLINE void add(Regs<P>& regs, typename P::reg x) {
    const auto d = x - regs.shift;
    regs.sum += d;
    regs.square = madd(d, d, regs.square);
  }
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>& regs, int64_t c) const {
    Get::template add<P>(sum, c, regs.sum);
    Get::template add<P>(square, c, regs.square);
  }
};

// Elements are read through Source: load<P>(i) yields element i, and may write it on the way.
template <typename T, typename Source>
struct StatisticsPass {
  using A = accumulate_t<T>;
  static constexpr int kMaps = Source::kMaps;
  Source source;
  ShiftedSums<A> sums;

  template <typename P, typename Get>
  PREACT_INLINE auto begin(int64_t c) const {
    return sums.template begin<P, Get>(c);
  }
  template <typename P, typename Regs>
  PREACT_INLINE void element(Regs& regs, int64_t i) const {
    ShiftedSums<A>::template add<P>(regs, source.template load<P>(i));
  }
  template <typename P, typename Get, typename Regs>
  PREACT_INLINE void end(const Regs& regs, int64_t c) const {
    sums.template end<P, Get>(regs, c);
  }
};

template <typename T>
struct InputSource {
  static constexpr int kMaps = 1;
  const T* input;
  template <typename P>
  PREACT_INLINE typename P::reg load(int64_t i) const {
    return P::load(input + i);
  }
};

// Mean and m2 of `channels` channels over a chunk of elements, each of them read through `source`
// once, or, in the first tile, through `source` and then `again`.
template <typename T, typename Source>
class ChunkStatistics {
  using A = accumulate_t<T>;

 public:
  ChunkStatistics(Source source, Source again, int64_t channels, int64_t stride, double* mean,
                  double* m2)
      : source_(source),
        again_(again),
        channels_(channels),
        stride_(stride),
        mean_(mean),
        m2_(m2),
        buffer_(3 * channels),
        sums_{buffer_.data(), buffer_.data() + channels, buffer_.data() + 2 * channels} {
    std::fill(mean, mean + channels, 0.0);
    std::fill(m2, m2 + channels, 0.0);
  }

  // Rows [begin, end) of a [rows, channels] matrix, `stride` apart.
  void rows(int64_t begin, int64_t end) {
    for (int64_t row = begin, stop; row < end; row = stop) {
      stop = std::min(row + (count_ == 0 ? kFirstTileRows : kTileRows), end);
      if (count_ == 0) {
        sweep_rows<A>(StatisticsPass<T, Source>{source_, sums_}, row, stop, channels_, stride_);
        shift_to_mean(stop - row);
        sweep_rows<A>(StatisticsPass<T, Source>{again_, sums_}, row, stop, channels_, stride_);
      } else {
        sweep_rows<A>(StatisticsPass<T, Source>{source_, sums_}, row, stop, channels_, stride_);
      }
      merge(stop - row);
    }
  }

  // Elements [begin, end) of the only channel; may be called for plane after plane.
  void plane(int64_t begin, int64_t end) {
    for (int64_t i = begin, stop; i < end; i = stop) {
      stop = std::min(i + kTileElements, end);
      if (count_ == 0) {
        sweep_channel<A>(StatisticsPass<T, Source>{source_, sums_}, i, stop, 0);
        shift_to_mean(stop - i);
        sweep_channel<A>(StatisticsPass<T, Source>{again_, sums_}, i, stop, 0);
      } else {
        sweep_channel<A>(StatisticsPass<T, Source>{source_, sums_}, i, stop, 0);
      }
      merge(stop - i);
    }
  }

 private:
  void shift_to_mean(int64_t added) {
    for (int64_t c = 0; c < channels_; ++c) {
      sums_.shift[c] = sums_.sum[c] / static_cast<A>(added);
      sums_.sum[c] = sums_.square[c] = 0;
    }
  }

  void merge(int64_t added) {
    const double inverse = 1.0 / static_cast<double>(added);
    const MomentsMerge join(count_, static_cast<double>(added));
    for (int64_t c = 0; c < channels_; ++c) {
      const double offset = sums_.sum[c] * inverse;
      join(mean_[c], m2_[c], sums_.shift[c] + offset, sums_.square[c] - sums_.sum[c] * offset);
      sums_.shift[c] = static_cast<A>(mean_[c]);
      sums_.sum[c] = sums_.square[c] = 0;
    }
    count_ += static_cast<double>(added);
  }

  Source source_, again_;
  int64_t channels_, stride_;
  double *mean_, *m2_;
  std::vector<A> buffer_;
  ShiftedSums<A> sums_;
  double count_ = 0;
};

// One task of a map: all channels of a chunk of rows, or one channel of a chunk of images. Its
// results stand at mean[task * width] and m2[task * width], width = the task's channels.
template <typename T, typename Source>
void statistics_task(Source source, Source again, const FeatureMap& map, const Chunks& chunks,
                     int64_t task, double* mean, double* m2) {
  const int64_t begin = chunks.begin(map, task), end = chunks.end(map, task);
  if (map.channels_last) {
    const int64_t first = task * map.channels;
    ChunkStatistics<T, Source>(source, again, map.channels, map.channels, mean + first, m2 + first)
        .rows(begin, end);
  } else {
    ChunkStatistics<T, Source> statistics(source, again, 1, 1, mean + task, m2 + task);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t plane = (n * map.channels + task % map.channels) * map.spatial;
      statistics.plane(plane, plane + map.spatial);
    }
  }
}
