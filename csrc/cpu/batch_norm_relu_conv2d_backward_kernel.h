#include "cpu/batch_norm_relu_backward_reduce_kernel.h"
#include "cpu/conv2d_tile.h"
#include "cpu/conv2d_winograd_tile.h"

// The gradient of the convolution's result, as it is.
struct GradSource {
  const float* grad_output;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t) const {
    return P::load(grad_output + i);
  }
};

// The same where the following norm's backward has yet to be applied:
// scale * dz + slope * (x - centre) + offset.
struct PendingGradSource {
  const float* dz;
  const float* input;
  const float *scale, *slope, *centre, *offset;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t c) const {
    const auto centred = P::load(input + i) - P::load(centre + c);
    return madd(P::load(scale + c), P::load(dz + i),
                madd(P::load(slope + c), centred, P::load(offset + c)));
  }
};

// The reduce pass over a gradient that lies where dz is to be: adds grad_activation, applies the
// ReLU's mask and writes dz in place.
template <bool Add>
struct MaskPass : ReducePass<float> {
  static constexpr int kRows = 4;
  const float* grad_activation;
  float* grad;

  template <typename P>
  PREACT_INLINE void element(Regs<P>& regs, int64_t i) const {
    const auto centred = P::load(input + i) - regs.affine.mean;
    auto gradient = P::load(grad + i);
    if constexpr (Add) gradient += P::load(grad_activation + i);
    const auto dz = where_active(regs.affine.z(centred), gradient);
    P::store(grad + i, dz);
    regs.dz += dz;
    regs.dz_x = madd(dz, centred, regs.dz_x);
  }
};

// The reduce pass over a gradient in the cache: scale * dz is added to grad_skip, and only that is
// written. What the sums add to the gradient of the input is not known yet and not in it.
struct AddPass : ReducePass<float> {
  static constexpr int kRows = 4;
  const float* grad_skip;
  float* grad_input;

  template <typename P>
  PREACT_INLINE void element(Regs<P>& regs, int64_t i) const {
    const auto centred = P::load(input + i) - regs.affine.mean;
    const auto dz = where_active(regs.affine.z(centred), P::load(grad_output + i));
    P::store(grad_input + i, madd(regs.affine.scale, dz, P::load(grad_skip + i)));
    regs.dz += dz;
    regs.dz_x = madd(dz, centred, regs.dz_x);
  }
};

// Runs a pass over `rows` rows, `stride` apart, and adds its sums [C] to sum_dz and sum_dz_x.
template <typename Pass>
void mask_rows(Pass pass, int64_t rows, int64_t channels, int64_t stride, float* sums,
               double* sum_dz, double* sum_dz_x) {
  pass.sum_dz = sums;
  pass.sum_dz_x = sums + channels;
  for (int64_t row = 0; row < rows; row += kSumRows) {
    std::fill_n(sums, 2 * channels, 0.0f);
    sweep_rows<float>(pass, row, std::min(row + kSumRows, rows), channels, stride);
    for (int64_t c = 0; c < channels; ++c) {
      sum_dz[c] += sums[c];
      sum_dz_x[c] += sums[channels + c];
    }
  }
}

// Blocks [begin, end): gradients of the input, masked, with their sums in sum_dz and sum_dz_x [C],
// either written or scaled and added to grad_skip, and of the weight, packed as the weights are, in
// grad_weight.
template <typename T>
void batch_norm_relu_conv2d_backward_part(const cpu::DirectBackward& task, int64_t begin,
                                          int64_t end, double* sum_dz, double* sum_dz_x,
                                          float* grad_weight) {
  const Conv2dShape& s = task.blocks.shape;
  float* const staged = cpu::staging(cpu::Slot::input, task.staged);
  float* const staged_grad = cpu::staging(cpu::Slot::grad_output, task.staged_grad);
  const auto weight_gradient =
      s.stride_w == 1 ? &direct_weight_gradient<kBlock> : &direct_weight_gradient<2 * kBlock>;
  const ChannelAffine<float> affine{task.norm.mean, task.norm.scale, task.norm.shift};
  float* const added =
      task.grad_z ? nullptr
                  : cpu::scratch(cpu::Slot::grad_input, s.in_h * s.in_w * task.input_stride);
  std::vector<float> sums(2 * s.in_channels);
  std::fill_n(sum_dz, s.in_channels, 0.0);
  std::fill_n(sum_dz_x, s.in_channels, 0.0);
  const WinogradTiles tiles = WinogradTiles::of(s.out_h, s.out_w);
  float* const gradient =
      task.winograd ? cpu::scratch(cpu::Slot::gradient, cpu::transformed_size(s)) : grad_weight;
  std::fill_n(gradient, task.winograd ? cpu::transformed_size(s) : cpu::packed_size(s, s.taps()),
              0.0f);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t in_columns = task.blocks.columns(block, s.in_w);
    const int64_t out_columns = task.blocks.columns(block, s.out_w);
    const int64_t row = block * s.in_h * s.in_w, offset = row * task.input_stride;
    const int64_t out_offset = block * s.out_h * s.out_w * task.output_stride;
    float* const grad_z = task.grad_z ? task.grad_z + offset : added;
    stage(ActivationSource{affine, task.input + offset}, s.in_h, in_columns, task.input_stride,
          task.staged, staged);
    const float* const grad = task.grad_output + out_offset;
    if (task.pending_input) {
      const float* const rows = task.coefficients;
      stage(PendingGradSource{grad, task.pending_input + out_offset, rows, rows + s.out_channels,
                              rows + 2 * s.out_channels, rows + 3 * s.out_channels},
            s.out_h, out_columns, task.output_stride, task.staged_grad, staged_grad);
    } else {
      stage(GradSource{grad}, s.out_h, out_columns, task.output_stride, task.staged_grad,
            staged_grad);
    }
    Ahead ahead;
    if (block + 1 < s.batch) {
      const int64_t in = s.in_h * s.in_w, in_step = in * task.input_stride;
      const int64_t out = s.out_h * s.out_w, out_step = out * task.output_stride;
      const auto next = [](const float* map, int64_t at) { return map ? map + at : nullptr; };
      ahead.read(task.input + offset + in_step, in, s.in_channels, task.input_stride);
      ahead.read(grad + out_step, out, s.out_channels, task.output_stride);
      ahead.read(next(task.pending_input, out_offset + out_step), out, s.out_channels,
                 task.output_stride);
      ahead.read(next(task.grad_activation, offset + in_step), in, s.in_channels,
                 task.input_stride);
      ahead.write(next(task.grad_z, offset + in_step), in, s.in_channels, task.input_stride);
      if (!task.grad_z) {
        ahead.write(task.grad_skip + offset + in_step, in, s.in_channels, task.input_stride);
      }
    }
    if (task.winograd) {
      winograd_map(WinogradTiles::of(s.in_h, s.in_w), staged_grad, task.staged_grad,
                   task.weights[0], s.in_channels, task.input_stride, nullptr, nullptr, grad_z,
                   ahead);
    }
    for (size_t i = 0; i < task.phases.size(); ++i) {
      const Gather& phase = task.phases[i];
      // Only whole blocks have more than one phase.
      const int64_t columns = s.stride_w == 1 ? in_columns : phase.columns;
      direct_map<kBlock>(phase, columns, staged_grad, task.staged_grad, task.weights[i],
                         s.in_channels, s.in_w, task.input_stride, nullptr, nullptr, grad_z,
                         i == 0 ? ahead : Ahead{});
    }
    const int64_t rows = s.in_h * in_columns;
    const ReducePass<float> reduce{affine, grad_z, task.input + offset, nullptr, nullptr};
    if (!task.grad_z) {
      mask_rows(AddPass{reduce, task.grad_skip + offset, task.grad_input + offset}, rows,
                s.in_channels, task.input_stride, sums.data(), sum_dz, sum_dz_x);
    } else if (task.grad_activation) {
      mask_rows(MaskPass<true>{reduce, task.grad_activation + offset, grad_z}, rows, s.in_channels,
                task.input_stride, sums.data(), sum_dz, sum_dz_x);
    } else {
      mask_rows(MaskPass<false>{reduce, nullptr, grad_z}, rows, s.in_channels, task.input_stride,
                sums.data(), sum_dz, sum_dz_x);
    }
    if (task.winograd) {
      winograd_weight_gradient(tiles, staged, task.staged, staged_grad, task.staged_grad, gradient);
    } else {
      weight_gradient(task.gather, out_columns, staged, task.staged, staged_grad, task.staged_grad,
                      gradient);
    }
  }
  if (task.winograd) cpu::transform_weight_gradient(gradient, s, grad_weight);
}
