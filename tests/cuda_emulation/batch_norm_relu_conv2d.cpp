// The fused 1x1 convolution's three ops. `math` is half, tf32 or float, `block_n` a tile's columns.
// TWO_KINDS leaves two of them, for the mutations.
#include "cuda/batch_norm_relu_conv2d.cuh"
#include "cuda/batch_norm_relu_conv2d_backward_input.cuh"
#include "cuda/batch_norm_relu_conv2d_backward_weight.cuh"
#include "harness.h"

using namespace preact::cuda;

int number(const harness::Case& c, const char* name) { return static_cast<int>(c.integer(name)); }

struct Sizes {
  int64_t tiles_in, tiles_out, offset;
  int in_rows, out_rows, channels, out_channels, height, width, out_height, out_width, stride_h,
      stride_w;

  explicit Sizes(const harness::Case& c)
      : offset(c.integer("offset")),
        channels(number(c, "channels")),
        out_channels(number(c, "out_channels")),
        height(number(c, "height")),
        width(number(c, "width")),
        stride_h(number(c, "stride_h")),
        stride_w(number(c, "stride_w")) {
    out_height = (height - 1) / stride_h + 1;
    out_width = (width - 1) / stride_w + 1;
    in_rows = number(c, "batch") * height * width;
    out_rows = number(c, "batch") * out_height * out_width;
    tiles_in = (in_rows + kBlockM - 1) / kBlockM;
    tiles_out = (out_rows + kBlockM - 1) / kBlockM;
  }
  RowMap gather() const {
    return {out_height, out_width, height, width, stride_h, stride_w, false};
  }
  RowMap scatter() const {
    return {height, width, out_height, out_width, stride_h, stride_w, true};
  }
};

Norm<float> norm_of(harness::Case& c) {
  return {c.input<float>("mean"), c.input<float>("var"), c.input<float>("weight"),
          c.input<float>("bias"), static_cast<float>(c.number("eps"))};
}

template <typename T>
Matrix<T> matrix(harness::Case& c, const char* name, int columns, int64_t offset) {
  return {c.input<T>(name, offset), columns, columns % kVector<T> == 0 && offset == 0};
}

template <typename T>
Pending<T> pending_of(harness::Case& c, const Sizes& s) {
  return {matrix<T>(c, "pending_input", s.out_channels, s.offset), c.input<float>("coefficients")};
}

template <typename Math, int kBlockN>
void forward(harness::Case& c) {
  using T = typename Math::T;
  const Sizes s(c);
  const Conv2dForward<T> p{matrix<T>(c, "input", s.channels, s.offset),
                           matrix<T>(c, "conv_weight", s.channels, 0),
                           s.gather(),
                           norm_of(c),
                           c.input<T>("conv_bias"),
                           c.input<T>("residual"),
                           c.output<T>("output", int64_t{s.out_rows} * s.out_channels),
                           s.out_rows,
                           s.out_channels,
                           s.out_channels % 8 == 0,
                           c.workspace<float>(s.tiles_out * s.out_channels),
                           c.workspace<float>(s.tiles_out * s.out_channels)};
  launch_conv2d_forward<Math, kBlockN>(p, c.output<float>("out_mean", s.out_channels),
                                       c.output<float>("out_var", s.out_channels), {});
}

template <typename Math, int kBlockN, bool kPending>
void backward_input(harness::Case& c) {
  using T = typename Math::T;
  const Sizes s(c);
  const Conv2dBackwardInput<T> p{matrix<T>(c, "grad_output", s.out_channels, s.offset),
                                 pending_of<T>(c, s),
                                 matrix<T>(c, "conv_weight", s.channels, 0),
                                 s.scatter(),
                                 norm_of(c),
                                 c.input<T>("input"),
                                 c.input<T>("grad_activation"),
                                 c.output<T>("grad_z", s.in_rows * s.channels),
                                 s.in_rows,
                                 s.channels,
                                 s.channels % 8 == 0,
                                 c.workspace<float>(s.tiles_in * s.channels),
                                 c.workspace<float>(s.tiles_in * s.channels)};
  launch_conv2d_backward_input<Math, kBlockN, kPending>(
      p, c.output<float>("grad_weight", s.channels), c.output<float>("grad_bias", s.channels), {});
}

template <typename Math, int kBlockN, bool kPending>
void backward_weight(harness::Case& c) {
  using T = typename Math::T;
  using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN, kPending>;
  const Sizes s(c);
  const Splits splits = Kernel::splits(s.out_rows, s.out_channels, s.channels);
  const Conv2dBackwardWeight<T> p{matrix<T>(c, "grad_output", s.out_channels, s.offset),
                                  pending_of<T>(c, s),
                                  matrix<T>(c, "input", s.channels, s.offset),
                                  s.gather(),
                                  norm_of(c),
                                  s.out_rows,
                                  splits.rows,
                                  c.workspace<float>(splits.count * s.out_channels * s.channels)};
  launch_conv2d_backward_weight<Math, kBlockN, kPending>(
      p, c.output<T>("grad_conv_weight", s.out_channels * s.channels), {});
}

// As the host code chooses: a pending gradient has tiles of 64 columns.
template <typename Math, int kBlockN>
void run(harness::Case& c) {
  const std::string op = c.text("op");
  const bool pending = c.integer("pending") != 0;
  if (op == "forward") return forward<Math, kBlockN>(c);
  if (op == "backward_input" && pending) return backward_input<Math, 64, true>(c);
  if (op == "backward_input") return backward_input<Math, kBlockN, false>(c);
  if (op == "backward_weight" && pending) return backward_weight<Math, 64, true>(c);
  if (op == "backward_weight") return backward_weight<Math, kBlockN, false>(c);
  emulation::fail("this program lacks %s", op.c_str());
}

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) {
    harness::Case(folders[i]).run([](harness::Case& c) {
      const std::string kind = c.text("math") + "/" + c.text("dtype") + "/" + c.text("block_n");
      if (kind == "half/float16/64") return run<HalfMath<__half>, 64>(c);
      if (kind == "half/bfloat16/128") return run<HalfMath<__nv_bfloat16>, 128>(c);
#ifndef TWO_KINDS
      if (kind == "half/float16/128") return run<HalfMath<__half>, 128>(c);
      if (kind == "half/bfloat16/64") return run<HalfMath<__nv_bfloat16>, 64>(c);
      if (kind == "tf32/float32/64") return run<Tf32Math, 64>(c);
      if (kind == "float/float32/64") return run<FloatMath, 64>(c);
#endif
      emulation::fail("no kernel for %s", kind.c_str());
    });
  }
  return 0;
}
