// Register tiles of the direct convolutions. Included by kernels, per instruction set.
//
// A tile of PIXELS x VECTORS sums stays in registers while taps and input channels stream by: one
// broadcast value of the staged map times VECTORS vectors of weights. Vector v of a group of output
// channels stands (v * lanes) / 16 panels on and (v * lanes) % 16 floats in, in packed weights and
// staged maps alike.

#include "cpu/ahead.h"

using cpu::Gather;
using cpu::kBlock;
using cpu::Staged;

template <typename P>
constexpr int64_t lane_offset(int v, int64_t panel) {
  return v * P::lanes / kBlock * panel + v * P::lanes % kBlock;
}

// Where a group of output channels is written, [pixel * stride + lane].
template <typename T>
struct TileOutput {
  T* data;
  int64_t stride;
  int64_t lanes;      // channels that exist, of VECTORS * lanes
  const float* bias;  // [lanes], or null
  const T* residual;  // like data, or null
};

struct TileInput {
  const float* weights;
  int64_t panel;  // floats between panels of 16 output channels
  const int64_t* taps;
  int64_t tap_count, blocks, block_stride;
};

// Out of line, and at that once: it would be most of every tile's code.
template <typename T>
__attribute__((noinline)) void store_channels(const float* values, const TileOutput<T>& out,
                                              int64_t pixel) {
  using S = Single<float>;
  T* const to = out.data + pixel * out.stride;
  const T* const residual = out.residual ? out.residual + pixel * out.stride : nullptr;
  for (int64_t i = 0; i < out.lanes; ++i) {
    float value = values[i];
    if (out.bias) value += out.bias[i];
    S::store(to + i, residual ? value + S::load(residual + i) : value);
  }
}

template <int VECTORS, typename T>
PREACT_INLINE void store_pixel(const FloatVector* sums, const TileOutput<T>& out, int64_t pixel) {
  using P = Pack<float>;
  if (out.lanes == VECTORS * P::lanes) {
    T* const to = out.data + pixel * out.stride;
    const T* const residual = out.residual ? out.residual + pixel * out.stride : nullptr;
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      FloatVector value = sums[v];
      if (out.bias) value += P::load(out.bias + v * P::lanes);
      if (residual) value += P::load(residual + v * P::lanes);
      P::store(to + v * P::lanes, value);
    }
    return;
  }
  float values[VECTORS * P::lanes];
  for (int v = 0; v < VECTORS; ++v) P::store(values + v * P::lanes, sums[v]);
  store_channels(values, out, pixel);
}

template <int PIXELS, int VECTORS, int STEP, typename T>
__attribute__((noinline)) void direct_tile(const float* input, const TileInput& in,
                                           const TileOutput<T>& out, int64_t pixel, Ahead& ahead) {
  using P = Pack<float>;
  FloatVector sums[PIXELS][VECTORS];
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) sums[p][v] = FloatVector{};
  }
  const float* weights = in.weights;
  for (int64_t block = 0; block < in.blocks; ++block, input += in.block_stride) {
    for (int64_t t = 0; t < in.tap_count; ++t) {
      const float* const values = input + in.taps[t];
      Ahead::Lines lines = ahead.take(PIXELS * VECTORS * kBlock, kBlock);
#pragma GCC unroll 2
      for (int c = 0; c < kBlock; ++c, weights += kBlock) {
        lines.fetch();
        FloatVector factors[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v)
          factors[v] = P::load(weights + lane_offset<P>(v, in.panel));
#pragma GCC unroll 16
        for (int p = 0; p < PIXELS; ++p) {
          const FloatVector value = P::broadcast(values[p * STEP + c]);
#pragma GCC unroll 2
          for (int v = 0; v < VECTORS; ++v) sums[p][v] = madd(value, factors[v], sums[p][v]);
        }
      }
      ahead.fetch(lines);
    }
  }
  if (out.lanes == VECTORS * P::lanes && !out.bias && !out.residual) {
    T* to = out.data + pixel * out.stride;
#pragma GCC unroll 16
    for (int p = 0; p < PIXELS; ++p, to += out.stride) {
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) P::store(to + v * P::lanes, sums[p][v]);
    }
    return;
  }
#pragma GCC unroll 16
  for (int p = 0; p < PIXELS; ++p) store_pixel<VECTORS>(sums[p], out, pixel + p);
}

// Tile widths, widest first: what the registers hold. A width that divides the row comes before a
// wider one that leaves a remainder.
#if PREACT_VECTOR_BYTES == 64
template <int VECTORS>
PREACT_INLINE int tile_width(int64_t left) {
  constexpr int kWide = VECTORS == 2 ? 14 : 16;
  if (left % kWide == 0 || left >= 32) return kWide;
  if (left % 14 == 0) return 14;
  if (left % 8 == 0) return 8;
  if (left % 7 == 0) return 7;
  return left > kWide ? kWide : left > 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}
#define PREACT_TILE_WIDTHS(F) F(16) F(14) F(8) F(7) F(4) F(2) F(1)
constexpr int kMostSums = 28;  // of 32 registers
#else
template <int VECTORS>
PREACT_INLINE int tile_width(int64_t left) {
  constexpr int kWide = VECTORS == 2 ? 6 : 8;
  if (left % kWide == 0) return kWide;
  if (left % 4 == 0) return 4;
  return left > kWide ? kWide : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}
#define PREACT_TILE_WIDTHS(F) F(8) F(6) F(4) F(2) F(1)
constexpr int kMostSums = 12;  // of 16 registers
#endif

template <int VECTORS, int STEP, typename T>
PREACT_INLINE void direct_row(const float* input, const TileInput& in, const TileOutput<T>& out,
                              int64_t pixels, Ahead& ahead) {
  for (int64_t pixel = 0; pixel < pixels;) {
    const int width = tile_width<VECTORS>(pixels - pixel);
    switch (width) {
#define PREACT_TILE(WIDTH)                                                            \
  case WIDTH:                                                                         \
    if constexpr (WIDTH * VECTORS <= kMostSums) {                                     \
      direct_tile<WIDTH, VECTORS, STEP>(input + pixel * STEP, in, out, pixel, ahead); \
    }                                                                                 \
    break;
      PREACT_TILE_WIDTHS(PREACT_TILE)
#undef PREACT_TILE
    }
    pixel += width;
  }
}

#undef PREACT_TILE_WIDTHS

// Multiplications of vectors that direct_map takes for these, and the gradient of the weight too.
inline int64_t direct_work(const Gather& gather, int64_t columns, int64_t in_channels,
                           int64_t channels) {
  constexpr int64_t kLanes = Pack<float>::lanes;
  return gather.rows * columns * static_cast<int64_t>(gather.taps.size()) *
         cpu::blocks_of(in_channels) * kBlock * ((channels + kLanes - 1) / kLanes);
}

// All outputs of a gather, columns limited to `columns`: [row][column][channels] from `output` on,
// `width` columns in a row of the map, `stride` elements between them. `residual` is like output,
// bias [channels]; both may be null.
template <int STEP, typename T>
void direct_map(const Gather& gather, int64_t columns, const float* staged, const Staged& layout,
                const float* weights, int64_t channels, int64_t width, int64_t stride,
                const float* bias, const T* residual, T* output, Ahead& ahead) {
  constexpr int64_t kLanes = Pack<float>::lanes;
  const auto taps = static_cast<int64_t>(gather.taps.size());
  const int64_t blocks = cpu::blocks_of(layout.channels);
  const int64_t panel = blocks * taps * kBlock * kBlock;
  for (int64_t c = 0; c < channels;) {
    const bool pair = channels - c > kLanes;
    const TileInput in{weights + c / kBlock * panel + c % kBlock,
                       panel,
                       gather.taps.data(),
                       taps,
                       blocks,
                       layout.block_stride()};
    const int64_t group = pair ? 2 * kLanes : kLanes;
    const int64_t lanes = std::min(group, channels - c);
    for (int64_t y = 0; y < gather.rows; ++y) {
      const int64_t offset =
          ((gather.first_y + y * gather.step_y) * width + gather.first_x) * stride + c;
      const float* const row = staged + y * gather.input_step_y * layout.columns * kBlock;
      const TileOutput<T> out{output + offset, gather.step_x * stride, lanes,
                              bias ? bias + c : nullptr, residual ? residual + offset : nullptr};
      if (pair) {
        direct_row<2, STEP>(row, in, out, columns, ahead);
      } else {
        direct_row<1, STEP>(row, in, out, columns, ahead);
      }
    }
    c += group;
  }
}

// Adds grad * input over `rows` x `columns` outputs to sums [INPUTS input channels][16], or where
// `fresh` writes it there, VECTORS vectors of output channels at a time. They are summed by
// themselves first: one running sum over all pixels would round worse than the library's.
template <int INPUTS, int VECTORS, int STEP>
__attribute__((noinline)) void direct_weight_tile(const float* input, int64_t input_row,
                                                  const float* grad, int64_t grad_row,
                                                  int64_t grad_block, int64_t rows, int64_t columns,
                                                  bool fresh, float* sums, int64_t panel,
                                                  Ahead& ahead) {
  using P = Pack<float>;
  Ahead::Lines lines = ahead.take(INPUTS * VECTORS * rows * columns, rows * columns);
  FloatVector tile[INPUTS][VECTORS];
#pragma GCC unroll 16
  for (int c = 0; c < INPUTS; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) tile[c][v] = FloatVector{};
  }
  for (int64_t y = 0; y < rows; ++y, input += input_row, grad += grad_row) {
    const float* values = input;
    const float* g = grad;
    for (int64_t x = 0; x < columns; ++x, values += STEP, g += kBlock) {
      lines.fetch();
      FloatVector factors[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) factors[v] = P::load(g + lane_offset<P>(v, grad_block));
#pragma GCC unroll 16
      for (int c = 0; c < INPUTS; ++c) {
        const FloatVector value = P::broadcast(values[c]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) tile[c][v] = madd(value, factors[v], tile[c][v]);
      }
    }
  }
  ahead.fetch(lines);
#pragma GCC unroll 16
  for (int c = 0; c < INPUTS; ++c) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) {
      float* const sum = sums + c * kBlock + lane_offset<P>(v, panel);
      P::store(sum, fresh ? tile[c][v] : P::load(sum) + tile[c][v]);
    }
  }
}

template <int VECTORS, int STEP>
PREACT_INLINE void direct_weight_block(const float* input, int64_t input_row, const float* grad,
                                       int64_t grad_row, int64_t grad_block, int64_t rows,
                                       int64_t columns, bool fresh, float* sums, int64_t panel,
                                       Ahead& ahead) {
  constexpr int kInputs = PREACT_VECTOR_BYTES == 64 ? (VECTORS == 2 ? 8 : 16) : 4;
#pragma GCC unroll 1
  for (int c = 0; c < kBlock; c += kInputs) {
    direct_weight_tile<kInputs, VECTORS, STEP>(input + c, input_row, grad, grad_row, grad_block,
                                               rows, columns, fresh, sums + c * kBlock, panel,
                                               ahead);
  }
}

// Adds the weight gradient of one image to sums, packed as the weights are, or where `fresh` writes
// it there. Bands of rows that fill half of the first-level cache are read again for every tap and
// channel group.
template <int STEP>
void direct_weight_gradient(const Gather& gather, int64_t columns, const float* input,
                            const Staged& input_layout, const float* grad,
                            const Staged& grad_layout, bool fresh, float* sums, Ahead& ahead) {
  constexpr int64_t kLanes = Pack<float>::lanes, kSize = sizeof(float);
  const auto taps = static_cast<int64_t>(gather.taps.size());
  const int64_t in_blocks = cpu::blocks_of(input_layout.channels);
  const int64_t panel = in_blocks * taps * kBlock * kBlock;
  const int64_t input_row = gather.input_step_y * input_layout.columns * kBlock;
  const int64_t grad_row = grad_layout.columns * kBlock;
  const int64_t band =
      std::max<int64_t>(cpu::caches().first / 2 / kSize / (input_row + 2 * grad_row), 1);
  for (int64_t y = 0; y < gather.rows; y += band) {
    const int64_t rows = std::min(band, gather.rows - y);
    for (int64_t o = 0; o < grad_layout.channels;) {
      const bool pair = grad_layout.channels - o > kLanes;
      const float* g = grad + o / kBlock * grad_layout.block_stride() + o % kBlock +
                       grad_layout.origin() + y * grad_row;
      float* group = sums + o / kBlock * panel + o % kBlock;
      for (int64_t b = 0; b < in_blocks; ++b) {
        for (int64_t t = 0; t < taps; ++t, group += kBlock * kBlock) {
          const float* values =
              input + b * input_layout.block_stride() + y * input_row + gather.taps[t];
          if (pair) {
            direct_weight_block<2, STEP>(values, input_row, g, grad_row, grad_layout.block_stride(),
                                         rows, columns, fresh && y == 0, group, panel, ahead);
          } else {
            direct_weight_block<1, STEP>(values, input_row, g, grad_row, grad_layout.block_stride(),
                                         rows, columns, fresh && y == 0, group, panel, ahead);
          }
        }
      }
      o += pair ? 2 * kLanes : kLanes;
    }
  }
}

// PIXELS pixels of a map, the first at offset `from`, into a staged one. All are read before one is
// written, so that they share their per-channel values.
template <int PIXELS, typename Source>
PREACT_INLINE void stage_pixels(const Source& source, int64_t from, int64_t stride,
                                int64_t channels, int64_t block_stride, float* to) {
  using P = Pack<float>;
  using S = Single<float>;
  const auto vector = [&]<typename V>(V, int64_t c, float* place) {
    typename V::reg values[PIXELS];
#pragma GCC unroll 4
    for (int p = 0; p < PIXELS; ++p) {
      values[p] =
          rounded<V, typename Source::Element>(source.template value<V>(from + p * stride + c, c));
    }
#pragma GCC unroll 4
    for (int p = 0; p < PIXELS; ++p) {
      V::store(place + p * kBlock, values[p]);
      source.template keep<V>(from + p * stride + c, values[p]);
    }
  };
  int64_t c = 0;
  for (; c + kBlock <= channels; c += kBlock, to += block_stride) {
#pragma GCC unroll 4
    for (int64_t lane = 0; lane < kBlock; lane += P::lanes) vector(P{}, c + lane, to + lane);
  }
  for (; c + P::lanes <= channels; c += P::lanes, to += P::lanes) vector(P{}, c, to);
  for (; c < channels; ++c, ++to) vector(S{}, c, to);
}

// Writes a map [height][width][channels], `stride` elements between pixels, into a staged one, each
// value as Source gives it: value<P>(i, c) for the elements from offset i on, channels from c on,
// rounded to Source::Element as it would be in a map of its own, and then keep<P>(i, value).
template <typename Source>
void stage(const Source source, int64_t height, int64_t width, int64_t stride, const Staged& layout,
           float* staged) {
  constexpr int kTogether = 4;
  const int64_t channels = layout.channels, block_stride = layout.block_stride();
  for (int64_t y = 0; y < height; ++y) {
    float* const row = staged + layout.origin() + y * layout.columns * kBlock;
    int64_t x = 0;
    for (; x + kTogether <= width; x += kTogether) {
      stage_pixels<kTogether>(source, (y * width + x) * stride, stride, channels, block_stride,
                              row + x * kBlock);
    }
    for (; x < width; ++x) {
      stage_pixels<1>(source, (y * width + x) * stride, stride, channels, block_stride,
                      row + x * kBlock);
    }
  }
}

// relu((x - mean) * scale + bias)
template <typename T>
struct ActivationSource {
  using Element = T;
  ChannelAffine<float> affine;
  const T* input;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t c) const {
    const auto regs = affine.template get<P, AlongChannels>(c);
    const auto z = regs.z(P::load(input + i) - regs.mean);
    return where_active(z, z);
  }
  template <typename P>
  PREACT_INLINE void keep(int64_t, typename P::reg) const {}
};
