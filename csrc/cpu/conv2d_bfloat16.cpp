#include "cpu/conv2d_bfloat16.h"

#include <algorithm>
#include <bit>
#include <numeric>

#include <torch/csrc/stable/ops.h>

namespace preact::cpu {
namespace {

// bfloat16 from a float: to nearest, ties to even; any NaN becomes the quiet one.
BFloat16 narrowed(float value) {
  if (value != value) return {0x7fc0};
  const auto word = std::bit_cast<uint32_t>(value);
  return {static_cast<uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16)};
}

}  // namespace

std::vector<float> by_lane(const float* values, int64_t channels) {
  std::vector<float> arranged(vector_size_of(channels));
  for (size_t lane = 0; lane < arranged.size(); ++lane) {
    const int64_t c = channel_of(static_cast<int64_t>(lane), channels);
    arranged[lane] = c < channels ? values[c] : 0.0f;
  }
  return arranged;
}

std::vector<float> tile_bias(const BFloat16* bias, int64_t channels) {
  std::vector<float> values(channels);
  for (int64_t c = 0; c < channels; ++c) {
    values[c] = std::bit_cast<float>(static_cast<uint32_t>(bias[c].bits) << 16);
  }
  return is_narrow(channels) ? values : by_lane(values.data(), channels);
}

TileGather::TileGather(Gather given, int64_t channels)
    : gather(std::move(given)) {
  const auto taps = static_cast<int64_t>(gather.taps.size());
  std::vector<int64_t> order(taps);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return gather.taps[a] < gather.taps[b]; });
  for (int64_t i = 0; i < taps; ++i) {
    const int64_t tap = order[i], at = gather.taps[tap] / kBlock * padded(channels);
    if (is_narrow(channels)) {
      const bool pair = i + 1 < taps && gather.taps[order[i + 1]] == gather.taps[tap] + kBlock;
      steps.push_back({gather.kernel[tap], pair ? gather.kernel[order[++i]] : -1, 0});
      offsets.push_back(at);
      continue;
    }
    for (int64_t c = 0; c < padded(channels); c += 32) {
      steps.push_back({gather.kernel[tap], -1, c});
      offsets.push_back(at + c);
    }
  }
}

void pack_tiles(const BFloat16* weight, const WeightStrides& strides, const Conv2dShape& shape,
                const TileGather& gather, bool transposed, BFloat16* packed) {
  const int64_t outs = transposed ? shape.in_channels : shape.out_channels;
  const int64_t ins = transposed ? shape.out_channels : shape.in_channels;
  const int64_t out_stride = transposed ? strides.in : strides.out;
  const int64_t in_stride = transposed ? strides.out : strides.in;
  const int64_t group = group_of(outs), tiles = group / 16;
  const auto steps = static_cast<int64_t>(gather.steps.size());
  constexpr int64_t kGrain = 8, kTile = 512;
  torch::stable::parallel_for(
      0, padded(outs) / group * steps, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Step& step = gather.steps[i % steps];
          const int64_t first = i / steps * group;
          BFloat16* const to = packed + i * tiles * kTile;
          std::fill_n(to, tiles * kTile, BFloat16{0});
          const auto fill = [&](int64_t tap, int64_t row, int64_t channel, int64_t rows) {
            const BFloat16* const from = weight + channel * in_stride +
                                         tap / shape.kernel_w * strides.y +
                                         tap % shape.kernel_w * strides.x;
            const int64_t there = std::min(2 * rows, ins - channel);
            for (int64_t o = first; o < std::min(first + group, outs); ++o) {
              const int64_t column = tiles == 1 ? o - first : (o - first) / 2;
              const int64_t tile = tiles == 1 ? 0 : (o - first) % 2;
              const BFloat16* const source = from + o * out_stride;
              BFloat16* const target = to + tile * kTile + row * 32 + column * 2;
              for (int64_t c = 0; c < there; ++c) {
                target[c / 2 * 32 + c % 2] = source[c * in_stride];
              }
            }
          };
          const bool narrow = is_narrow(ins);
          fill(step.tap, 0, step.channel, narrow ? 8 : 16);
          if (narrow && step.next >= 0) fill(step.next, 8, 0, 8);
        }
      });
}

PairedPixels::PairedPixels(const Conv2dShape& s, const Staged& staged) : stride(s.stride_w) {
  const auto up = [](int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; };
  pitch = up((staged.columns + stride - 1) / stride, 2);
  steps = up(s.out_h * pitch, 32) / 32;
  for (int64_t phase = 0; phase < stride; ++phase) {
    const int64_t first = staged.left + ((phase - staged.left) % stride + stride) % stride;
    leads.push_back(first / stride % 2);
  }
  const int64_t reach_y = (s.kernel_h - 1) * s.dilation_h / stride;
  const int64_t reach_x = (s.kernel_w - 1) * s.dilation_w / stride;
  const int64_t rows = (staged.rows + stride - 1) / stride;
  const int64_t pixels =
      up(std::max(1 + reach_y * pitch + reach_x + steps * 32, 2 + rows * pitch), 32);
  pairs = pixels / 2;
  // An odd number of cache lines, so that the channels of a tile fall on different ones.
  constexpr int64_t kLine = 64;
  plane_bytes = (pixels * 2 / kLine | 1) * kLine;
}

void unpack_weight_sums(const float* sums, int64_t chunks, const WeightStrides& strides,
                        const Conv2dShape& shape, BFloat16* gradient) {
  const int64_t taps = shape.taps(), size = weight_sums(shape);
  const int64_t rows = group_of(shape.in_channels), columns = group_of(shape.out_channels);
  const int64_t in_groups = padded(shape.in_channels) / rows;
  const int64_t blocks = padded(shape.out_channels) / columns * in_groups * taps;
  const auto channel = [](int64_t lane, int64_t group) {
    return group == 16 ? lane : lane % 16 * 2 + lane / 16;
  };
  constexpr int64_t kGrain = 8, kMost = 32 * 32;
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t t = block % taps, first_in = block / taps % in_groups * rows;
      const int64_t first_out = block / taps / in_groups * columns;
      float total[kMost];
      const float* part = sums + block * rows * columns;
      std::copy_n(part, rows * columns, total);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        part += size;
        for (int64_t k = 0; k < rows * columns; ++k) total[k] += part[k];
      }
      BFloat16* const to =
          gradient + t / shape.kernel_w * strides.y + t % shape.kernel_w * strides.x;
      for (int64_t k = 0; k < rows * columns; ++k) {
        const int64_t c = first_in + channel(k / columns, rows);
        const int64_t o = first_out + channel(k % columns, columns);
        if (c < shape.in_channels && o < shape.out_channels) {
          to[o * strides.out + c * strides.in] = narrowed(total[k]);
        }
      }
    }
  });
}

}  // namespace preact::cpu
