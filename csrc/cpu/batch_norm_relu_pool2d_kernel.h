#include "cpu/batch_norm_relu_kernel.h"

using cpu::PoolShape;

// Values per channel summed in the element's own accumulation type before they join the double sum.
constexpr int64_t kPoolSumPixels = 512;

// A byte for each lane of a vector.
using FloatBytes = uint8_t __attribute__((vector_size(PREACT_VECTOR_BYTES / 4)));
using DoubleBytes = uint8_t __attribute__((vector_size(PREACT_VECTOR_BYTES / 8)));

// Positions in a window as numbers of the type they are compared in. Bytes become words in two
// steps: compilers take one at a time lane by lane.
template <typename P>
struct Positions {
  using Words = int32_t __attribute__((vector_size(PREACT_VECTOR_BYTES)));

  static PREACT_INLINE typename P::reg load(const uint8_t* from) {
    if constexpr (std::is_same_v<typename P::reg, DoubleVector>) {
      DoubleBytes bytes;
      std::memcpy(&bytes, from, sizeof bytes);
      return __builtin_convertvector(bytes, DoubleVector);
    } else {
      FloatBytes bytes;
      std::memcpy(&bytes, from, sizeof bytes);
      const auto words =
          __builtin_convertvector(__builtin_convertvector(bytes, HalfwordVector), Words);
      return __builtin_convertvector(words, FloatVector);
    }
  }
  // `value` where the position is k, zero elsewhere.
  static PREACT_INLINE typename P::reg where(const uint8_t* from, int k, typename P::reg value) {
#if PREACT_VECTOR_BYTES == 64
    if constexpr (std::is_same_v<typename P::reg, FloatVector>) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      return _mm512_maskz_mov_ps(_mm_cmpeq_epi8_mask(bytes, _mm_set1_epi8(static_cast<char>(k))),
                                 value);
    }
#endif
    return load(from) == P::broadcast(k) ? value : typename P::reg{};
  }
  static PREACT_INLINE void store(uint8_t* to, typename P::reg value) {
    if constexpr (std::is_same_v<typename P::reg, DoubleVector>) {
      const DoubleBytes bytes = __builtin_convertvector(value, DoubleBytes);
      std::memcpy(to, &bytes, sizeof bytes);
    } else {
      const Words words = __builtin_convertvector(value, Words);
      const auto bytes =
          __builtin_convertvector(__builtin_convertvector(words, HalfwordVector), FloatBytes);
      std::memcpy(to, &bytes, sizeof bytes);
    }
  }
};
template <typename A>
struct Positions<Single<A>> {
  static PREACT_INLINE A where(const uint8_t* from, int k, A value) {
    return *from == k ? value : A(0);
  }
  static PREACT_INLINE void store(uint8_t* to, A value) { *to = static_cast<uint8_t>(value); }
};

// A pixel of a window, or a window that reads a pixel: where it lies in its map, and the pixel's
// position in the window.
struct PoolTap {
  int64_t offset;
  int position;
};

template <typename P, bool MAXIMUM, typename T, typename A>
PREACT_INLINE void pool_channels(const cpu::PoolForward<T, A>& task,
                                 const std::vector<PoolTap>& taps, int64_t output, int64_t& c) {
  const ChannelAffine<A> affine{task.mean, task.scale, task.bias};
  for (; c + P::lanes <= task.shape.channels; c += P::lanes) {
    const auto regs = affine.template get<P, AlongChannels>(c);
    auto best = P::broadcast(MAXIMUM ? -std::numeric_limits<A>::infinity() : A(0));
    auto position = P::broadcast(A(cpu::kNowhere));
    for (const PoolTap& tap : taps) {
      const auto z = regs.z(P::load(task.input + tap.offset + c) - regs.mean);
      if constexpr (MAXIMUM) {
        const auto larger = (z > best) | (z != z);
        best = larger ? z : best;
        position = larger ? P::broadcast(static_cast<A>(tap.position)) : position;
      } else {
        best += where_active(z, z);
      }
    }
    if constexpr (MAXIMUM) {
      P::store(task.output + output + c, where_active(best, best));
      Positions<P>::store(task.positions + output + c,
                          best <= typename P::reg{} ? P::broadcast(A(cpu::kNowhere)) : position);
    } else {
      P::store(task.output + output + c, best * P::broadcast(task.shape.template share<A>()));
    }
  }
}

// Rows [begin, end) of all images' results.
template <typename T>
void batch_norm_relu_pool2d_part(const cpu::PoolForward<T, accumulate_t<T>>& task, int64_t begin,
                                 int64_t end) {
  using A = accumulate_t<T>;
  const PoolShape& s = task.shape;
  std::vector<PoolTap> taps;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t image = row / s.out_h * s.in_h, top = row % s.out_h * s.stride_h - s.padding_h;
    for (int64_t ox = 0; ox < s.out_w; ++ox) {
      const int64_t left = ox * s.stride_w - s.padding_w;
      const int64_t x_end = std::min(left + s.kernel_w, s.in_w);
      taps.clear();
      for (int64_t y = std::max<int64_t>(top, 0); y < std::min(top + s.kernel_h, s.in_h); ++y) {
        for (int64_t x = std::max<int64_t>(left, 0); x < x_end; ++x) {
          taps.push_back({((image + y) * s.in_w + x) * s.channels,
                          static_cast<int>((y - top) * s.kernel_w + x - left)});
        }
      }
      const int64_t output = (row * s.out_w + ox) * s.channels;
      int64_t c = 0;
      if (task.positions) {
        pool_channels<Pack<A>, true>(task, taps, output, c);
        pool_channels<Single<A>, true>(task, taps, output, c);
      } else {
        pool_channels<Pack<A>, false>(task, taps, output, c);
        pool_channels<Single<A>, false>(task, taps, output, c);
      }
    }
  }
}

// One or two pixels side by side, which share one load of the per-channel values, and the windows
// that read each.
struct PoolRun {
  int64_t pixel;
  std::vector<PoolTap> readers[2];
};

// Sum of the gradients from the windows that read a pixel, at channels c and on.
template <typename P, bool MAXIMUM, int READERS, typename T, typename A>
PREACT_INLINE typename P::reg pooled_gradient(const cpu::PoolBackward<T, A>& task,
                                              const std::vector<PoolTap>& readers, int64_t c) {
  typename P::reg sum{};
  const size_t count = READERS ? READERS : readers.size();
  const PoolTap* const all = readers.data();
#pragma GCC unroll 4
  for (size_t i = 0; i < count; ++i) {
    const int64_t at = all[i].offset + c;
    const auto gradient = P::load(task.grad_output + at);
    sum += MAXIMUM ? Positions<P>::where(task.positions + at, all[i].position, gradient) : gradient;
  }
  return sum;
}

// One pixel, whose windows' gradients sum to dz before mask and mean: adds dz and dz * (x - mean)
// to `first` and `second`, or where APPLY writes the gradient of the input, of which they are slope
// and offset.
template <typename P, bool MAXIMUM, bool APPLY, typename T, typename Regs, typename R>
PREACT_INLINE void pool_backward_pixel(const Regs& regs, const T* input, T* grad_input, R share,
                                       R dz, R& first, R& second) {
  const auto centred = P::load(input) - regs.mean;
  if constexpr (!MAXIMUM) dz = where_active(regs.z(centred), dz * share);
  if constexpr (APPLY) {
    P::store(grad_input, madd(regs.scale, dz, madd(first, centred, second)));
  } else {
    first += dz;
    second = madd(dz, centred, second);
  }
}

// FIRST and SECOND windows read the two pixels; where they are 0 as many as there are, of one
// pixel.
template <typename P, bool MAXIMUM, bool APPLY, int FIRST, int SECOND, typename T, typename A>
PREACT_INLINE void pool_backward_channels(const cpu::PoolBackward<T, A>& task, const PoolRun& run,
                                          A* sum_dz, A* sum_dz_x, int64_t& c) {
  const int64_t channels = task.shape.channels;
  const ChannelAffine<A> affine{task.mean, task.scale, task.bias};
  const auto share = P::broadcast(task.shape.template share<A>());
  const T* const input = task.input + run.pixel * channels;
  T* const grad_input = task.grad_input + run.pixel * channels;
  for (; c + P::lanes <= channels; c += P::lanes) {
    const auto regs = affine.template get<P, AlongChannels>(c);
    auto first = P::load((APPLY ? task.slope : sum_dz) + c);
    auto second = P::load((APPLY ? task.offset : sum_dz_x) + c);
    pool_backward_pixel<P, MAXIMUM, APPLY>(
        regs, input + c, grad_input + c, share,
        pooled_gradient<P, MAXIMUM, FIRST>(task, run.readers[0], c), first, second);
    if constexpr (SECOND > 0) {
      pool_backward_pixel<P, MAXIMUM, APPLY>(
          regs, input + channels + c, grad_input + channels + c, share,
          pooled_gradient<P, MAXIMUM, SECOND>(task, run.readers[1], c), first, second);
    }
    if constexpr (!APPLY) {
      P::store(sum_dz + c, first);
      P::store(sum_dz_x + c, second);
    }
  }
}

template <bool MAXIMUM, bool APPLY, int FIRST, int SECOND, typename T, typename A>
void pool_backward_run(const cpu::PoolBackward<T, A>& task, const PoolRun& run, A* sum_dz,
                       A* sum_dz_x) {
  int64_t c = 0;
  pool_backward_channels<Pack<A>, MAXIMUM, APPLY, FIRST, SECOND>(task, run, sum_dz, sum_dz_x, c);
  pool_backward_channels<Single<A>, MAXIMUM, APPLY, FIRST, SECOND>(task, run, sum_dz, sum_dz_x, c);
}

// Windows [first, last) of one dimension that read position `at` of the padded map.
struct PoolReaders {
  int64_t first, last;

  static PoolReaders of(int64_t at, int64_t kernel, int64_t stride, int64_t windows) {
    return {at < kernel ? 0 : (at - kernel) / stride + 1, std::min(at / stride + 1, windows)};
  }
};

// Of pixel (y, x), y in the padded map; `image` counts rows of results before the image's own.
inline size_t find_readers(const PoolShape& s, int64_t image, int64_t y, const PoolReaders& rows,
                           int64_t x, const PoolReaders& columns, std::vector<PoolTap>& readers) {
  readers.clear();
  for (int64_t oy = rows.first; oy < rows.last; ++oy) {
    for (int64_t ox = columns.first; ox < columns.last; ++ox) {
      const int64_t left = ox * s.stride_w - s.padding_w;
      readers.push_back({((image + oy) * s.out_w + ox) * s.channels,
                         static_cast<int>((y - oy * s.stride_h) * s.kernel_w + x - left)});
    }
  }
  return readers.size();
}

template <bool MAXIMUM, bool APPLY, typename T, typename A>
void pool_backward_pixels(const cpu::PoolBackward<T, A>& task, int64_t begin, int64_t end,
                          A* sum_dz, A* sum_dz_x) {
  const PoolShape& s = task.shape;
  std::vector<PoolReaders> columns;
  for (int64_t x = 0; x < s.in_w; ++x) {
    columns.push_back(PoolReaders::of(x + s.padding_w, s.kernel_w, s.stride_w, s.out_w));
  }
  PoolRun run;
  for (int64_t pixel = begin; pixel < end;) {
    const int64_t row = pixel / s.in_w, image = row / s.in_h * s.out_h;
    const int64_t y = row % s.in_h + s.padding_h;
    const PoolReaders rows = PoolReaders::of(y, s.kernel_h, s.stride_h, s.out_h);
    for (int64_t x = pixel % s.in_w; x < s.in_w && pixel < end;) {
      run.pixel = pixel;
      const size_t first = find_readers(s, image, y, rows, x, columns[x], run.readers[0]);
      const bool pair = x + 1 < s.in_w && pixel + 1 < end;
      const size_t second =
          pair ? find_readers(s, image, y, rows, x + 1, columns[x + 1], run.readers[1]) : 0;
      // Two pixels as windows of 2 and of 3 with a stride of 2 read them, in each of their rows.
      auto run_of = &pool_backward_run<MAXIMUM, APPLY, 0, 0, T, A>;
      int64_t done = 2;
      if (first == 1 && second == 1) {
        run_of = &pool_backward_run<MAXIMUM, APPLY, 1, 1, T, A>;
      } else if (first == 1 && second == 2) {
        run_of = &pool_backward_run<MAXIMUM, APPLY, 1, 2, T, A>;
      } else if (first == 2 && second == 4) {
        run_of = &pool_backward_run<MAXIMUM, APPLY, 2, 4, T, A>;
      } else {
        done = 1;
      }
      run_of(task, run, sum_dz, sum_dz_x);
      x += done;
      pixel += done;
    }
  }
}

// Sums of dz and dz * (x - mean) over pixels [begin, end) of all images.
template <typename T>
void batch_norm_relu_pool2d_reduce(const cpu::PoolBackward<T, accumulate_t<T>>& task, int64_t begin,
                                   int64_t end, double* sum_dz, double* sum_dz_x) {
  using A = accumulate_t<T>;
  const int64_t channels = task.shape.channels;
  LineVector<A> sums(2 * channels);
  std::fill_n(sum_dz, channels, 0.0);
  std::fill_n(sum_dz_x, channels, 0.0);
  for (int64_t pixel = begin; pixel < end; pixel += kPoolSumPixels) {
    std::fill(sums.begin(), sums.end(), A(0));
    const int64_t last = std::min(pixel + kPoolSumPixels, end);
    (task.positions ? &pool_backward_pixels<true, false, T, A>
                    : &pool_backward_pixels<false, false, T, A>)(task, pixel, last, sums.data(),
                                                                 sums.data() + channels);
    for (int64_t c = 0; c < channels; ++c) {
      sum_dz[c] += sums[c];
      sum_dz_x[c] += sums[channels + c];
    }
  }
}

template <typename T>
void batch_norm_relu_pool2d_apply(const cpu::PoolBackward<T, accumulate_t<T>>& task, int64_t begin,
                                  int64_t end) {
  using A = accumulate_t<T>;
  (task.positions ? &pool_backward_pixels<true, true, T, A>
                  : &pool_backward_pixels<false, true, T, A>)(task, begin, end, nullptr, nullptr);
}
