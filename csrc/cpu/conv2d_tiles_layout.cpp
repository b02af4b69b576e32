#include "cpu/conv2d_tiles_layout.h"

#include <algorithm>
#include <numeric>

namespace preact::cpu {

LineVector<float> by_lane(const float* values, int64_t channels) {
  LineVector<float> arranged(vector_size_of(channels));
  for (size_t lane = 0; lane < arranged.size(); ++lane) {
    const int64_t c = channel_of(static_cast<int64_t>(lane), channels);
    arranged[lane] = c < channels ? values[c] : 0.0f;
  }
  return arranged;
}

LineVector<float> tile_bias(const BFloat16* bias, int64_t channels) {
  LineVector<float> values(channels);
  for (int64_t c = 0; c < channels; ++c) {
    values[c] = bfloat16_to_float(bias[c].bits);
  }
  return is_narrow(channels) ? values : by_lane(values.data(), channels);
}

TileGather::TileGather(Gather given, int64_t channels) : gather(std::move(given)) {
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
      pairs.push_back(pair ? 16 : 8);
      continue;
    }
    for (int64_t c = 0; c < padded(channels); c += 32) {
      steps.push_back({gather.kernel[tap], -1, c});
      offsets.push_back(at + c);
      pairs.push_back(std::min<int64_t>((channels - c + 1) / 2, 16));
    }
  }
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

}  // namespace preact::cpu
