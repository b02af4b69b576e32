// Winograd's minimal filtering F(2x2, 3x3) for the direct convolutions: what kernels and host code
// share. Two by two outputs come of a tile of four by four inputs by 16 products where 36 would be
// needed, after Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016).
//
// Transformed maps are [16 positions][C / 16][tiles][16] for a run of tiles, transformed weights
// [16 positions][O / 16][C / 16][16 input channels][16 output channels].
#pragma once

#include <algorithm>

#include "cpu/caches.h"
#include "cpu/conv2d_direct.h"

namespace preact::cpu {

constexpr int64_t kPositions = 16;

// The tiles of one map of outputs.
struct WinogradTiles {
  int64_t height, width;  // of the map
  int64_t rows, columns;  // of tiles

  static WinogradTiles of(int64_t height, int64_t width) {
    return {height, width, (height + 1) / 2, (width + 1) / 2};
  }
  // Rows of tiles transformed at a time: those of 16 channels fill half of the first-level cache.
  int64_t rows_at_once() const {
    constexpr int64_t kTile = kPositions * kBlock * sizeof(float);
    return std::clamp<int64_t>(fill_half(kTile) / columns, 1, rows);
  }
  int64_t at_once() const { return rows_at_once() * columns; }
};

// Floats between the positions of a transformed map. The odd cache line keeps them out of each
// other's sets.
inline int64_t position_stride(int64_t tiles, int64_t channels) {
  return blocks_of(channels) * tiles * kBlock + kBlock;
}

// 3x3, dense, of stride 1, and not so small that the tiles' last row and column are mostly wasted.
bool has_winograd(const Conv2dShape& shape);

// Borders of the staged maps as the tiles read them.
Staged stage_winograd_input(const Conv2dShape& shape);
Staged stage_winograd_grad_output(const Conv2dShape& shape);

inline int64_t transformed_size(const Conv2dShape& s) { return packed_size(s, kPositions); }

// Weights for the forward, or, `transposed`, for the gradient of the input; T as of pack_weights.
template <typename T, typename W>
void transform_weights(const W* weight, const WeightStrides& strides, const Conv2dShape& shape,
                       bool transposed, float* transformed);
// Gradients of transformed weights as gradients of packed ones.
void transform_weight_gradient(const float* transformed, const Conv2dShape& shape, float* packed);

}  // namespace preact::cpu
