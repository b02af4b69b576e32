#include "cpu/batch_norm_relu_kernel.h"

// Values per channel summed in the element's own accumulation type before they join the double sum.
constexpr int64_t kSumRows = 512;
constexpr int64_t kSumElements = 8192;  // the same within one channel's planes

// Sums of dz and dz * (x - mean).
template <typename T>
struct ReducePass {
  using A = accumulate_t<T>;
  static constexpr int kRows = 8;
  static constexpr bool kAgain = true;
  ChannelAffine<A> affine;
  const T* grad_output;
  const T* input;
  A* sum_dz;
  A* sum_dz_x;

  template <typename P>
  struct Regs {
    typename ChannelAffine<A>::template Regs<P> affine;
    typename P::reg dz, dz_x;
  };
  template <typename P, typename Get>
  PREACT_INLINE Regs<P> begin(int64_t c) const {
    return {affine.template get<P, Get>(c), P::broadcast(0), P::broadcast(0)};
  }
  template <typename P, typename At>
  PREACT_INLINE void element(Regs<P>& regs, At at) const {
    const auto centred = load_at<P>(input, at) - regs.affine.mean;
    const auto z = regs.affine.z(centred);
    const auto dz = present(where_active(z, load_at<P>(grad_output, at)), at);
    regs.dz += dz;
    regs.dz_x = madd(dz, centred, regs.dz_x);
  }
  template <typename Regs>
  PREACT_INLINE void join(Regs& regs, const Regs& other) const {
    regs.dz += other.dz;
    regs.dz_x += other.dz_x;
  }
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>& regs, int64_t c) const {
    Get::template add<P>(sum_dz, c, regs.dz);
    Get::template add<P>(sum_dz_x, c, regs.dz_x);
  }
};

// Chunks' rows, sums by tiles of kSumRows.
template <typename T>
void reduce_rows(ReducePass<T> pass, int64_t begin, int64_t end, int64_t channels, double* sum_dz,
                 double* sum_dz_x) {
  using P = VectorsOf<T>;
  const int64_t lanes = lanes_for<P>(channels);
  LineVector<accumulate_t<T>> sums(2 * lanes);
  LineVector<double> totals(2 * lanes);
  pass.sum_dz = sums.data();
  pass.sum_dz_x = sums.data() + lanes;
  for (int64_t row = begin; row < end; row += kSumRows) {
    sweep_rows<T>(pass, row, std::min(row + kSumRows, end), channels, channels);
    for (int64_t i = 0; i < 2 * lanes; ++i) {
      totals[i] += sums[i];
      sums[i] = 0;
    }
  }
  from_lanes<P>(totals.data(), channels, sum_dz);
  from_lanes<P>(totals.data() + lanes, channels, sum_dz_x);
}

// Of `images` images, `channels` planes each, from offset `first` on; planes follow each other as
// in plane_statistics.
template <typename T>
void reduce_planes(ReducePass<T> pass, int64_t first, int64_t images, int64_t stride,
                   int64_t channels, int64_t length, double* sum_dz, double* sum_dz_x) {
  using A = accumulate_t<T>;
  constexpr int kLanes = kFewLanes<A>;
  LineVector<A> sums(2 * channels * kLanes);
  pass.sum_dz = sums.data();
  pass.sum_dz_x = sums.data() + channels * kLanes;
  std::fill_n(sum_dz, channels, 0.0);
  std::fill_n(sum_dz_x, channels, 0.0);
  const int64_t group =
      std::max<int64_t>(kSumElements / std::max<int64_t>(length, 1), 1);  // images of a tile
  for (int64_t image = 0, stop; image < images; image = stop) {
    stop = std::min(image + group, images);
    for (int64_t from = 0, part; from < length; from += part) {
      part = std::min(length - from, kSumElements);
      for (int64_t i = image; i < stop; ++i) {
        for (int64_t c = 0; c < channels; ++c) {
          sweep_plane<T>(pass, first + i * stride + c * length + from, part, c);
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        sum_dz[c] += sum_of_few(pass.sum_dz + c * kLanes);
        sum_dz_x[c] += sum_of_few(pass.sum_dz_x + c * kLanes);
      }
      std::fill(sums.begin(), sums.end(), A(0));
    }
  }
}

// Tasks as in statistics_tasks; results at sum_dz[task * width] and sum_dz_x[task * width].
template <typename T>
void batch_norm_relu_backward_reduce_tasks(const T* grad_output, const T* input,
                                           const FeatureMap& map, const Chunks& chunks,
                                           const accumulate_t<T>* mean,
                                           const accumulate_t<T>* scale,
                                           const accumulate_t<T>* bias, int64_t begin, int64_t end,
                                           double* sum_dz, double* sum_dz_x) {
  const ChannelArrays<T, 3> of(map, {mean, scale, bias});
  for (int64_t task = begin, next; task < end; task = next) {
    const int64_t from = chunks.begin(map, task), to = chunks.end(map, task);
    if (map.channels_last) {
      next = task + 1;
      const ReducePass<T> pass{{of[0], of[1], of[2]}, grad_output, input, nullptr, nullptr};
      reduce_rows(pass, from, to, map.channels, sum_dz + task * map.channels,
                  sum_dz_x + task * map.channels);
    } else {
      const int64_t channel = task % map.channels;
      next = std::min(task - channel + map.channels, end);
      const ReducePass<T> pass{{of[0] + channel, of[1] + channel, of[2] + channel},
                               grad_output,
                               input,
                               nullptr,
                               nullptr};
      reduce_planes(pass, (from * map.channels + channel) * map.spatial, to - from,
                    map.channels * map.spatial, next - task, map.spatial, sum_dz + task,
                    sum_dz_x + task);
    }
  }
}
