#include "cpu/conv2d_winograd.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include <torch/csrc/stable/ops.h>

#include "cpu/element.h"

namespace preact::cpu {
namespace {

constexpr int64_t kPanel = kBlock * kBlock;

// Winograd rounds relative to the largest values of a tile, not of each output's own inputs.
bool is_allowed() {
  static const bool allowed = [] {
    const char* const choice = std::getenv("PREACT_CONV");
    return choice == nullptr || std::strcmp(choice, "direct") != 0;
  }();
  return allowed;
}

}  // namespace

bool has_winograd(const Conv2dShape& s) {
  const auto wastes_little = [](int64_t height, int64_t width) {
    const WinogradTiles tiles = WinogradTiles::of(height, width);
    return 4 * tiles.rows * tiles.columns * 2 <= 3 * height * width;
  };
  return is_allowed() && s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 && s.stride_w == 1 &&
         s.dilation_h == 1 && s.dilation_w == 1 && s.padding_h <= 2 && s.padding_w <= 2 &&
         wastes_little(s.out_h, s.out_w) && wastes_little(s.in_h, s.in_w);
}

Staged stage_winograd_input(const Conv2dShape& s) {
  const WinogradTiles tiles = WinogradTiles::of(s.out_h, s.out_w);
  return {s.in_channels,
          s.in_h,
          s.in_w,
          s.padding_h,
          s.padding_w,
          std::max(s.padding_h + s.in_h, 2 * tiles.rows + 2),
          std::max(s.padding_w + s.in_w, 2 * tiles.columns + 2)};
}

Staged stage_winograd_grad_output(const Conv2dShape& s) {
  const WinogradTiles tiles = WinogradTiles::of(s.in_h, s.in_w);
  const WinogradTiles own = WinogradTiles::of(s.out_h, s.out_w);
  const int64_t top = 2 - s.padding_h, left = 2 - s.padding_w;
  return {s.out_channels,
          s.out_h,
          s.out_w,
          top,
          left,
          std::max(top + 2 * own.rows, 2 * tiles.rows + 2),
          std::max(left + 2 * own.columns, 2 * tiles.columns + 2)};
}

// G g G^T, a panel of 16 by 16 channels at a time.
template <typename T, typename W>
void transform_weights(const W* weight, const WeightStrides& strides, const Conv2dShape& s,
                       bool transposed, float* transformed) {
  std::vector<int64_t> kernel(9);
  std::iota(kernel.begin(), kernel.end(), 0);
  if (transposed) std::reverse(kernel.begin(), kernel.end());
  float* const packed = scratch(Slot::sums, packed_size(s, 9));
  pack_weights<T>(weight, strides, s, kernel, transposed, packed);
  const int64_t panels = packed_size(s, 1) / kPanel, position = panels * kPanel;
  constexpr int64_t kGrain = 8;
  torch::stable::parallel_for(0, panels, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* const g = packed + panel * 9 * kPanel;
      float* const to = transformed + panel * kPanel;
      float rows[4][3][kPanel];
      for (int x = 0; x < 3; ++x) {
        for (int64_t k = 0; k < kPanel; ++k) {
          const float a = g[x * kPanel + k], b = g[(3 + x) * kPanel + k];
          const float c = g[(6 + x) * kPanel + k];
          rows[0][x][k] = a;
          rows[1][x][k] = 0.5f * (a + c + b);
          rows[2][x][k] = 0.5f * (a + c - b);
          rows[3][x][k] = c;
        }
      }
      for (int y = 0; y < 4; ++y) {
        float* const row = to + 4 * y * position;
        for (int64_t k = 0; k < kPanel; ++k) {
          const float a = rows[y][0][k], b = rows[y][1][k], c = rows[y][2][k];
          row[k] = a;
          row[position + k] = 0.5f * (a + c + b);
          row[2 * position + k] = 0.5f * (a + c - b);
          row[3 * position + k] = c;
        }
      }
    }
  });
}

// G^T u G.
void transform_weight_gradient(const float* transformed, const Conv2dShape& s, float* packed) {
  const int64_t panels = packed_size(s, 1) / kPanel, position = panels * kPanel;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const float* const u = transformed + panel * kPanel;
    float* const to = packed + panel * 9 * kPanel;
    float rows[3][4][kPanel];
    for (int x = 0; x < 4; ++x) {
      const float* const column = u + x * position;
      for (int64_t k = 0; k < kPanel; ++k) {
        const float b = 0.5f * column[4 * position + k], c = 0.5f * column[8 * position + k];
        rows[0][x][k] = column[k] + (b + c);
        rows[1][x][k] = b - c;
        rows[2][x][k] = column[12 * position + k] + (b + c);
      }
    }
    for (int y = 0; y < 3; ++y) {
      float* const row = to + 3 * y * kPanel;
      for (int64_t k = 0; k < kPanel; ++k) {
        const float b = 0.5f * rows[y][1][k], c = 0.5f * rows[y][2][k];
        row[k] = rows[y][0][k] + (b + c);
        row[kPanel + k] = b - c;
        row[2 * kPanel + k] = rows[y][3][k] + (b + c);
      }
    }
  }
}

#define PREACT_WEIGHTS(T, W)                                                                   \
  template void transform_weights<T>(const W*, const WeightStrides&, const Conv2dShape&, bool, \
                                     float*);
PREACT_WEIGHTS(float, float)
PREACT_WEIGHTS(float, BFloat16)
PREACT_WEIGHTS(BFloat16, float)
PREACT_WEIGHTS(BFloat16, BFloat16)
#undef PREACT_WEIGHTS

}  // namespace preact::cpu
