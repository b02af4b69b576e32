#include "cpu/batch_norm_relu_backward_reduce_kernel.h"
#include "cpu/conv2d_tile.h"
#include "cpu/conv2d_winograd_tile.h"

// The gradient of the convolution's result, as it is.
template <typename T>
struct GradSource {
  using Element = T;
  const T* grad_output;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t) const {
    return P::load(grad_output + i);
  }
  template <typename P>
  PREACT_INLINE void keep(int64_t, typename P::reg) const {}
};

// The same where the following norm's backward has yet to be applied:
// scale * dz + slope * (x - centre) + offset.
template <typename G, typename T>
struct PendingGradSource {
  using Element = T;
  const G* dz;
  const T* input;
  const float *scale, *slope, *centre, *offset;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t c) const {
    const auto centred = P::load(input + i) - P::load(centre + c);
    return madd(P::load(scale + c), P::load(dz + i),
                madd(P::load(slope + c), centred, P::load(offset + c)));
  }
  template <typename P>
  PREACT_INLINE void keep(int64_t, typename P::reg) const {}
};

// The same plus what came over the shortcut, written on the way. Where MASK, dz has yet to pass the
// ReLU of the norm, whose scale and mean are the pending gradient's scale and centre.
template <bool MASK, typename T>
struct CompletedGradSource {
  using Element = T;
  PendingGradSource<T, T> pending;
  const T* skip;
  T* completed;
  const float* shift;

  template <typename P>
  PREACT_INLINE typename P::reg value(int64_t i, int64_t c) const {
    const auto centred = P::load(pending.input + i) - P::load(pending.centre + c);
    auto dz = P::load(pending.dz + i);
    if constexpr (MASK) {
      dz = where_active(madd(centred, P::load(pending.scale + c), P::load(shift + c)), dz);
    }
    return madd(P::load(pending.scale + c), dz,
                madd(P::load(pending.slope + c), centred, P::load(pending.offset + c))) +
           P::load(skip + i);
  }
  template <typename P>
  PREACT_INLINE void keep(int64_t i, typename P::reg grad) const {
    P::store(completed + i, grad);
  }
};

// The reduce pass alone, its sums grouped as those of MaskPass are.
template <typename T>
struct SumPass : ReducePass<T> {
  static constexpr int kRows = 4;
};

// The reduce pass over a gradient that lies where dz is to be: adds grad_activation, applies the
// ReLU's mask and writes dz in place.
template <bool Add, typename T>
struct MaskPass : ReducePass<T> {
  static constexpr int kRows = 4;
  const T* grad_activation;
  T* grad;

  template <typename P, typename Regs>
  PREACT_INLINE void element(Regs& regs, int64_t i) const {
    const auto centred = P::load(this->input + i) - regs.affine.mean;
    auto gradient = P::load(grad + i);
    if constexpr (Add) gradient = rounded<P, T>(gradient + P::load(grad_activation + i));
    const auto dz = where_active(regs.affine.z(centred), gradient);
    P::store(grad + i, dz);
    regs.dz += dz;
    regs.dz_x = madd(dz, centred, regs.dz_x);
  }
};

// The reduce pass over a gradient in the cache: scale * dz is added to grad_skip, and only that is
// written. What the sums add to the gradient of the input is not known yet and not in it.
template <typename S, typename T>
struct AddPass : ReducePass<T> {
  static constexpr int kRows = 4;
  const S* grad_skip;
  float* grad_input;

  template <typename P, typename Regs>
  PREACT_INLINE void element(Regs& regs, int64_t i) const {
    const auto centred = P::load(this->input + i) - regs.affine.mean;
    const auto dz = where_active(regs.affine.z(centred), P::load(this->grad_output + i));
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

// Multiplications of vectors that a block takes.
template <typename T>
int64_t block_work(const cpu::DirectBackward<T>& task, int64_t in_columns, int64_t out_columns) {
  const Conv2dShape& s = task.blocks.shape;
  int64_t work = 0;
  if (task.winograd) {
    work += winograd_work(WinogradTiles::of(s.in_h, s.in_w), s.out_channels, s.in_channels);
    work += winograd_work(WinogradTiles::of(s.out_h, s.out_w), s.in_channels, s.out_channels);
  } else {
    work += direct_work(task.gather, out_columns, s.in_channels, s.out_channels);
  }
  for (const Gather& phase : task.phases) {
    const int64_t columns = s.stride_w == 1 ? in_columns : phase.columns;
    work += direct_work(phase, columns, s.out_channels, s.in_channels);
  }
  if (task.above) {
    const int64_t channels = task.above->staged_grad.channels;
    work += direct_work(task.above->gather, out_columns, channels, s.out_channels);
  }
  return work;
}

template <typename G, typename T>
PendingGradSource<G, T> pending_source(const G* dz, const T* input, const float* coefficients,
                                       int64_t channels) {
  return {dz,
          input,
          coefficients,
          coefficients + channels,
          coefficients + 2 * channels,
          coefficients + 3 * channels};
}

// The gradient of the result of one block, as the kernels read it; staged_above is for that of the
// convolution above.
template <typename T>
void stage_gradient(const cpu::DirectBackward<T>& task, int64_t block, int64_t columns,
                    float* staged, float* staged_above, Ahead& ahead) {
  const Conv2dShape& s = task.blocks.shape;
  const int64_t offset = block * s.out_h * s.out_w * task.output_stride;
  const auto write = [&](const auto& source) {
    stage(source, s.out_h, columns, task.output_stride, task.staged_grad, staged);
  };
  const T* const grad = task.grad_output ? task.grad_output + offset : nullptr;
  if (!task.pending_input) {
    write(GradSource<T>{grad});
    return;
  }
  const T* const input = task.pending_input + offset;
  if (task.wide_grad) {
    write(pending_source(task.wide_grad + offset, input, task.coefficients, s.out_channels));
    return;
  }
  const auto pending = pending_source(grad, input, task.coefficients, s.out_channels);
  if (!task.pending_skip) {
    write(pending);
    return;
  }
  const T* const skip = task.pending_skip + offset;
  T* const completed = task.completed + offset;
  if (!task.above) {
    write(CompletedGradSource<false, T>{pending, skip, completed, nullptr});
    return;
  }
  const cpu::DirectAbove<T>& above = *task.above;
  const int64_t channels = above.staged_grad.channels;
  const int64_t at = block * s.out_h * s.out_w * channels;
  stage(pending_source(above.grad_output + at, above.pending_input + at, above.coefficients,
                       channels),
        s.out_h, columns, channels, above.staged_grad, staged_above);
  T* const dz =
      reinterpret_cast<T*>(cpu::scratch(cpu::Slot::recomputed, s.out_h * s.out_w * s.out_channels));
  direct_map<kBlock, T>(above.gather, columns, staged_above, above.staged_grad, above.weights,
                        s.out_channels, s.out_w, s.out_channels, nullptr, nullptr, dz, ahead);
  const T* const computed = dz;
  write(CompletedGradSource<true, T>{
      pending_source(computed, input, task.coefficients, s.out_channels), skip, completed,
      above.shift.data()});
}

// Blocks [begin, end): gradients of the input, masked, with their sums in sum_dz and sum_dz_x [C],
// either written or scaled and added to grad_skip, and of the weight, packed as the weights are, in
// grad_weight.
template <typename T>
void batch_norm_relu_conv2d_backward_part(const cpu::DirectBackward<T>& task, int64_t begin,
                                          int64_t end, double* sum_dz, double* sum_dz_x,
                                          float* grad_weight) {
  const Conv2dShape& s = task.blocks.shape;
  float* const staged = cpu::staging(cpu::Slot::input, task.staged);
  float* const staged_grad = cpu::staging(cpu::Slot::grad_output, task.staged_grad);
  float* const staged_above =
      task.above ? cpu::staging(cpu::Slot::grad_above, task.above->staged_grad) : nullptr;
  const auto weight_gradient =
      s.stride_w == 1 ? &direct_weight_gradient<kBlock> : &direct_weight_gradient<2 * kBlock>;
  const ChannelAffine<float> affine{task.norm.mean, task.norm.scale, task.norm.shift};
  T* const added = task.grad_z ? nullptr
                               : reinterpret_cast<T*>(cpu::scratch(
                                     cpu::Slot::grad_input, s.in_h * s.in_w * task.input_stride));
  LineVector<float> sums(2 * s.in_channels);
  std::fill_n(sum_dz, s.in_channels, 0.0);
  std::fill_n(sum_dz_x, s.in_channels, 0.0);
  const WinogradTiles tiles = WinogradTiles::of(s.out_h, s.out_w);
  float* const gradient =
      task.winograd ? cpu::scratch(cpu::Slot::gradient, cpu::transformed_size(s)) : grad_weight;
  for (int64_t block = begin; block < end; ++block) {
    const int64_t in_columns = task.blocks.columns(block, s.in_w);
    const int64_t out_columns = task.blocks.columns(block, s.out_w);
    const int64_t row = block * s.in_h * s.in_w, offset = row * task.input_stride;
    T* const grad_z = task.grad_z ? task.grad_z + offset : added;
    stage(ActivationSource<T>{affine, task.input + offset}, s.in_h, in_columns, task.input_stride,
          task.staged, staged);
    Ahead ahead = block_after(task, block);
    ahead.spread(block_work(task, in_columns, out_columns));
    stage_gradient(task, block, out_columns, staged_grad, staged_above, ahead);
    if (task.winograd) {
      winograd_map<T>(WinogradTiles::of(s.in_h, s.in_w), staged_grad, task.staged_grad,
                      task.weights[0], s.in_channels, task.input_stride, nullptr, nullptr, grad_z,
                      ahead);
    }
    for (size_t i = 0; i < task.phases.size(); ++i) {
      const Gather& phase = task.phases[i];
      // Only whole blocks have more than one phase.
      const int64_t columns = s.stride_w == 1 ? in_columns : phase.columns;
      direct_map<kBlock, T>(phase, columns, staged_grad, task.staged_grad, task.weights[i],
                            s.in_channels, s.in_w, task.input_stride, nullptr, nullptr, grad_z,
                            ahead);
    }
    const int64_t rows = s.in_h * in_columns;
    const ReducePass<T> reduce{affine, grad_z, task.input + offset, nullptr, nullptr};
    const auto run = [&](const auto& pass) {
      mask_rows(pass, rows, s.in_channels, task.input_stride, sums.data(), sum_dz, sum_dz_x);
    };
    if (task.grad_skip) {
      run(AddPass<T, T>{reduce, task.grad_skip + offset, task.grad_input + offset});
    } else if (task.wide_skip) {
      run(AddPass<float, T>{reduce, task.wide_skip + offset, task.grad_input + offset});
    } else if (!task.grad_z) {
      run(SumPass<T>{reduce});
    } else if (task.grad_activation) {
      run(MaskPass<true, T>{reduce, task.grad_activation + offset, grad_z});
    } else {
      run(MaskPass<false, T>{reduce, nullptr, grad_z});
    }
    if (task.winograd) {
      winograd_weight_gradient(tiles, staged, task.staged, staged_grad, task.staged_grad,
                               block == begin, gradient, ahead);
    } else {
      weight_gradient(task.gather, out_columns, staged, task.staged, staged_grad, task.staged_grad,
                      block == begin, gradient, ahead);
    }
  }
  if (task.winograd) cpu::transform_weight_gradient(gradient, s, grad_weight);
}
