// Winograd's transforms around the register tiles of conv2d_tile.h. Included by kernels, per
// instruction set.

using cpu::kPositions;
using cpu::WinogradTiles;

// The four values of B^T d of one column of a staged map.
struct WinogradColumn {
  FloatVector rows[4];

  static PREACT_INLINE WinogradColumn of(const float* top, int64_t row) {
    using P = Pack<float>;
    const FloatVector a = P::load(top), b = P::load(top + row);
    const FloatVector c = P::load(top + 2 * row), d = P::load(top + 3 * row);
    return {{a - c, b + c, c - b, b - d}};
  }
};

// B^T d B of `rows` rows of tiles, whose first one's first value is at `input`.
inline __attribute__((noinline)) void winograd_input(const float* input, const Staged& layout,
                                                     int64_t rows, int64_t columns, float* to) {
  using P = Pack<float>;
  const int64_t row = layout.columns * kBlock, tiles = rows * columns;
  const int64_t position = cpu::position_stride(tiles, layout.channels);
  for (int64_t block = 0; block < cpu::blocks_of(layout.channels); ++block) {
    for (int64_t lane = 0; lane < kBlock; lane += P::lanes) {
      for (int64_t y = 0; y < rows; ++y) {
        const float* from = input + block * layout.block_stride() + 2 * y * row + lane;
        float* tile = to + (block * tiles + y * columns) * kBlock + lane;
        WinogradColumn a = WinogradColumn::of(from, row);
        WinogradColumn b = WinogradColumn::of(from + kBlock, row);
        for (int64_t x = 0; x < columns; ++x, tile += kBlock) {
          from += 2 * kBlock;
          const WinogradColumn c = WinogradColumn::of(from, row);
          const WinogradColumn d = WinogradColumn::of(from + kBlock, row);
          float* place = tile;
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i, place += 4 * position) {
            P::store(place, a.rows[i] - c.rows[i]);
            P::store(place + position, b.rows[i] + c.rows[i]);
            P::store(place + 2 * position, c.rows[i] - b.rows[i]);
            P::store(place + 3 * position, b.rows[i] - d.rows[i]);
          }
          a = c;
          b = d;
        }
      }
    }
  }
}

// A g A^T of `rows` rows of tiles of two by two gradients.
inline __attribute__((noinline)) void winograd_grad_output(const float* grad, const Staged& layout,
                                                           int64_t rows, int64_t columns,
                                                           float* to) {
  using P = Pack<float>;
  const int64_t row = layout.columns * kBlock, tiles = rows * columns;
  const int64_t position = cpu::position_stride(tiles, layout.channels);
  for (int64_t block = 0; block < cpu::blocks_of(layout.channels); ++block) {
    for (int64_t lane = 0; lane < kBlock; lane += P::lanes) {
      for (int64_t y = 0; y < rows; ++y) {
        const float* from = grad + block * layout.block_stride() + 2 * y * row + lane;
        float* tile = to + (block * tiles + y * columns) * kBlock + lane;
        for (int64_t x = 0; x < columns; ++x, tile += kBlock, from += 2 * kBlock) {
          const FloatVector a = P::load(from), b = P::load(from + row);
          const FloatVector c = P::load(from + kBlock), d = P::load(from + kBlock + row);
          const FloatVector left[4] = {a, a + b, a - b, -b}, right[4] = {c, c + d, c - d, -d};
          float* place = tile;
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i, place += 4 * position) {
            P::store(place, left[i]);
            P::store(place + position, left[i] + right[i]);
            P::store(place + 2 * position, left[i] - right[i]);
            P::store(place + 3 * position, -right[i]);
          }
        }
      }
    }
  }
}

// Multiplications of vectors that winograd_map takes for these, and the gradient of the weight too.
inline int64_t winograd_work(const WinogradTiles& map, int64_t in_channels, int64_t channels) {
  constexpr int64_t kLanes = Pack<float>::lanes;
  return kPositions * map.rows * map.columns * cpu::blocks_of(in_channels) * kBlock *
         ((channels + kLanes - 1) / kLanes);
}

// The products of every position: [position][tile][channels padded to whole blocks].
inline void winograd_products(const float* transformed, int64_t tiles, int64_t in_channels,
                              const float* weights, int64_t channels, float* sums, Ahead& ahead) {
  constexpr int64_t kLanes = Pack<float>::lanes;
  static constexpr int64_t kNoTap[] = {0};
  const int64_t blocks = cpu::blocks_of(in_channels), width = cpu::blocks_of(channels) * kBlock;
  const int64_t panel = blocks * kBlock * kBlock;
  for (int64_t p = 0; p < kPositions; ++p) {
    const float* const input = transformed + p * cpu::position_stride(tiles, in_channels);
    float* const output = sums + p * cpu::position_stride(tiles, channels);
    const float* const position_weights = weights + p * blocks * kBlock * width;
    for (int64_t c = 0; c < channels;) {
      const bool pair = channels - c > kLanes;
      const int64_t group = pair ? 2 * kLanes : kLanes;
      const TileInput in{position_weights + c / kBlock * panel + c % kBlock,
                         panel,
                         kNoTap,
                         1,
                         blocks,
                         tiles * kBlock};
      const TileOutput<float> out{output + c, width, group, nullptr, nullptr};
      if (pair) {
        direct_row<2, kBlock>(input, in, out, tiles, ahead);
      } else {
        direct_row<1, kBlock>(input, in, out, tiles, ahead);
      }
      c += group;
    }
  }
}

// A^T m A of `rows` rows of tiles from row `first` on, written like the outputs of direct_map.
template <typename T>
__attribute__((noinline)) void winograd_output(const float* sums, const WinogradTiles& map,
                                               int64_t first, int64_t rows, int64_t channels,
                                               int64_t stride, const float* bias, const T* residual,
                                               T* output) {
  using P = Pack<float>;
  const int64_t tiles = rows * map.columns, width = cpu::blocks_of(channels) * kBlock;
  const int64_t position = cpu::position_stride(tiles, channels);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t y = 2 * (first + tile / map.columns), x = 2 * (tile % map.columns);
    const int64_t pixel = y * map.width + x;
    for (int64_t c = 0; c < channels; c += P::lanes) {
      const float* from = sums + tile * width + c;
      FloatVector left[4], right[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, from += 4 * position) {
        const FloatVector a = P::load(from), b = P::load(from + position);
        const FloatVector d = P::load(from + 2 * position), e = P::load(from + 3 * position);
        left[i] = a + b + d;
        right[i] = b - d - e;
      }
      const TileOutput<T> out{output + c, stride, std::min<int64_t>(P::lanes, channels - c),
                              bias ? bias + c : nullptr, residual ? residual + c : nullptr};
      const FloatVector upper[2] = {left[0] + left[1] + left[2], right[0] + right[1] + right[2]};
      const FloatVector lower[2] = {left[1] - left[2] - left[3], right[1] - right[2] - right[3]};
      store_pixel<1>(&upper[0], out, pixel);
      if (x + 1 < map.width) store_pixel<1>(&upper[1], out, pixel + 1);
      if (y + 1 < map.height) {
        store_pixel<1>(&lower[0], out, pixel + map.width);
        if (x + 1 < map.width) store_pixel<1>(&lower[1], out, pixel + map.width + 1);
      }
    }
  }
}

// All outputs of a map, [row][column][channels], `stride` elements between pixels. `residual` is
// like output, bias [channels]; both may be null.
template <typename T>
void winograd_map(const WinogradTiles& map, const float* staged, const Staged& layout,
                  const float* weights, int64_t channels, int64_t stride, const float* bias,
                  const T* residual, T* output, Ahead& ahead) {
  const int64_t most = map.at_once();
  float* const transformed = cpu::scratch(cpu::Slot::transformed,
                                          kPositions * cpu::position_stride(most, layout.channels));
  float* const sums =
      cpu::scratch(cpu::Slot::products, kPositions * cpu::position_stride(most, channels));
  for (int64_t row = 0; row < map.rows; row += map.rows_at_once()) {
    const int64_t rows = std::min(map.rows_at_once(), map.rows - row);
    winograd_input(staged + 2 * row * layout.columns * kBlock, layout, rows, map.columns,
                   transformed);
    winograd_products(transformed, rows * map.columns, layout.channels, weights, channels, sums,
                      ahead);
    winograd_output(sums, map, row, rows, channels, stride, bias, residual, output);
  }
}

// Adds the gradient of the transformed weights of one image to sums, or where `fresh` writes it
// there.
inline void winograd_weight_gradient(const WinogradTiles& map, const float* input,
                                     const Staged& input_layout, const float* grad,
                                     const Staged& grad_layout, bool fresh, float* sums,
                                     Ahead& ahead) {
  constexpr int64_t kLanes = Pack<float>::lanes;
  const int64_t most = map.at_once();
  const int64_t in_blocks = cpu::blocks_of(input_layout.channels);
  const int64_t panel = in_blocks * kBlock * kBlock;
  const int64_t all = cpu::blocks_of(grad_layout.channels) * panel;
  float* const transformed = cpu::scratch(
      cpu::Slot::transformed, kPositions * cpu::position_stride(most, input_layout.channels));
  float* const transformed_grad = cpu::scratch(
      cpu::Slot::products, kPositions * cpu::position_stride(most, grad_layout.channels));
  for (int64_t row = 0; row < map.rows; row += map.rows_at_once()) {
    const int64_t rows = std::min(map.rows_at_once(), map.rows - row);
    const int64_t tiles = rows * map.columns, block = tiles * kBlock;
    winograd_input(input + 2 * row * input_layout.columns * kBlock, input_layout, rows, map.columns,
                   transformed);
    winograd_grad_output(grad + grad_layout.origin() + 2 * row * grad_layout.columns * kBlock,
                         grad_layout, rows, map.columns, transformed_grad);
    for (int64_t p = 0; p < kPositions; ++p) {
      const float* values = transformed + p * cpu::position_stride(tiles, input_layout.channels);
      const float* const grads =
          transformed_grad + p * cpu::position_stride(tiles, grad_layout.channels);
      for (int64_t b = 0; b < in_blocks; ++b, values += block) {
        for (int64_t o = 0; o < grad_layout.channels;) {
          const bool pair = grad_layout.channels - o > kLanes;
          const float* const g = grads + o / kBlock * block + o % kBlock;
          float* const group =
              sums + p * all + o / kBlock * panel + b * kBlock * kBlock + o % kBlock;
          if (pair) {
            direct_weight_block<2, kBlock>(values, 0, g, 0, block, 1, tiles, fresh && row == 0,
                                           group, panel, ahead);
          } else {
            direct_weight_block<1, kBlock>(values, 0, g, 0, block, 1, tiles, fresh && row == 0,
                                           group, panel, ahead);
          }
          o += pair ? 2 * kLanes : kLanes;
        }
      }
    }
  }
}
