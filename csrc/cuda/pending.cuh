// The gradient of a batch norm's input whose last step is left to the convolution that reads it.
#pragma once

#include "cuda/gemm_tile.cuh"

namespace preact::cuda {

enum Coefficient { kGradScale, kSlope, kCentre, kOffset, kCoefficients };

// Where `grad_output` is the masked gradient dz of the norm that follows, the gradient itself is
// scale dz + (slope (x - centre) + offset), of that norm's input x.
template <typename T>
struct Pending {
  Matrix<T> input;            // x, laid out as grad_output
  const float* coefficients;  // [kCoefficients, O]
};

// Coefficients of a range of channels in shared memory, [kCoefficients, size], zero past the last.
__device__ inline void load_coefficients(float* shared, const float* coefficients, int first,
                                         int size, int channels) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int c = first + i;
#pragma unroll
    for (int row = 0; row < kCoefficients; ++row) {
      shared[row * size + i] =
          c < channels ? coefficients[static_cast<int64_t>(row) * channels + c] : 0.0f;
    }
  }
}

// Completes the thread's own chunks of a tile of dz, which need no barrier to be read:
// `coefficients` are those of the tile's first column on. Rows that do not exist stay zero.
template <typename Tile, typename T>
__device__ inline void complete_tile(unsigned char* tile, const unsigned char* input,
                                     const int (&rows)[Tile::kPasses], const float* coefficients,
                                     int size) {
  const float* const own = coefficients + Tile::own_chunk() * kVector<T>;
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    if (rows[pass] < 0) continue;
    const int offset = Tile::offset(Tile::own_row(pass), Tile::own_chunk());
    T grad[kVector<T>], x[kVector<T>];
    load_vector(grad, tile + offset);
    load_vector(x, input + offset);
#pragma unroll
    for (int part = 0; part < kVector<T>; part += 4) {
      float row[kCoefficients][4];
#pragma unroll
      for (int i = 0; i < kCoefficients; ++i) {
        *reinterpret_cast<float4*>(row[i]) =
            *reinterpret_cast<const float4*>(own + i * size + part);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float rest =
            __fmaf_rn(row[kSlope][e], to_float(x[part + e]) - row[kCentre][e], row[kOffset][e]);
        grad[part + e] =
            from_float<T>(__fmaf_rn(row[kGradScale][e], to_float(grad[part + e]), rest));
      }
    }
    store_vector(tile + offset, grad);
  }
}

}  // namespace preact::cuda
