// Gradient of a 1x1 convolution's input under the ReLU's mask, and the batch norm's two sums.
#pragma once

#include "cuda/column_sums.cuh"
#include "cuda/pending.cuh"

namespace preact::cuda {

template <typename T>
struct Conv2dBackwardInput {
  Matrix<T> grad_output;  // [pixels, O], read through `map`
  Pending<T> pending;
  Matrix<T> weight;  // [O, C]
  RowMap map;
  Norm<float> norm;          // of C channels
  const T* input;            // [rows, C]
  const T* grad_activation;  // [rows, C], joins the product; or null
  T* grad_z;                 // [rows, C]
  int rows, channels;
  bool vector;       // eight columns of each map of C channels are aligned to 16 bytes
  float* tile_dz_x;  // [tiles of rows, C]: sums of dz * (x - mean)
  float* tile_dz;
};

template <typename Math, int kBlockN, bool kPending>
struct Conv2dBackwardInputKernel {
  using Product = Gemm<Math, kBlockN, false, true, kPending>;
  using T = typename Math::T;
  // Behind the slab, where stages are no longer needed.
  static constexpr int kPairsAt = kSlabBytes;
  static constexpr int kVectorsAt = kPairsAt + kWarpPairsBytes;
  static constexpr int kEnd = kVectorsAt + 3 * 4 * kBlockN;
  // Beyond both, because every stage needs them.
  static constexpr int kCoefficientsAt =
      kEnd > Product::kSharedBytes ? kEnd : Product::kSharedBytes;

  __host__ __device__ static int padded(int out_channels) {
    return (out_channels + kBlockK<T> - 1) / kBlockK<T> * kBlockK<T>;
  }
  static int shared_bytes(int out_channels) {
    return kCoefficientsAt + (kPending ? kCoefficients * 4 * padded(out_channels) : 0);
  }
};

template <typename Math, int kBlockN, bool kPending>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_relu_conv2d_backward_input_kernel(const Conv2dBackwardInput<typename Math::T> p) {
  using Kernel = Conv2dBackwardInputKernel<Math, kBlockN, kPending>;
  using Product = typename Kernel::Product;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  using T = typename Math::T;
  PREACT_DYNAMIC_SHARED(unsigned char, shared);

  const int tiles_n = (p.channels + kBlockN - 1) / kBlockN;
  const int tile_m = static_cast<int>(blockIdx.x) / tiles_n;
  const int first_row = tile_m * kBlockM;
  const int first_column = static_cast<int>(blockIdx.x) % tiles_n * kBlockN;
  const int depth = p.grad_output.columns;

  int rows_a[TileA::kPasses];
#pragma unroll
  for (int pass = 0; pass < TileA::kPasses; ++pass) {
    rows_a[pass] = p.map(first_row + TileA::own_row(pass), p.rows);
  }

  [[maybe_unused]] float* const coefficients =
      reinterpret_cast<float*>(shared + Kernel::kCoefficientsAt);
  [[maybe_unused]] const int padded = Kernel::padded(depth);
  if constexpr (kPending) {
    load_coefficients(coefficients, p.pending.coefficients, 0, padded, depth);
    __syncthreads();
  }

  float sums[kWarpM / 16][Product::kTilesN][4] = {};
  Product::run(
      sums, shared, (depth + kBlockK<T> - 1) / kBlockK<T>,
      [&](int step, unsigned char* a, unsigned char* b) {
        const int k = step * kBlockK<T>;
        int rows_b[TileB::kPasses];
#pragma unroll
        for (int pass = 0; pass < TileB::kPasses; ++pass) {
          const int row = k + TileB::own_row(pass);
          rows_b[pass] = row < depth ? row : -1;
        }
        copy_tile<TileA>(a, p.grad_output, rows_a, k, depth);
        if constexpr (kPending) {
          copy_tile<TileA>(a + Product::kPendingAt, p.pending.input, rows_a, k, depth);
        }
        copy_tile<TileB>(b, p.weight, rows_b, first_column, p.channels);
      },
      [&](int step, unsigned char* a, unsigned char*) {
        if constexpr (kPending) {
          complete_tile<TileA, T>(a, a + Product::kPendingAt, rows_a,
                                  coefficients + step * kBlockK<T>, padded);
        }
      });

  __syncthreads();  // the stages have been read
  float* const vectors = reinterpret_cast<float*>(shared + Kernel::kVectorsAt);
  load_affine(vectors, p.norm, first_column, kBlockN, p.channels);
  const int limit = p.rows - first_row < kBlockM ? p.rows - first_row : kBlockM;
  ColumnSums column_sums;
  column_sums.start();
  Product::walk(
      sums, shared,
      [&](int column, int row, float (&values)[8], int) {
        const int c = first_column + column;
        const int count = p.channels - c < 8 ? p.channels - c : 8;
        if (row >= limit || count <= 0) return;
        const int64_t offset = static_cast<int64_t>(first_row + row) * p.channels + c;
        float x[8];
        load_eight(x, p.input + offset, count, p.vector);
        if (p.grad_activation != nullptr) {
          float other[8];
          load_eight(other, p.grad_activation + offset, count, p.vector);
          for (int e = 0; e < 8; ++e) values[e] += other[e];
        }
        T dz[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float mean = vectors[column + e];
          const float z = normalize(x[e], mean, vectors[kBlockN + column + e],
                                    vectors[2 * kBlockN + column + e]);
          dz[e] = from_float<T>(where_active(z, values[e]));
          const float rounded = to_float(dz[e]);
          column_sums.first[e] = __fmaf_rn(rounded, x[e] - mean, column_sums.first[e]);
          column_sums.second[e] += rounded;
        }
        store_eight(p.grad_z + offset, dz, count, p.vector);
      },
      [&](int slab) {
        const int c = first_column + slab;
        const int left = p.channels - c;
        const int64_t at = static_cast<int64_t>(tile_m) * p.channels + c;
        column_sums.finish(reinterpret_cast<float*>(shared + Kernel::kPairsAt), p.tile_dz_x + at,
                           p.tile_dz + at, left);
        column_sums.start();
      });
}

template <typename Math, int kBlockN, bool kPending>
void launch_conv2d_backward_input(const Conv2dBackwardInput<typename Math::T>& p,
                                  float* grad_weight, float* grad_bias, Stream stream) {
  const int64_t tiles_m = ceil_div(p.rows, kBlockM), tiles_n = ceil_div(p.channels, kBlockN);
  launch("batch_norm_relu_conv2d_backward_input",
         batch_norm_relu_conv2d_backward_input_kernel<Math, kBlockN, kPending>,
         dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(kThreads),
         Conv2dBackwardInputKernel<Math, kBlockN, kPending>::shared_bytes(p.grad_output.columns),
         stream, p);
  launch("merge_sums", merge_sums_kernel<float>,
         dim3(static_cast<unsigned>(ceil_div(p.channels, kMergeColumns))), dim3(kThreads), 0,
         stream, p.tile_dz_x, p.tile_dz, tiles_m, p.channels, p.norm, grad_weight, grad_bias);
}

}  // namespace preact::cuda
