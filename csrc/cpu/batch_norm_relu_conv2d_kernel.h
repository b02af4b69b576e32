#include "cpu/batch_norm_relu_kernel.h"
#include "cpu/conv2d_tile.h"
#include "cpu/conv2d_winograd_tile.h"
#include "cpu/statistics.h"

// Zeros in the rows of a staged map that a band at the edge of its image has no input for.
inline void clear_rows_around(const cpu::BlockRows& in, const cpu::Staged& layout, float* staged) {
  const int64_t row = layout.columns * kBlock, end = in.staged + in.count;
  for (int64_t block = 0; block < cpu::blocks_of(layout.channels); ++block) {
    float* const map = staged + block * layout.block_stride();
    std::fill_n(map, in.staged * row, 0.0f);
    std::fill(map + end * row, map + layout.block_stride(), 0.0f);
  }
}

// Blocks [begin, end): normalised into the staged map, convolved, and the statistics of each result
// taken while it is in the cache, into mean and m2 [O].
template <typename T>
void batch_norm_relu_conv2d_part(const cpu::DirectForward<T>& task, int64_t begin, int64_t end,
                                 double* mean, double* m2) {
  const Conv2dShape& shape = task.blocks.shape;
  float* const staged = cpu::staging(cpu::Slot::input, task.staged);
  const auto map = shape.stride_w == 1 ? &direct_map<kBlock, T> : &direct_map<2 * kBlock, T>;
  const InputSource<T> result{task.output};
  ChunkStatistics<T, InputSource<T>> statistics(result, shape.out_channels, task.output_stride);
  statistics.start(mean, m2);
  const auto input_from = [&](int64_t row) {
    return task.input + row * shape.in_w * task.input_stride;
  };
  cpu::Gather gather = task.gather;
  for (int64_t block = begin; block < end; ++block) {
    const cpu::BlockRows in = task.blocks.input_rows(block, task.staged);
    cpu::Staged placed = task.staged;
    placed.top = in.staged;
    if (task.blocks.bands > 1) clear_rows_around(in, task.staged, staged);
    stage(ActivationSource<T>{{task.norm.mean, task.norm.scale, task.norm.shift},
                              input_from(in.first)},
          in.count, task.blocks.columns(block, shape.in_w), task.input_stride, placed, staged);
    const int64_t columns = task.blocks.columns(block, shape.out_w);
    const int64_t row = task.blocks.first_row(block) * shape.out_w;
    const int64_t offset = row * task.output_stride;
    const T* const residual = task.residual ? task.residual + offset : nullptr;
    gather.rows = task.blocks.rows(block);
    Ahead ahead;
    if (block + 1 < shape.batch) {
      const cpu::BlockRows next = task.blocks.input_rows(block + 1, task.staged);
      const int64_t out = task.blocks.rows(block + 1) * shape.out_w;
      const int64_t channels = shape.out_channels;
      const int64_t step = gather.rows * shape.out_w * task.output_stride;
      ahead.add(input_from(next.first), next.count * shape.in_w, shape.in_channels,
                task.input_stride);
      ahead.add(residual ? residual + step : nullptr, out, channels, task.output_stride);
      ahead.add(task.output + offset + step, out, channels, task.output_stride);
    }
    if (task.winograd) {
      const WinogradTiles tiles = WinogradTiles::of(gather.rows, shape.out_w);
      ahead.spread(winograd_work(tiles, shape.in_channels, shape.out_channels));
      winograd_map(tiles, staged, task.staged, task.weights, shape.out_channels, task.output_stride,
                   task.bias, residual, task.output + offset, ahead);
    } else {
      ahead.spread(direct_work(gather, columns, shape.in_channels, shape.out_channels));
      map(gather, columns, staged, task.staged, task.weights, shape.out_channels, shape.out_w,
          task.output_stride, task.bias, residual, task.output + offset, ahead);
    }
    statistics.rows(row, row + gather.rows * columns);
  }
  statistics.finish(mean, m2);
}
