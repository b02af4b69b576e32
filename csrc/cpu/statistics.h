// Running statistics of a chunk while its elements stream by. Included by kernels, per capability.
//
// Sums are taken of x - shift, with the mean so far as the shift: whatever the mean of the data,
// no cancellation exceeds what the total variance already contains. A chunk's first tile has no
// mean yet: a sample of its values, spread over it, is read before it.

// Values per channel between two merges into double precision.
constexpr int64_t kTileRows = 512;
constexpr int64_t kTileElements = 8192;  // the same within one channel's planes

// Of a few values all are the sample: the mean of some of them as the shift would cost the variance
// some of its last digits.
constexpr int64_t kFew = 32;
constexpr int64_t kSampleRows = 8;

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
  static constexpr bool kAgain = true;
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

// Mean and m2 of `channels` channels over chunks of rows, read through `source`.
template <typename T, typename Source>
class ChunkStatistics {
  using A = accumulate_t<T>;
  using P = VectorsOf<T>;

 public:
  ChunkStatistics(Source source, int64_t channels, int64_t stride)
      : pass_{source, {}},
        channels_(channels),
        stride_(stride),
        lanes_(lanes_for<P>(channels)),
        moments_(std::is_same_v<P, Pairs> ? 2 * lanes_ : 0),
        buffer_(3 * lanes_) {
    A* const buffer = buffer_.data();
    pass_.sums = {buffer, buffer + lanes_, buffer + 2 * lanes_};
  }

  // Begins a chunk, whose results are to stand in mean and m2 after finish.
  void start(double* mean, double* m2) {
    mean_ = moments_.empty() ? mean : moments_.data();
    m2_ = moments_.empty() ? m2 : moments_.data() + lanes_;
    std::fill_n(mean_, lanes_, 0.0);
    std::fill_n(m2_, lanes_, 0.0);
    std::fill(buffer_.begin(), buffer_.end(), A(0));
    count_ = 0;
  }

  // Rows [begin, end) of a [rows, channels] matrix, `stride` apart.
  void rows(int64_t begin, int64_t end) {
    const auto pass = pass_;  // what stands in a local variable is not read anew after each store
    for (int64_t row = begin, tile; row < end; row += tile) {
      tile = std::min(end - row, kTileRows);
      if (count_ == 0) sample(row, tile);
      sweep_rows<T>(pass, row, row + tile, channels_, stride_);
      merge(tile);
    }
  }

  // Where channels were held in another order, this hands over the results.
  void finish(double* mean, double* m2) const {
    if (moments_.empty()) return;
    from_lanes<P>(mean_, channels_, mean);
    from_lanes<P>(m2_, channels_, m2);
  }

 private:
  // An odd distance, so that the rows of an image do not all give the same pixel.
  void sample(int64_t row, int64_t tile) {
    const int64_t count = tile <= kFew ? tile : kSampleRows;
    const int64_t step = (tile / count - 1) | 1;
    const auto pass = pass_;
    sweep_rows_from<T>(pass, row * stride_, count, channels_, step * stride_);
    const ShiftedSums<A> sums = pass_.sums;
    for (int64_t c = 0; c < lanes_; ++c) {
      sums.shift[c] = sums.sum[c] / static_cast<A>(count);
      sums.sum[c] = sums.square[c] = 0;
    }
  }

  void merge(int64_t added) {
    const ShiftedSums<A> sums = pass_.sums;
    const double inverse = 1.0 / static_cast<double>(added);
    const MomentsMerge join(count_, static_cast<double>(added));
    for (int64_t c = 0; c < lanes_; ++c) {
      const double offset = sums.sum[c] * inverse;
      join(mean_[c], m2_[c], sums.shift[c] + offset, sums.square[c] - sums.sum[c] * offset);
      sums.shift[c] = static_cast<A>(mean_[c]);
      sums.sum[c] = sums.square[c] = 0;
    }
    count_ += static_cast<double>(added);
  }

  StatisticsPass<T, Source> pass_;
  int64_t channels_, stride_;
  int64_t lanes_;  // of the per-channel arrays
  LineVector<double> moments_;
  double *mean_ = nullptr, *m2_ = nullptr;
  LineVector<A> buffer_;
  double count_ = 0;
};

// The mean of a few vectors spread over `length` elements of one channel.
template <typename T, typename Source>
PREACT_INLINE accumulate_t<T> sampled_mean(const Source& source, int64_t first, int64_t length) {
  using A = accumulate_t<T>;
  using P = VectorsOf<T>;
  const bool few = length <= kFew;
  const int64_t step = few ? P::lanes : std::max<int64_t>((length - P::lanes) / 3, 1);
  auto total = P::broadcast(0);
  int64_t count = 0, i = few ? 0 : step;
  for (; i + P::lanes <= length; i += step, count += P::lanes) {
    total += source.template load<P>(Offset{first + i, first + i});
  }
  if (few && i < length) {
    total += source.template load<P>(Rest{first + i, length - i});
    count = length;
  }
  return Pack<A>::sum(P::folded(total)) / static_cast<A>(count);
}

// The same of `images` images, each of `channels` planes of `length` elements one after another,
// images `stride` apart. All planes of an image follow each other, whatever the tiles.
template <typename T, typename Source>
void plane_statistics(Source source, int64_t first, int64_t images, int64_t stride,
                      int64_t channels, int64_t length, double* mean, double* m2) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kFewLanes<A>;
  LineVector<A> buffer(channels * (1 + 2 * kLanes));
  A* const sum = buffer.data() + channels;
  A* const square = sum + channels * kLanes;
  const StatisticsPass<T, Source> pass{source, {buffer.data(), sum, square}};
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
      for (int64_t i = image; i < stop; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t at = first + i * stride + c * length + from;
          if (count == 0 && i == image) buffer[c] = sampled_mean<T>(source, at, part);
          sweep_plane<T>(pass, at, part, c);
        }
      }
      const double inverse = 1.0 / static_cast<double>(tile);
      const MomentsMerge join(count, static_cast<double>(tile));
      for (int64_t c = 0; c < channels; ++c) {
        const double total = sum_of_few(sum + c * kLanes), offset = total * inverse;
        join(mean[c], m2[c], buffer[c] + offset, sum_of_few(square + c * kLanes) - total * offset);
        buffer[c] = static_cast<A>(mean[c]);
      }
      std::fill(buffer.begin() + channels, buffer.end(), A(0));
      count += static_cast<double>(tile);
    }
  }
}

// Tasks [begin, end) of a map: each all channels of a chunk of rows, or one channel of a chunk of
// images. A task's results stand at mean[task * width] and m2[task * width], width = its channels.
template <typename T, typename Source>
void statistics_tasks(Source source, const FeatureMap& map, const Chunks& chunks, int64_t begin,
                      int64_t end, double* mean, double* m2) {
  if (map.channels_last) {
    ChunkStatistics<T, Source> statistics(source, map.channels, map.channels);
    for (int64_t task = begin; task < end; ++task) {
      double* const own[] = {mean + task * map.channels, m2 + task * map.channels};
      statistics.start(own[0], own[1]);
      statistics.rows(chunks.begin(map, task), chunks.end(map, task));
      statistics.finish(own[0], own[1]);
    }
    return;
  }
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t from = chunks.begin(map, task), to = chunks.end(map, task);
    const int64_t channel = task % map.channels;
    next = std::min(task - channel + map.channels, end);
    plane_statistics<T>(source, (from * map.channels + channel) * map.spatial, to - from,
                        map.channels * map.spatial, next - task, map.spatial, mean + task,
                        m2 + task);
  }
}
