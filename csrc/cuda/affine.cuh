// The batch norm of one channel as the kernels apply it: z = (x - mean) * scale + bias.
//
// Forward, backward and every kernel use these functions, so a ReLU mask that is computed again is
// the same bit for bit. Rounding is spelled out operation by operation: neither compiler contracts.
#pragma once

#include "cuda/target.cuh"

namespace preact::cuda {

// The vectors of a batch norm, each [C] in the accumulation type; weight and bias may be null.
template <typename A>
struct Norm {
  const A* mean;
  const A* var;
  const A* weight;
  const A* bias;
  A eps;
};

__device__ inline float inverse_std(float var, float eps) {
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(var, eps)));
}
__device__ inline double inverse_std(double var, double eps) {
  return __ddiv_rn(1.0, __dsqrt_rn(__dadd_rn(var, eps)));
}

// a * b + c, rounded once.
__device__ inline float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ inline double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

__device__ inline float normalize(float x, float mean, float scale, float bias) {
  return fused(__fsub_rn(x, mean), scale, bias);
}
__device__ inline double normalize(double x, double mean, double scale, double bias) {
  return fused(__dsub_rn(x, mean), scale, bias);
}

// `value` where z is positive or NaN, zero elsewhere: with value = z, ReLU as PyTorch computes it.
template <typename A>
__device__ inline A where_active(A z, A value) {
  return z <= A(0) ? A(0) : value;
}

}  // namespace preact::cuda
