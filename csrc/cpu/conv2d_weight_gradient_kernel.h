// Images [begin, end) of the weight gradient, added to `sums` [O, KH, KW, C]:
//   sums[o, ky, kx, c] += sum over n, oy, ox of
//       grad[n, oy, ox, o] * input[n, oy * stride + ky * dilation - padding, (same for x), c]
// Images go by in bands of rows small enough for the second-level cache, which every tap and tile
// then reads again. A tile of OUT x (VECTORS * lanes) sums stays in registers while a band streams by, a product
// with one broadcast value of grad for each of its rows.

struct TapRange {
  int64_t begin, end;  // outputs whose input, at this tap, lies inside the image

  TapRange(int64_t offset, int64_t stride, int64_t inputs, int64_t outputs) {
    begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
    end = offset >= inputs ? 0 : std::min(outputs, (inputs - 1 - offset) / stride + 1);
  }

  TapRange within(int64_t first, int64_t last) const {
    TapRange part = *this;
    part.begin = std::max(begin, first);
    part.end = std::min(end, last);
    return part;
  }
};

template <int OUT, int VECTORS>
PREACT_INLINE void weight_gradient_tile(const float* grad, const float* input,
                                        const Conv2dShape& s, TapRange ys, TapRange xs,
                                        int64_t offset_y, int64_t offset_x, float* sums) {
  using P = Pack<float>;
  const int64_t row = s.kernel_h * s.kernel_w * s.in_channels;
  FloatVector tile[OUT][VECTORS];
#pragma GCC unroll 8
  for (int o = 0; o < OUT; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) tile[o][v] = P::load(sums + o * row + v * P::lanes);
  }
  for (int64_t y = ys.begin; y < ys.end; ++y) {
    const float* g = grad + (y * s.out_w + xs.begin) * s.out_channels;
    const float* x = input + ((y * s.stride_h + offset_y) * s.in_w + xs.begin * s.stride_w +
                              offset_x) * s.in_channels;
    for (int64_t i = xs.begin; i < xs.end; ++i) {
      FloatVector values[VECTORS];
#pragma GCC unroll 2
      for (int v = 0; v < VECTORS; ++v) values[v] = P::load(x + v * P::lanes);
#pragma GCC unroll 8
      for (int o = 0; o < OUT; ++o) {
        const FloatVector factor = P::broadcast(g[o]);
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) tile[o][v] = madd(factor, values[v], tile[o][v]);
      }
      g += s.out_channels;
      x += s.stride_w * s.in_channels;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < OUT; ++o) {
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; ++v) P::store(sums + o * row + v * P::lanes, tile[o][v]);
  }
}

template <int VECTORS>
PREACT_INLINE void weight_gradient_outputs(const float* grad, const float* input,
                                           const Conv2dShape& s, TapRange ys, TapRange xs,
                                           int64_t offset_y, int64_t offset_x, float* sums) {
  constexpr int kOut = 6;  // 6 x 2 accumulators, 2 inputs and a factor in AVX2's 16 registers
  const int64_t row = s.kernel_h * s.kernel_w * s.in_channels;
  int64_t o = 0;
  for (; o + kOut <= s.out_channels; o += kOut) {
    weight_gradient_tile<kOut, VECTORS>(grad + o, input, s, ys, xs, offset_y, offset_x,
                                        sums + o * row);
  }
  for (; o + 4 <= s.out_channels; o += 4) {
    weight_gradient_tile<4, VECTORS>(grad + o, input, s, ys, xs, offset_y, offset_x,
                                     sums + o * row);
  }
  for (; o + 2 <= s.out_channels; o += 2) {
    weight_gradient_tile<2, VECTORS>(grad + o, input, s, ys, xs, offset_y, offset_x,
                                     sums + o * row);
  }
  if (o < s.out_channels) {
    weight_gradient_tile<1, VECTORS>(grad + o, input, s, ys, xs, offset_y, offset_x,
                                     sums + o * row);
  }
}

template <typename T>
void conv2d_weight_gradient_part(const T* grad, const T* input, const Conv2dShape& s,
                                 int64_t begin, int64_t end, T* sums) {
  constexpr int64_t kLanes = Pack<T>::lanes;
  constexpr int64_t kBandBytes = 131072;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(T)) *
                            (s.out_w * s.out_channels + s.stride_h * s.in_w * s.in_channels);
  const int64_t rows = std::max<int64_t>(kBandBytes / row_bytes, 1);
  for (int64_t n = begin; n < end; ++n) {
    const T* g = grad + n * s.out_h * s.out_w * s.out_channels;
    const T* x = input + n * s.in_h * s.in_w * s.in_channels;
    for (int64_t band = 0; band < s.out_h; band += rows) {
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t offset_y = ky * s.dilation_h - s.padding_h;
        const TapRange ys =
            TapRange(offset_y, s.stride_h, s.in_h, s.out_h).within(band, band + rows);
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
          const int64_t offset_x = kx * s.dilation_w - s.padding_w;
          const TapRange xs(offset_x, s.stride_w, s.in_w, s.out_w);
          T* tap = sums + (ky * s.kernel_w + kx) * s.in_channels;
          int64_t c = 0;
          for (; c + 2 * kLanes <= s.in_channels; c += 2 * kLanes) {
            weight_gradient_outputs<2>(g, x + c, s, ys, xs, offset_y, offset_x, tap + c);
          }
          for (; c + kLanes <= s.in_channels; c += kLanes) {
            weight_gradient_outputs<1>(g, x + c, s, ys, xs, offset_y, offset_x, tap + c);
          }
        }
      }
    }
  }
}
