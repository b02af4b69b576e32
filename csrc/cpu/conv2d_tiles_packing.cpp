#define PREACT_TILES_KERNELS "cpu/conv2d_tiles_pack.h"
#include "cpu/foreach_capability.h"

#include <algorithm>

#include <torch/csrc/stable/ops.h>

#if PREACT_TILES
namespace preact::cpu {

template <typename W>
void pack_tiles(const W* weight, const WeightStrides& strides, const Conv2dShape& shape,
                const TileGather& gather, bool transposed, BFloat16* packed) {
  const int64_t outs = transposed ? shape.in_channels : shape.out_channels;
  const int64_t ins = transposed ? shape.out_channels : shape.in_channels;
  const int64_t out_stride = transposed ? strides.in : strides.out;
  const int64_t in_stride = transposed ? strides.out : strides.in;
  const int64_t group = group_of(outs), tiles = group / 16;
  const auto steps = static_cast<int64_t>(gather.steps.size());
  constexpr int64_t kGrain = 8, kTile = 512;
  const bool by_rows = in_stride == 1, wide = group == 32 && !is_narrow(ins);
  torch::stable::parallel_for(
      0, padded(outs) / group * steps, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const Step& step = gather.steps[i % steps];
          const int64_t first = i / steps * group;
          BFloat16* const to = packed + i * tiles * kTile;
          if (wide && (by_rows || out_stride == 1)) {
            const W* const from = weight + first * out_stride + step.channel * in_stride +
                                  step.tap / shape.kernel_w * strides.y +
                                  step.tap % shape.kernel_w * strides.x;
            (by_rows ? &avx512_bf16::pack_rows<W>
                     : &avx512_bf16::pack_columns<W>)(from, by_rows ? out_stride : in_stride,
                                                      outs - first, ins - step.channel, to);
            continue;
          }
          std::fill_n(to, tiles * kTile, BFloat16{0});
          const auto fill = [&](int64_t tap, int64_t row, int64_t channel, int64_t rows) {
            const W* const from = weight + channel * in_stride + tap / shape.kernel_w * strides.y +
                                  tap % shape.kernel_w * strides.x;
            const int64_t there = std::min(2 * rows, ins - channel);
            for (int64_t o = first; o < std::min(first + group, outs); ++o) {
              const int64_t column = tiles == 1 ? o - first : (o - first) / 2;
              const int64_t tile = tiles == 1 ? 0 : (o - first) % 2;
              const W* const source = from + o * out_stride;
              BFloat16* const target = to + tile * kTile + row * 32 + column * 2;
              for (int64_t c = 0; c < there; ++c) {
                target[c / 2 * 32 + c % 2] = as_bfloat16(source[c * in_stride]);
              }
            }
          };
          const bool narrow = is_narrow(ins);
          fill(step.tap, 0, step.channel, narrow ? 8 : 16);
          if (narrow && step.next >= 0) fill(step.next, 8, 0, 8);
        }
      });
}

template <typename W>
void unpack_weight_sums(const float* sums, int64_t chunks, const WeightStrides& strides,
                        const Conv2dShape& shape, W* gradient) {
  const int64_t taps = shape.taps(), size = weight_sums(shape);
  const int64_t rows = group_of(shape.in_channels), columns = group_of(shape.out_channels);
  const int64_t in_groups = padded(shape.in_channels) / rows;
  const int64_t out_groups = padded(shape.out_channels) / columns;
  const int64_t blocks = out_groups * in_groups * taps;
  const bool turned = turns_gradient(shape);
  const auto channel = [](int64_t lane, int64_t group) {
    return group == 16 ? lane : lane % 16 * 2 + lane / 16;
  };
  constexpr int64_t kGrain = 8, kMost = 32 * 32;
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const float* part = sums + block * rows * columns;
      if (turned) {  // inputs of a 1x1 weight stand side by side in every layout
        const int64_t first_out = block % out_groups * columns,
                      first_in = block / out_groups * rows;
        avx512_bf16::unpack_turned(part, chunks, size, shape.out_channels - first_out,
                                   shape.in_channels - first_in, strides.out,
                                   gradient + first_out * strides.out + first_in);
        continue;
      }
      const int64_t t = block % taps, first_in = block / taps % in_groups * rows;
      const int64_t first_out = block / taps / in_groups * columns;
      W* const to = gradient + t / shape.kernel_w * strides.y + t % shape.kernel_w * strides.x;
      if (rows == 32 && columns == 32 && strides.in == 1) {
        avx512_bf16::unpack_rows(part, chunks, size, shape.out_channels - first_out,
                                 shape.in_channels - first_in, strides.out,
                                 to + first_out * strides.out + first_in);
        continue;
      }
      float total[kMost];
      std::copy_n(part, rows * columns, total);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        part += size;
        for (int64_t k = 0; k < rows * columns; ++k) total[k] += part[k];
      }
      for (int64_t k = 0; k < rows * columns; ++k) {
        const int64_t c = first_in + channel(k / columns, rows);
        const int64_t o = first_out + channel(k % columns, columns);
        if (c < shape.in_channels && o < shape.out_channels) {
          assign(to[o * strides.out + c * strides.in], total[k]);
        }
      }
    }
  });
}

#define PREACT_WEIGHTS(W)                                                                         \
  template void pack_tiles(const W*, const WeightStrides&, const Conv2dShape&, const TileGather&, \
                           bool, BFloat16*);                                                      \
  template void unpack_weight_sums(const float*, int64_t, const WeightStrides&,                   \
                                   const Conv2dShape&, W*);
PREACT_WEIGHTS(BFloat16)
PREACT_WEIGHTS(float)
#undef PREACT_WEIGHTS

}  // namespace preact::cpu
#endif
