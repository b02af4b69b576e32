// The gradient of the weight as products of tiles. Included like conv2d_tiles.h.

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
  begin_weight_tiles();
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
  begin_weight_tiles();
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
