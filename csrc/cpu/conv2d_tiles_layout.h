// How the convolutions by tiles lay out what they read: shared by kernels and host code.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv2d_direct.h"
#include "cpu/element.h"
#include "cpu/line_vector.h"
#include "cpu/turns.h"

namespace preact::cpu {

// Channels come in groups of 32, zeros where they run out: a tile's row of one pixel. A map of 16
// channels stays one of 16, and a row is two neighbouring pixels: two taps of the kernel at once.
inline bool is_narrow(int64_t channels) { return channels == 16; }
inline int64_t group_of(int64_t channels) { return is_narrow(channels) ? 16 : 32; }
inline int64_t padded(int64_t channels) {
  return (channels + group_of(channels) - 1) / group_of(channels) * group_of(channels);
}

// Per-channel values and sums stand as the halves of 32-bit words do: of each 32 channels those of
// even index, then those of odd. Of 16 channels there are two pixels to a vector, so two of each.
inline int64_t vector_size_of(int64_t channels) { return (channels + 31) / 32 * 32; }
inline int64_t channel_of(int64_t lane, int64_t channels) {
  const int64_t c = lane / 32 * 32 + lane % 16 * 2 + lane % 32 / 16;
  return is_narrow(channels) ? c % 16 : c;
}
LineVector<float> by_lane(const float* values, int64_t channels);
// A convolution's bias, by lane but of 16 channels in order: as tiles leave their sums.
LineVector<float> tile_bias(const BFloat16* bias, int64_t channels);

// A step of the sum over taps and input channels: 32 channels of one tap, or 16 of two neighbours.
struct Step {
  int64_t tap, next;  // indices in the kernel; next is -1 where there is none
  int64_t channel;
};

// A gather as the tiles read it.
struct TileGather {
  Gather gather;
  std::vector<Step> steps;
  std::vector<int64_t> offsets;  // of each step in the staged map, in elements
  std::vector<int64_t> pairs;    // of each step that are not padding, of its 16

  TileGather(Gather gather, int64_t channels);
};

// Staged maps are [rows][columns][padded channels]. A row's last tile may read past its end, with
// a stride of 2 as many as 32 pixels; what it finds there goes into sums that nobody reads.
inline int64_t staged_size(const Staged& s) {
  return (s.rows * s.columns + 32) * padded(s.channels);
}

// Weights for a gather, [groups of outputs][steps][1 or 2 tiles][16 pairs of inputs][16][2].
inline int64_t packed_tiles(int64_t outputs, const TileGather& gather) {
  return padded(outputs) * static_cast<int64_t>(gather.steps.size()) * 32;
}
// They may be float in memory, and are rounded on the way.
template <typename W>
void pack_tiles(const W* weight, const WeightStrides& strides, const Conv2dShape& shape,
                const TileGather& gather, bool transposed, BFloat16* packed);

// The activation and the gradient as the gradient of the weight reads them, pixels in pairs: output
// pixel (y, x) is number y * pitch + x, with zero gradients between rows. The activation, read at
// stride * pixel + tap, has a plane for each phase of the stride.
struct PairedPixels {
  int64_t stride, pitch, steps;  // steps of 32 pixels
  int64_t pairs;                 // of a plane of the activation
  int64_t plane_bytes;
  std::vector<int64_t> leads;  // pixels before a plane's first column, so that pairs are even

  PairedPixels(const Conv2dShape& shape, const Staged& staged);
  int64_t phases() const { return stride * stride; }
};

// Gradients of the weight [groups of outputs][groups of inputs][taps][inputs][outputs], channels
// within each group by lane.
inline int64_t weight_sums(const Conv2dShape& s) {
  return padded(s.in_channels) * padded(s.out_channels) * s.taps();
}
// Where this holds the groups are [inputs][outputs], each [outputs][inputs] within: of a pointwise
// convolution, whose pixels no tap shifts, the narrower map is the one to be turned.
inline bool turns_gradient(const Conv2dShape& s) {
  return is_pointwise(s) && !is_narrow(s.in_channels) && !is_narrow(s.out_channels) &&
         padded(s.in_channels) >= padded(s.out_channels);
}
template <typename W>
void unpack_weight_sums(const float* sums, int64_t chunks, const WeightStrides& strides,
                        const Conv2dShape& shape, W* gradient);

// The batch norm of the input, by lane.
struct TileNorm {
  LineVector<float> mean, scale, shift;

  TileNorm(const DirectNorm& norm, int64_t channels)
      : mean(by_lane(norm.mean, channels)),
        scale(by_lane(norm.scale, channels)),
        shift(by_lane(norm.shift, channels)) {}
};

struct TileForward {
  DirectBlocks blocks;
  Staged staged;
  TileGather gather;
  TileNorm norm;
  LineVector<float> bias;  // by lane, but of 16 channels in order
  const BFloat16 *input, *weights, *residual;
  BFloat16* output;
  int64_t input_stride, output_stride;  // between pixels; residual's is the output's
};

// As DirectAbove.
struct TileAbove {
  Staged staged_grad;
  TileGather gather;
  const BFloat16* weights;
  LineVector<float> shift;  // by lane
  const BFloat16 *grad_output, *pending_input;
  LineVector<float> coefficients;  // as of TileBackward
};

struct TileBackward {
  DirectBlocks blocks;
  Staged staged, staged_grad;
  std::vector<TileGather> phases;
  std::vector<const BFloat16*> weights;  // packed for each phase
  PairedPixels paired;
  TileNorm norm;
  const BFloat16 *input, *grad_output, *grad_activation;
  const BFloat16* pending_input;   // null where grad_output is the gradient itself
  LineVector<float> coefficients;  // [4][O], by lane: scale, slope, centre, offset
  const float* wide_grad;          // grad_output where it is float, pending always; or null
  const BFloat16* pending_skip;    // added to a pending gradient, or null
  BFloat16* completed;             // their sum; may be grad_output or pending_skip
  const TileAbove* above;          // computes grad_output, or null
  BFloat16* grad_z;                // null where only its sums are wanted, or where
  const float* wide_skip;          // scale * grad_z is added to this instead, or,
  const BFloat16* grad_skip;       // where it is not float, to this:
  float* grad_input;               // their sum; may be wide_skip
  int64_t input_stride;            // between pixels of input and all gradients like it
  int64_t output_stride;           // between pixels of grad_output and pending_input
};

}  // namespace preact::cpu
