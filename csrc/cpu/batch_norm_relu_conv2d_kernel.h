#include "cpu/batch_norm_relu_kernel.h"
#include "cpu/conv2d_tile.h"
#include "cpu/conv2d_winograd_tile.h"
#include "cpu/statistics.h"

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
  for (int64_t block = begin; block < end; ++block) {
    const T* const input = task.input + block * shape.in_h * shape.in_w * task.input_stride;
    stage(ActivationSource<T>{{task.norm.mean, task.norm.scale, task.norm.shift}, input},
          shape.in_h, task.blocks.columns(block, shape.in_w), task.input_stride, task.staged,
          staged);
    const int64_t columns = task.blocks.columns(block, shape.out_w);
    const int64_t row = block * shape.out_h * shape.out_w, offset = row * task.output_stride;
    const T* const residual = task.residual ? task.residual + offset : nullptr;
    Ahead ahead;
    if (block + 1 < shape.batch) {
      const int64_t in = shape.in_h * shape.in_w, out = shape.out_h * shape.out_w;
      const int64_t channels = shape.out_channels, step = out * task.output_stride;
      ahead.add(input + in * task.input_stride, in, shape.in_channels, task.input_stride);
      ahead.add(residual ? residual + step : nullptr, out, channels, task.output_stride);
      ahead.add(task.output + offset + step, out, channels, task.output_stride);
    }
    if (task.winograd) {
      const WinogradTiles tiles = WinogradTiles::of(shape.out_h, shape.out_w);
      ahead.spread(winograd_work(tiles, shape.in_channels, shape.out_channels));
      winograd_map(tiles, staged, task.staged, task.weights, shape.out_channels, task.output_stride,
                   task.bias, residual, task.output + offset, ahead);
    } else {
      ahead.spread(direct_work(task.gather, columns, shape.in_channels, shape.out_channels));
      map(task.gather, columns, staged, task.staged, task.weights, shape.out_channels, shape.out_w,
          task.output_stride, task.bias, residual, task.output + offset, ahead);
    }
    statistics.rows(row, row + shape.out_h * columns);
  }
  statistics.finish(mean, m2);
}
