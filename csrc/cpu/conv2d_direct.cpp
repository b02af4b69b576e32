#include "cpu/conv2d_direct.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>

#include <torch/csrc/stable/ops.h>

#include "common/feature_map.h"
#include "cpu/caches.h"
#include "cpu/element.h"

namespace preact::cpu {
namespace {

int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

// Border before and after `size` positions, all of [low, high] inside.
struct Border {
  int64_t before, total;

  Border(int64_t size, int64_t low, int64_t high)
      : before(std::max<int64_t>(0, -low)), total(before + std::max(size, high + 1)) {}
};

// A weight as a factor of a map of T.
template <typename T, typename W>
float operand_of(W weight) {
  if constexpr (std::is_same_v<T, float> && std::is_same_v<W, float>) {
    return weight;
  } else {
    return bfloat16_to_float(as_bfloat16(weight).bits);
  }
}

}  // namespace

Staged stage_input(const Conv2dShape& s) {
  const Border y(s.in_h, -s.padding_h,
                 (s.out_h - 1) * s.stride_h - s.padding_h + (s.kernel_h - 1) * s.dilation_h);
  const Border x(s.in_w, -s.padding_w,
                 (s.out_w - 1) * s.stride_w - s.padding_w + (s.kernel_w - 1) * s.dilation_w);
  return {s.in_channels, s.in_h, s.in_w, y.before, x.before, y.total, x.total};
}

Gather forward_gather(const Conv2dShape& s, const Staged& input) {
  Gather gather{{}, {}, s.out_h, s.out_w, 0, 0, 1, 1, s.stride_h};
  for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
    for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
      const int64_t y = ky * s.dilation_h - s.padding_h + input.top;
      const int64_t x = kx * s.dilation_w - s.padding_w + input.left;
      gather.taps.push_back((y * input.columns + x) * kBlock);
      gather.kernel.push_back(ky * s.kernel_w + kx);
    }
  }
  return gather;
}

Staged stage_grad_output(const Conv2dShape& s) {
  const auto border = [](int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t padding,
                         int64_t dilation) {
    return Border(out, floor_div(padding - (kernel - 1) * dilation, stride),
                  floor_div(in - 1 + padding, stride));
  };
  const Border y = border(s.in_h, s.out_h, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  const Border x = border(s.in_w, s.out_w, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  return {s.out_channels, s.out_h, s.out_w, y.before, x.before, y.total, x.total};
}

std::vector<Gather> backward_gathers(const Conv2dShape& s, const Staged& grad_output) {
  std::vector<Gather> phases;
  for (int64_t py = 0; py < std::min(s.stride_h, s.in_h); ++py) {
    for (int64_t px = 0; px < std::min(s.stride_w, s.in_w); ++px) {
      Gather phase{{},
                   {},
                   (s.in_h - py + s.stride_h - 1) / s.stride_h,
                   (s.in_w - px + s.stride_w - 1) / s.stride_w,
                   py,
                   px,
                   s.stride_h,
                   s.stride_w,
                   1};
      for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
        const int64_t y = py + s.padding_h - ky * s.dilation_h;
        if (y - floor_div(y, s.stride_h) * s.stride_h != 0) continue;
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
          const int64_t x = px + s.padding_w - kx * s.dilation_w;
          if (x - floor_div(x, s.stride_w) * s.stride_w != 0) continue;
          phase.taps.push_back(((floor_div(y, s.stride_h) + grad_output.top) * grad_output.columns +
                                floor_div(x, s.stride_w) + grad_output.left) *
                               kBlock);
          phase.kernel.push_back(ky * s.kernel_w + kx);
        }
      }
      phases.push_back(std::move(phase));
    }
  }
  return phases;
}

DirectBlocks DirectBlocks::of(const Conv2dShape& shape) {
  // A block of a pointwise convolution: its pixels of one group of channels fill half of the
  // first-level cache at most, and are a multiple of every tile's width where there are many.
  constexpr int64_t kGroup = kBlock * sizeof(float), kFew = 16, kLeastPixels = 32;
  if (!is_pointwise(shape)) return {shape, 0, 1, shape.in_h, shape.out_h};
  const int64_t most = fill_half(kGroup);
  const int64_t pixels = shape.batch * shape.in_h * shape.in_w;
  Conv2dShape flat = shape;
  flat.batch = (pixels + most - 1) / most;
  int64_t size = most;
  if (flat.batch < kFew) {
    // A few shall not leave a thread without work: an even number of nearly one size, or where
    // there is not even an image for each thread, as many as give each some pixels.
    const int64_t threads = torch::stable::get_num_threads();
    if (shape.batch < threads) {
      flat.batch = std::max(flat.batch, std::min(threads, pixels / kLeastPixels));
    } else if (flat.batch > 1) {
      flat.batch += flat.batch % 2;
    }
    size = (pixels + flat.batch - 1) / flat.batch;
    size += (4 - size % 4) % 4;
    flat.batch = (pixels + size - 1) / size;
  }
  flat.in_h = flat.out_h = 1;
  flat.in_w = flat.out_w = size;
  return {flat, flat.batch * size - pixels, 1, 1, 1};
}

DirectBlocks DirectBlocks::of_result(const Conv2dShape& shape, int64_t bytes) {
  constexpr int64_t kLeastRows = 8;
  const int64_t reach = (shape.kernel_h - 1) * shape.dilation_h;
  DirectBlocks blocks = of(shape);
  if (is_pointwise(shape) || 2 * shape.padding_h > reach) return blocks;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted =
      std::max(ceil_div(shape.out_h * bytes, caches().second / 2), ceil_div(threads, shape.batch));
  int64_t rows = std::max(ceil_div(shape.out_h, wanted), kLeastRows);
  rows += rows % 2;  // tiles of Winograd's are two rows high
  blocks.bands = ceil_div(shape.out_h, rows);
  if (blocks.bands == 1) return blocks;
  blocks.shape.batch *= blocks.bands;
  blocks.shape.out_h = rows;
  blocks.shape.in_h = (rows - 1) * shape.stride_h + reach + 1 - 2 * shape.padding_h;
  return blocks;
}

BlockChunks::BlockChunks(const Conv2dShape& shape, int64_t most)
    : count(std::min(shape.batch, most)), blocks(shape.batch) {
  const int64_t threads = torch::stable::get_num_threads();
  if (7 * longest(threads) <= 8 * ceil_div(blocks, threads)) return;
  count = std::min(blocks, std::max<int64_t>(most / threads, 1) * threads);
}

int64_t BlockChunks::longest(int64_t threads) const {
  const int64_t each = ceil_div(count, threads);  // as ChunkQueue divides them
  int64_t result = 0;
  for (int64_t chunk = 0; chunk < count; chunk += each) {
    result = std::max(result, begin(std::min(chunk + each, count)) - begin(chunk));
  }
  return result;
}

float* scratch(Slot slot, int64_t size) {
  struct Buffer {
    std::unique_ptr<float, decltype(&std::free)> data{nullptr, &std::free};
    int64_t size = 0;
  };
  thread_local Buffer buffers[static_cast<int>(Slot::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.size < size) {
    constexpr size_t kLine = 64;
    const size_t bytes = (static_cast<size_t>(size) * sizeof(float) + kLine - 1) / kLine * kLine;
    buffer.data.reset(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
    if (!buffer.data) throw std::bad_alloc();
    buffer.size = size;
  }
  return buffer.data.get();
}

float* staging(Slot slot, const Staged& s) {
  float* const buffer = scratch(slot, s.size());
  const int64_t row = s.columns * kBlock;
  if (s.channels % kBlock != 0) {
    std::fill_n(buffer, s.size(), 0.0f);
    return buffer;
  }
  for (int64_t block = 0; block < blocks_of(s.channels); ++block) {
    float* const map = buffer + block * s.block_stride();
    std::fill(map, map + s.top * row, 0.0f);
    for (int64_t y = s.top; y < s.top + s.height; ++y) {
      std::fill_n(map + y * row, s.left * kBlock, 0.0f);
      std::fill(map + y * row + (s.left + s.width) * kBlock, map + (y + 1) * row, 0.0f);
    }
    std::fill(map + (s.top + s.height) * row, map + s.block_stride(), 0.0f);
  }
  return buffer;
}

template <typename T, typename W>
void pack_weights(const W* weight, const WeightStrides& strides, const Conv2dShape& shape,
                  const std::vector<int64_t>& kernel, bool transposed, float* packed) {
  const int64_t outs = transposed ? shape.in_channels : shape.out_channels;
  const int64_t ins = transposed ? shape.out_channels : shape.in_channels;
  const int64_t out_stride = transposed ? strides.in : strides.out;
  const int64_t in_stride = transposed ? strides.out : strides.in;
  const auto taps = static_cast<int64_t>(kernel.size());
  constexpr int64_t kGrain = 4;
  torch::stable::parallel_for(
      0, blocks_of(outs) * blocks_of(ins), kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t pair = begin; pair < end; ++pair) {
          const int64_t o = pair / blocks_of(ins) * kBlock, i = pair % blocks_of(ins) * kBlock;
          const int64_t rows = std::min(kBlock, ins - i), columns = std::min(kBlock, outs - o);
          for (int64_t t = 0; t < taps; ++t) {
            const W* from = weight + o * out_stride + i * in_stride +
                            kernel[t] / shape.kernel_w * strides.y +
                            kernel[t] % shape.kernel_w * strides.x;
            float* const to = packed + (pair * taps + t) * kBlock * kBlock;
            if (rows < kBlock || columns < kBlock) std::fill_n(to, kBlock * kBlock, 0.0f);
            for (int64_t r = 0; r < rows; ++r) {
              const W* const row = from + r * in_stride;
              if constexpr (std::is_same_v<W, float> && std::is_same_v<T, float>) {
                if (out_stride == 1) {
                  std::copy_n(row, columns, to + r * kBlock);
                  continue;
                }
              }
              for (int64_t c = 0; c < columns; ++c) {
                to[r * kBlock + c] = operand_of<T>(row[c * out_stride]);
              }
            }
          }
        }
      });
}

template <typename W>
void unpack_weight_gradient(const float* sums, int64_t chunks, const WeightStrides& strides,
                            const Conv2dShape& shape, W* gradient) {
  const int64_t taps = shape.taps(), size = packed_size(shape, taps);
  const int64_t in_blocks = blocks_of(shape.in_channels);
  const int64_t tiles = blocks_of(shape.out_channels) * in_blocks * taps;
  constexpr int64_t kGrain = 2;
  torch::stable::parallel_for(0, tiles, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t t = tile % taps, i = tile / taps % in_blocks * kBlock;
      const int64_t o = tile / taps / in_blocks * kBlock;
      float total[kBlock * kBlock];
      std::copy_n(sums + tile * kBlock * kBlock, kBlock * kBlock, total);
      for (int64_t chunk = 1; chunk < chunks; ++chunk) {
        const float* const part = sums + chunk * size + tile * kBlock * kBlock;
        for (int64_t k = 0; k < kBlock * kBlock; ++k) total[k] += part[k];
      }
      W* const to = gradient + o * strides.out + i * strides.in + t / shape.kernel_w * strides.y +
                    t % shape.kernel_w * strides.x;
      const int64_t rows = std::min(kBlock, shape.in_channels - i);
      const int64_t columns = std::min(kBlock, shape.out_channels - o);
      for (int64_t c = 0; c < columns; ++c) {
        for (int64_t r = 0; r < rows; ++r) {
          assign(to[c * strides.out + r * strides.in], total[r * kBlock + c]);
        }
      }
    }
  });
}

#define PREACT_WEIGHTS(T, W)                                                        \
  template void pack_weights<T>(const W*, const WeightStrides&, const Conv2dShape&, \
                                const std::vector<int64_t>&, bool, float*);
PREACT_WEIGHTS(float, float)
PREACT_WEIGHTS(float, BFloat16)
PREACT_WEIGHTS(BFloat16, float)
PREACT_WEIGHTS(BFloat16, BFloat16)
#undef PREACT_WEIGHTS
template void unpack_weight_gradient(const float*, int64_t, const WeightStrides&,
                                     const Conv2dShape&, float*);
template void unpack_weight_gradient(const float*, int64_t, const WeightStrides&,
                                     const Conv2dShape&, BFloat16*);

}  // namespace preact::cpu
