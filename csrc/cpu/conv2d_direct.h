// How the direct convolutions lay out what they read: shared by kernels and host code.
#pragma once

#include <cstdint>
#include <vector>

#include "common/conv2d_shape.h"
#include "cpu/line_vector.h"

namespace preact::cpu {

// Channels that stand side by side in staged maps and packed weights: a whole number of vectors of
// every instruction set. Staged maps are [C / 16][rows][columns][16], packed weights
// [O / 16][C / 16][taps][16 input channels][16 output channels], zeros where channels run out.
constexpr int64_t kBlock = 16;

inline int64_t blocks_of(int64_t channels) { return (channels + kBlock - 1) / kBlock; }

// A staged map with a border of zeros wide enough for every tap that reads it.
struct Staged {
  int64_t channels, height, width;  // of the map itself
  int64_t top, left;                // border before it
  int64_t rows, columns;            // with borders
  int64_t block_stride() const { return rows * columns * kBlock; }
  int64_t size() const { return blocks_of(channels) * block_stride(); }
  int64_t origin() const { return (top * columns + left) * kBlock; }
};

// Outputs (y * step, x * step) + origin of a map, each the sum over taps of what stands at
// (y * input_step_y, x * STEP / 16) + tap in a staged map, STEP being what the tile is compiled
// for. A convolution is one of these; the gradient of the input of a strided one is one for each
// phase of the stride.
struct Gather {
  std::vector<int64_t> taps;    // offsets into the staged map, in floats
  std::vector<int64_t> kernel;  // index of each in the convolution's own kernel
  int64_t rows, columns;        // outputs
  int64_t first_y, first_x;     // position of the first one
  int64_t step_y, step_x;       // between outputs, in the map that is written
  int64_t input_step_y;
};

// The input as the convolution reads it, and the convolution itself.
Staged stage_input(const Conv2dShape& shape);
Gather forward_gather(const Conv2dShape& shape, const Staged& input);

// The gradient of the output as the gradient of the input reads it, and its phases.
Staged stage_grad_output(const Conv2dShape& shape);
std::vector<Gather> backward_gathers(const Conv2dShape& shape, const Staged& grad_output);

// A matrix product of each pixel.
inline bool is_pointwise(const Conv2dShape& s) {
  return s.taps() == 1 && s.stride_h == 1 && s.stride_w == 1 && s.padding_h == 0 &&
         s.padding_w == 0;
}

// Rows of an image in a block, and where they stand in the block's staged map.
struct BlockRows {
  int64_t first, count, staged;
};

// What is worked on at a time, staged, convolved and reduced while it is in the cache: an image, or
// for a pointwise convolution a run of pixels. `shape` is that of the blocks, its batch their
// count. Of a forward an image may be several blocks, bands of `shape.out_h` rows of the result,
// the last of an image shorter: they read some rows of their neighbours, which is all that it
// costs.
struct DirectBlocks {
  Conv2dShape shape;
  int64_t missing;      // pixels that the last block lacks
  int64_t bands;        // blocks of an image
  int64_t in_h, out_h;  // of an image

  static DirectBlocks of(const Conv2dShape& shape);
  // Of a forward that takes `bytes` for each row of the result: bands where an image is not for the
  // second-level cache, or where there are fewer images than threads.
  static DirectBlocks of_result(const Conv2dShape& shape, int64_t bytes);

  // A block's rows of the result, counted through all images.
  int64_t first_row(int64_t block) const {
    return block / bands * out_h + block % bands * shape.out_h;
  }
  int64_t rows(int64_t block) const {
    const int64_t before = block % bands * shape.out_h;
    return before + shape.out_h < out_h ? shape.out_h : out_h - before;
  }
  // Its rows of the input, counted so as well; others of the staged map are border.
  BlockRows input_rows(int64_t block, const Staged& staged) const {
    const int64_t start = block % bands * shape.out_h * shape.stride_h - shape.padding_h;
    const int64_t from = start < 0 ? -start : 0;
    const int64_t to = staged.rows < in_h - start ? staged.rows : in_h - start;
    return {block / bands * in_h + start + from, to > from ? to - from : 0, from};
  }

  // Columns of a block, of `width` columns in a whole one.
  int64_t columns(int64_t block, int64_t width) const {
    return width - (block + 1 == shape.batch ? missing : 0);
  }
  // Pixels of the convolution's result in blocks [begin, end).
  int64_t pixels(int64_t begin, int64_t end) const {
    return (first_row(end) - first_row(begin)) * shape.out_w - (end == shape.batch ? missing : 0);
  }
};

// Each chunk of blocks has sums of its own, added up in order. There are `most` where threads share
// them evenly, so that a result is the same on 1, 2, 4, 8 or 16 of them, and else as many as they
// do share evenly. Chunks differ by one block at most, lest a thread waits for another.
struct BlockChunks {
  int64_t count, blocks;

  // Of the statistics of a result.
  static BlockChunks of_result(const Conv2dShape& shape) { return {shape, kMost}; }
  // Of gradients with `size` sums of the weight: those of a large one cost more than its blocks are
  // worth to another thread.
  static BlockChunks of_gradients(const Conv2dShape& shape, int64_t size) {
    return {shape, size <= kSmallWeight ? kMost : kMostLarge};
  }
  int64_t begin(int64_t chunk) const { return chunk * blocks / count; }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }

 private:
  static constexpr int64_t kSmallWeight = 8192, kMost = 64, kMostLarge = 16;

  BlockChunks(const Conv2dShape& shape, int64_t most);
  // Blocks of the thread that has most of them.
  int64_t longest(int64_t threads) const;
};

// A buffer of this thread's own, aligned to cache lines and kept from call to call. What it holds
// is undefined.
enum class Slot {
  input,
  grad_output,
  grad_input,
  weights,
  sums,
  transformed,
  products,
  gradient,
  weights_above,
  grad_above,
  recomputed,
  count
};
float* scratch(Slot slot, int64_t size);

// The same for a staged map, with zeros wherever staging does not write.
float* staging(Slot slot, const Staged& layout);

// Strides of a weight [O, C, KH, KW] in memory.
struct WeightStrides {
  int64_t out, in, y, x;
};

// Packs the taps `kernel` of a weight, rounded to T, the type of the maps, where it is wider;
// `transposed` swaps the roles of input and output channels.
template <typename T, typename W>
void pack_weights(const W* weight, const WeightStrides& strides, const Conv2dShape& shape,
                  const std::vector<int64_t>& kernel, bool transposed, float* packed);
// Adds up the chunks' packed gradients, in order, and writes them as the weight is laid out.
template <typename W>
void unpack_weight_gradient(const float* sums, int64_t chunks, const WeightStrides& strides,
                            const Conv2dShape& shape, W* gradient);

inline int64_t packed_size(const Conv2dShape& s, int64_t taps) {
  return blocks_of(s.in_channels) * blocks_of(s.out_channels) * taps * kBlock * kBlock;
}

// Per-channel values of relu((x - mean) * scale + shift).
struct DirectNorm {
  const float *mean, *scale, *shift;
};

// Of maps of T, which are widened on the way: staged maps and packed weights are always float.
template <typename T>
struct DirectForward {
  DirectBlocks blocks;
  Staged staged;
  Gather gather;
  DirectNorm norm;
  const T* input;
  const float *weights, *bias;
  const T* residual;
  T* output;
  bool winograd;
  int64_t input_stride, output_stride;  // between pixels; residual's is the output's
};

// The first convolution of the unit above, pointwise: its input's gradient is computed again where
// the unit below takes it, block by block, as that is cheaper than to write and read it.
template <typename T>
struct DirectAbove {
  Staged staged_grad;
  Gather gather;
  const float* weights;
  LineVector<float> shift;  // of the norm before it
  const T *grad_output, *pending_input;
  const float* coefficients;  // all three as of DirectBackward
};

template <typename T>
struct DirectBackward {
  DirectBlocks blocks;
  Staged staged, staged_grad;
  Gather gather;                      // of the forward
  std::vector<Gather> phases;         // of the gradient of the input
  std::vector<const float*> weights;  // packed for each phase
  DirectNorm norm;
  const T *input, *grad_output, *grad_activation;
  const float* wide_grad;       // grad_output where that is float and T is not; or null
  const T* pending_input;       // null where grad_output is the gradient itself
  const float* coefficients;    // [4, O]: scale, slope, centre, offset
  const T* pending_skip;        // added to a pending gradient, or null
  T* completed;                 // their sum; may be grad_output or pending_skip
  const DirectAbove<T>* above;  // computes grad_output, or null
  T* grad_z;                    // null where only its sums are wanted, or where
  const T* grad_skip;           // scale * grad_z is added to this instead:
  const float* wide_skip;       // in its place, where that is float and T is not
  float* grad_input;            // their sum; may be grad_skip
  int64_t input_stride;         // between pixels of input and all gradients like it
  int64_t output_stride;        // between pixels of grad_output and pending_input
  bool winograd;                // then the weights are transformed, of one phase
};

// A stride that is 1 or 2 in both directions is what the tiles are compiled for.
inline bool has_direct_stride(const Conv2dShape& shape) {
  return shape.stride_h == shape.stride_w && (shape.stride_h == 1 || shape.stride_h == 2);
}

}  // namespace preact::cpu
