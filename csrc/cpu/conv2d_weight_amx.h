// The gradient of the weight on tile registers. Included by kernels of the AMX level.

// Adds to sums [TAPS][INPUTS * 16][OUTPUTS * 16], or where `fresh` writes there, what `steps` steps
// of 32 pixels give: planes of the activation, shifted for each tap, times pairs of gradients.
template <int INPUTS, int OUTPUTS, int TAPS>
__attribute__((noinline)) void weight_tiles(const char* const* taps, int64_t plane_bytes,
                                            const BFloat16* grad, int64_t grad_tile, int64_t steps,
                                            bool fresh, float* sums) {
  constexpr int64_t kRow = OUTPUTS * 64, kStep = 64;
  constexpr int kSums = INPUTS * OUTPUTS * TAPS;
  static_assert(kSums <= 4 && (OUTPUTS == 1 || TAPS == 1) && (INPUTS == 1 || TAPS == 1));
  // Where sums i stand: a tap's, or a tile of inputs and of outputs.
  constexpr int64_t second = OUTPUTS == 2 ? 16 : 256;
  constexpr int64_t third = 512, fourth = OUTPUTS == 2 ? 528 : 768;
  if (fresh) {
    tile_zero<0>();
    if constexpr (kSums > 1) tile_zero<1>();
    if constexpr (kSums > 2) tile_zero<2>();
    if constexpr (kSums > 3) tile_zero<3>();
  } else {
    tile_load<0>(sums, kRow);
    if constexpr (kSums > 1) tile_load<1>(sums + second, kRow);
    if constexpr (kSums > 2) tile_load<2>(sums + third, kRow);
    if constexpr (kSums > 3) tile_load<3>(sums + fourth, kRow);
  }
  for (int64_t s = 0; s < steps; ++s, grad += kTile) {
    const int64_t at = s * kStep;
    tile_load<7>(grad, 64);
    tile_load<4>(taps[0] + at, plane_bytes);
    tile_multiply<0, 4, 7>();
    if constexpr (OUTPUTS == 2) {
      tile_load<6>(grad + grad_tile, 64);
      tile_multiply<1, 4, 6>();
      if constexpr (INPUTS == 2) {
        tile_load<5>(taps[0] + at + 16 * plane_bytes, plane_bytes);
        tile_multiply<2, 5, 7>();
        tile_multiply<3, 5, 6>();
      }
    } else if constexpr (INPUTS == 2) {
      tile_load<5>(taps[0] + at + 16 * plane_bytes, plane_bytes);
      tile_multiply<1, 5, 7>();
    } else if constexpr (TAPS == 3) {
      tile_load<5>(taps[1] + at, plane_bytes);
      tile_multiply<1, 5, 7>();
      tile_load<6>(taps[2] + at, plane_bytes);
      tile_multiply<2, 6, 7>();
    }
  }
  tile_store<0>(sums, kRow);
  if constexpr (kSums > 1) tile_store<1>(sums + second, kRow);
  if constexpr (kSums > 2) tile_store<2>(sums + third, kRow);
  if constexpr (kSums > 3) tile_store<3>(sums + fourth, kRow);
}

// Pairs of `tiles` groups of 16 channels become planes.
inline void turn_pairs(const BFloat16* pairs, int64_t tiles, int64_t count, char* planes,
                       int64_t plane_bytes) {
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t pair = 0; pair < count; pair += 16) {
      transpose_words(pairs + (tile * count + pair) * 32,
                      planes + tile * 16 * plane_bytes + pair * 4, plane_bytes);
    }
  }
}

// Where turns_gradient: the gradient's pairs become planes.
inline void turned_weight_gradient(const Conv2dShape& s, const cpu::PairedPixels& paired,
                                   const BFloat16* pairs, char* planes, const BFloat16* grad_pairs,
                                   bool fresh, float* sums) {
  const int64_t in = cpu::padded(s.in_channels), out = cpu::padded(s.out_channels);
  turn_pairs(grad_pairs, out / 16, paired.steps * 16, planes, paired.plane_bytes);
  static const TileConfig config(16, false);
  tile_configure(config);
  const int64_t tile = paired.pairs * 32;
  for (int64_t c = 0; c < in; c += 32) {
    for (int64_t o = 0; o < out; o += 32, sums += 32 * 32) {
      const char* const from = planes + o * paired.plane_bytes;
      weight_tiles<2, 2, 1>(&from, paired.plane_bytes, pairs + c / 16 * tile, tile, paired.steps,
                            fresh, sums);
    }
  }
}

// Adds the weight gradient of one block to sums, or where `fresh` writes it there: its pairs become
// planes, and every tap of every two groups of channels runs through all pixels.
inline void weight_gradient(const Conv2dShape& s, const cpu::PairedPixels& paired,
                            const Staged& staged, const BFloat16* pairs, char* planes,
                            const BFloat16* grad_pairs, bool fresh, float* sums) {
  const int64_t in = cpu::padded(s.in_channels), out = cpu::padded(s.out_channels);
  const int64_t rows = cpu::group_of(s.in_channels), columns = cpu::group_of(s.out_channels);
  turn_pairs(pairs, paired.phases() * in / 16, paired.pairs, planes, paired.plane_bytes);
  std::vector<int64_t> starts;  // of each tap in the planes, in bytes
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int64_t y = ky * s.dilation_h - s.padding_h + staged.top;
      const int64_t x = kx * s.dilation_w - s.padding_w + staged.left;
      const int64_t phase_x = x % paired.stride,
                    phase = y % paired.stride * paired.stride + phase_x;
      const int64_t pixel =
          paired.leads[phase_x] + y / paired.stride * paired.pitch + x / paired.stride;
      starts.push_back(phase * in * paired.plane_bytes + pixel * 2);
    }
  }
  const auto taps = static_cast<int64_t>(starts.size());
  const int64_t grad_tile = paired.steps * kTile, size = rows * columns;
  static const TileConfig config(16, false);
  tile_configure(config);
  for (int64_t o = 0; o < out; o += columns) {
    const BFloat16* const grad = grad_pairs + o / 16 * grad_tile;
    for (int64_t c = 0; c < in; c += rows) {
      const char* const from = planes + c * paired.plane_bytes;
      for (int64_t t = 0; t < taps; ++t, sums += size) {
        const char* at[3] = {from + starts[t], nullptr, nullptr};
        if (rows == 32 && columns == 32) {
          weight_tiles<2, 2, 1>(at, paired.plane_bytes, grad, grad_tile, paired.steps, fresh, sums);
        } else if (columns == 32) {
          weight_tiles<1, 2, 1>(at, paired.plane_bytes, grad, grad_tile, paired.steps, fresh, sums);
        } else if (rows == 32) {
          weight_tiles<2, 1, 1>(at, paired.plane_bytes, grad, grad_tile, paired.steps, fresh, sums);
        } else if (t + 3 <= taps) {
          at[1] = from + starts[t + 1];
          at[2] = from + starts[t + 2];
          weight_tiles<1, 1, 3>(at, paired.plane_bytes, grad, grad_tile, paired.steps, fresh, sums);
          t += 2;
          sums += 2 * size;
        } else {
          weight_tiles<1, 1, 1>(at, paired.plane_bytes, grad, grad_tile, paired.steps, fresh, sums);
        }
      }
    }
  }
}
