#include "cpu/batch_norm_relu_kernel.h"

// Values per channel summed in the element's own accumulation type before they join the double sum.
constexpr int64_t kSumRows = 512;

// Sums of dz and dz * (x - mean).
template <typename T>
struct ReducePass {
  using A = accumulate_t<T>;
  static constexpr int kMaps = 2;
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
  template <typename P>
  PREACT_INLINE void element(Regs<P>& regs, int64_t i) const {
    const auto centred = P::load(input + i) - regs.affine.mean;
    const auto z = regs.affine.z(centred);
    const auto dz = where_active(z, P::load(grad_output + i));
    regs.dz += dz;
    regs.dz_x = madd(dz, centred, regs.dz_x);
  }
  template <typename P, typename Get>
  PREACT_INLINE void end(const Regs<P>& regs, int64_t c) const {
    Get::template add<P>(sum_dz, c, regs.dz);
    Get::template add<P>(sum_dz_x, c, regs.dz_x);
  }
};

// Tasks as in statistics_task; results at sum_dz[task * width] and sum_dz_x[task * width].
template <typename T>
void batch_norm_relu_backward_reduce_task(const T* grad_output, const T* input,
                                          const FeatureMap& map, const Chunks& chunks,
                                          const accumulate_t<T>* mean, const accumulate_t<T>* scale,
                                          const accumulate_t<T>* bias, int64_t task, double* sum_dz,
                                          double* sum_dz_x) {
  using A = accumulate_t<T>;
  const int64_t width = map.channels_last ? map.channels : 1;
  const int64_t channel = map.channels_last ? 0 : task % map.channels;
  std::vector<A> sums(2 * width);
  sum_dz += task * width;
  sum_dz_x += task * width;
  std::fill(sum_dz, sum_dz + width, 0.0);
  std::fill(sum_dz_x, sum_dz_x + width, 0.0);
  // A plane's pass addresses its one channel as channel 0.
  const ReducePass<T> pass{{mean + channel, scale + channel, bias + channel},
                           grad_output,
                           input,
                           sums.data(),
                           sums.data() + width};
  const int64_t stop = chunks.end(map, task);
  for (int64_t row = chunks.begin(map, task); row < stop;) {
    if (map.channels_last) {
      const int64_t next = std::min(row + kSumRows, stop);
      sweep_rows<A>(pass, row, next, width);
      row = next;
    } else {
      const int64_t plane = (row * map.channels + channel) * map.spatial;
      sweep_channel<A>(pass, plane, plane + map.spatial, 0);
      ++row;
    }
    for (int64_t c = 0; c < width; ++c) {
      sum_dz[c] += sums[c];
      sum_dz_x[c] += sums[width + c];
      sums[c] = sums[width + c] = 0;
    }
  }
}
