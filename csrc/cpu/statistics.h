// Running statistics of a chunk while its elements stream by. Included by kernels, per capability.
//
// Sums are taken of x - shift, with the mean so far as the shift: whatever the mean of the data,
// no cancellation exceeds what the total variance already contains. Only a chunk's first tile has
// no mean yet and is read twice, from the cache.

// Values per channel between two merges into double precision. The first tile is shorter, so that
// its second read comes from the cache and costs little; of a few values it is all: the mean of one
// or two of them as the shift would cost the variance some of its last digits.
constexpr int64_t kFirstShare = 16;  // of a tile
constexpr int64_t kFew = 32;

inline int64_t first_share(int64_t tile) {
  return std::min(tile, std::max(ceil_div(tile, kFirstShare), kFew));
}
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileElements = 8192;  // the same within one channel's planes

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
  template <typename P, typename At>
  static PREACT_INLINE void add(Regs<P>& regs, typename P::reg x, At at) {
    const auto d = present(x - regs.shift, at);
    regs.sum += d;
    regs.square = madd(d, d, regs.square);
  }
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>& regs, int64_t c) const {
    Get::template add<P>(sum, c, regs.sum);
    Get::template add<P>(square, c, regs.square);
  }
};

// Elements are read through Source: load<P>(at) yields those there, and may write them on the way.
template <typename T, typename Source>
struct StatisticsPass {
  using A = accumulate_t<T>;
  static constexpr int kRows = Source::kRows;
  Source source;
  ShiftedSums<A> sums;

  template <typename P, typename Get>
  PREACT_INLINE auto begin(int64_t c) const {
    return sums.template begin<P, Get>(c);
  }
  template <typename P, typename Regs, typename At>
  PREACT_INLINE void element(Regs& regs, At at) const {
    ShiftedSums<A>::template add<P>(regs, source.template load<P>(at), at);
  }
  template <typename Regs>
  PREACT_INLINE void join(Regs& regs, const Regs& other) const {
    regs.sum += other.sum;
    regs.square += other.square;
  }
  template <typename P, typename Get, typename Regs>
  PREACT_INLINE void end(const Regs& regs, int64_t c) const {
    sums.template end<P, Get>(regs, c);
  }
};

template <typename T>
struct InputSource {
  static constexpr int kRows = 8;
  const T* input;
  template <typename P, typename At>
  PREACT_INLINE typename P::reg load(At at) const {
    return load_at<P>(input, at);
  }
};

// Mean and m2 of `channels` channels over a chunk of elements, each of them read through `source`
// once, or, in the first tile, through `source` and then `again`. Rows of channels or planes of
// them, a chunk is of one kind.
template <typename T, typename Source, typename Again = Source>
class ChunkStatistics {
  using A = accumulate_t<T>;
  using P = VectorsOf<T>;

 public:
  ChunkStatistics(Source source, Again again, int64_t channels, int64_t stride, double* mean,
                  double* m2)
      : source_(source),
        again_(again),
        channels_(channels),
        stride_(stride),
        lanes_(lanes_for<P>(channels)),
        moments_(std::is_same_v<P, Pairs> ? 2 * lanes_ : 0),
        mean_(moments_.empty() ? mean : moments_.data()),
        m2_(moments_.empty() ? m2 : moments_.data() + lanes_),
        buffer_(3 * lanes_),
        sums_{buffer_.data(), buffer_.data() + lanes_, buffer_.data() + 2 * lanes_} {
    std::fill_n(mean_, lanes_, 0.0);
    std::fill_n(m2_, lanes_, 0.0);
  }

  // Rows [begin, end) of a [rows, channels] matrix, `stride` apart.
  void rows(int64_t begin, int64_t end) {
    for (int64_t row = begin, stop; row < end; row = stop) {
      const int64_t tile = std::min(end - row, kTileRows);
      stop = row + (count_ > 0 ? tile : first_share(tile));
      sweep_rows<T>(StatisticsPass<T, Source>{source_, sums_}, row, stop, channels_, stride_);
      if (count_ == 0) {
        shift_to_mean(stop - row);
        sweep_rows<T>(StatisticsPass<T, Again>{again_, sums_}, row, stop, channels_, stride_);
      }
      merge(stop - row);
    }
  }

  // Where channels were held in another order, this hands over the results.
  void finish(double* mean, double* m2) const {
    if (moments_.empty()) return;
    from_lanes<P>(mean_, channels_, mean);
    from_lanes<P>(m2_, channels_, m2);
  }

 private:
  void shift_to_mean(int64_t added) {
    for (int64_t c = 0; c < lanes_; ++c) {
      sums_.shift[c] = sums_.sum[c] / static_cast<A>(added);
      sums_.sum[c] = sums_.square[c] = 0;
    }
  }

  void merge(int64_t added) {
    const double inverse = 1.0 / static_cast<double>(added);
    const MomentsMerge join(count_, static_cast<double>(added));
    for (int64_t c = 0; c < lanes_; ++c) {
      const double offset = sums_.sum[c] * inverse;
      join(mean_[c], m2_[c], sums_.shift[c] + offset, sums_.square[c] - sums_.sum[c] * offset);
      sums_.shift[c] = static_cast<A>(mean_[c]);
      sums_.sum[c] = sums_.square[c] = 0;
    }
    count_ += static_cast<double>(added);
  }

  Source source_;
  Again again_;
  int64_t channels_, stride_;
  int64_t lanes_;  // of the per-channel arrays
  std::vector<double> moments_;
  double *mean_, *m2_;
  std::vector<A> buffer_;
  ShiftedSums<A> sums_;
  double count_ = 0;
};

// The same of `images` images, each of `channels` planes of `length` elements one after another,
// images `stride` apart. All planes of an image follow each other, whatever the tiles.
template <typename T, typename Source, typename Again>
void plane_statistics(Source source, Again again, int64_t first, int64_t images, int64_t stride,
                      int64_t channels, int64_t length, double* mean, double* m2) {
  using A = accumulate_t<T>;
  using V = Pack<A>;
  std::vector<A> buffer(channels * (1 + 2 * V::lanes));
  A* const sum = buffer.data() + channels;
  A* const square = sum + channels * V::lanes;
  const ShiftedSums<A> sums{buffer.data(), sum, square};
  const StatisticsPass<T, Source> pass{source, sums};
  const StatisticsPass<T, Again> second{again, sums};
  std::fill_n(mean, channels, 0.0);
  std::fill_n(m2, channels, 0.0);
  const int64_t group =
      std::max<int64_t>(kTileElements / std::max<int64_t>(length, 1), 1);  // images of a tile
  double count = 0;
  for (int64_t image = 0, stop; image < images; image = stop) {
    stop = std::min(image + group, images);
    for (int64_t from = 0, part; from < length; from += part) {
      part = std::min(length - from, kTileElements);
      const int64_t tile = part * (stop - image);
      const int64_t guess = count > 0 ? 0 : std::min(part, first_share(tile));
      for (int64_t i = image; i < stop; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = first + i * stride + c * length + from;
          if (i > image || guess == 0) {
            sweep_plane<T>(pass, at, part, c);
            continue;
          }
          sweep_plane<T>(pass, at, guess, c);
          A* const own = sum + c * V::lanes;
          buffer[c] = V::sum(V::load(own)) / static_cast<A>(guess);
          V::store(own, V::broadcast(0));
          V::store(square + c * V::lanes, V::broadcast(0));
          sweep_plane<T>(second, at, guess, c);
          if (guess < part) sweep_plane<T>(pass, at + guess, part - guess, c);
        }
      }
      const double inverse = 1.0 / static_cast<double>(tile);
      const MomentsMerge join(count, static_cast<double>(tile));
      for (int64_t c = 0; c < channels; ++c) {
        const double total = V::sum(V::load(sum + c * V::lanes)), offset = total * inverse;
        join(mean[c], m2[c], buffer[c] + offset,
             V::sum(V::load(square + c * V::lanes)) - total * offset);
        buffer[c] = static_cast<A>(mean[c]);
      }
      std::fill(buffer.begin() + channels, buffer.end(), A(0));
      count += static_cast<double>(tile);
    }
  }
}

// Tasks [begin, end) of a map: each all channels of a chunk of rows, or one channel of a chunk of
// images. A task's results stand at mean[task * width] and m2[task * width], width = its channels.
template <typename T, typename Source, typename Again>
void statistics_tasks(Source source, Again again, const FeatureMap& map, const Chunks& chunks,
                      int64_t begin, int64_t end, double* mean, double* m2) {
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t from = chunks.begin(map, task), to = chunks.end(map, task);
    if (map.channels_last) {
      next = task + 1;
      double* const own[] = {mean + task * map.channels, m2 + task * map.channels};
      ChunkStatistics<T, Source, Again> statistics(source, again, map.channels, map.channels,
                                                   own[0], own[1]);
      statistics.rows(from, to);
      statistics.finish(own[0], own[1]);
    } else {
      const int64_t channel = task % map.channels;
      next = std::min(task - channel + map.channels, end);
      plane_statistics<T>(source, again, (from * map.channels + channel) * map.spatial, to - from,
                          map.channels * map.spatial, next - task, map.spatial, mean + task,
                          m2 + task);
    }
  }
}
