// conv2d(relu(bn(input))) + bias + residual for a 1x1 kernel, and the statistics of the result.
#pragma once

#include "cuda/column_sums.cuh"

namespace preact::cuda {

template <typename T>
struct Conv2dForward {
  Matrix<T> input;   // [pixels, C], read through `map`
  Matrix<T> weight;  // [O, C]
  RowMap map;
  Norm<float> norm;   // of C channels
  const T* bias;      // [O] or null
  const T* residual;  // [rows, O] or null
  T* output;          // [rows, O]
  int rows, out_channels;
  bool vector;        // eight columns of output and residual are aligned to 16 bytes
  float* tile_means;  // [tiles of rows, O]
  float* tile_m2s;
};

template <typename Math, int kBlockN>
struct Conv2dForwardKernel {
  using Product = Gemm<Math, kBlockN, false, false>;
  using T = typename Math::T;
  static constexpr int kVectorsAt = Product::kSharedBytes > kSlabBytes + kWarpPairsBytes
                                        ? Product::kSharedBytes
                                        : kSlabBytes + kWarpPairsBytes;

  // Channels in whole tiles, for which shared memory holds the affine vectors.
  __host__ __device__ static int padded(int channels) {
    return (channels + kBlockK<T> - 1) / kBlockK<T> * kBlockK<T>;
  }
  __host__ __device__ static int shared_bytes(int channels) {
    return kVectorsAt + 3 * 4 * padded(channels);
  }
};

template <typename Math, int kBlockN>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_relu_conv2d_kernel(const Conv2dForward<typename Math::T> p) {
  using Kernel = Conv2dForwardKernel<Math, kBlockN>;
  using Product = typename Kernel::Product;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  using T = typename Math::T;
  PREACT_DYNAMIC_SHARED(unsigned char, shared);

  // Blocks that share rows run together, so the rows come from memory once.
  const int tiles_n = (p.out_channels + kBlockN - 1) / kBlockN;
  const int tile_m = static_cast<int>(blockIdx.x) / tiles_n;
  const int first_row = tile_m * kBlockM;
  const int first_column = static_cast<int>(blockIdx.x) % tiles_n * kBlockN;
  const int channels = p.input.columns;

  const int size = Kernel::padded(channels);
  float* const vectors = reinterpret_cast<float*>(shared + Kernel::kVectorsAt);
  load_affine(vectors, p.norm, 0, size, channels);

  int rows_a[TileA::kPasses], rows_b[TileB::kPasses];
#pragma unroll
  for (int pass = 0; pass < TileA::kPasses; ++pass) {
    rows_a[pass] = p.map(first_row + TileA::own_row(pass), p.rows);
  }
#pragma unroll
  for (int pass = 0; pass < TileB::kPasses; ++pass) {
    const int row = first_column + TileB::own_row(pass);
    rows_b[pass] = row < p.out_channels ? row : -1;
  }
  __syncthreads();

  float sums[kWarpM / 16][Product::kTilesN][4] = {};
  Product::run(
      sums, shared, size / kBlockK<T>,
      [&](int step, unsigned char* a, unsigned char* b) {
        copy_tile<TileA>(a, p.input, rows_a, step * kBlockK<T>, channels);
        copy_tile<TileB>(b, p.weight, rows_b, step * kBlockK<T>, channels);
      },
      [&](int step, unsigned char* a, unsigned char*) {
        const float* const at = vectors + step * kBlockK<T>;
        activate_tile<TileA, T>(a, at, at + size, at + 2 * size);
      });

  const int limit = p.rows - first_row < kBlockM ? p.rows - first_row : kBlockM;
  ColumnMoments moments;
  moments.start();
  float bias[8];
  Product::walk(
      sums, shared,
      [&](int column, int row, float (&values)[8], int pass) {
        const int c = first_column + column;
        const int count = p.out_channels - c < 8 ? p.out_channels - c : 8;
        if (pass == 0) {
          for (int e = 0; e < 8; ++e) {
            bias[e] = p.bias != nullptr && e < count ? to_float(p.bias[c + e]) : 0.0f;
          }
        }
        if (row >= limit || count <= 0) return;
        const int64_t offset = static_cast<int64_t>(first_row + row) * p.out_channels + c;
        for (int e = 0; e < 8; ++e) values[e] += bias[e];
        if (p.residual != nullptr) {
          float residual[8];
          load_eight(residual, p.residual + offset, count, p.vector);
          for (int e = 0; e < 8; ++e) values[e] += residual[e];
        }
        T rounded[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          rounded[e] = from_float<T>(values[e]);
          moments.add(e, to_float(rounded[e]), pass == 0);
        }
        store_eight(p.output + offset, rounded, count, p.vector);
      },
      [&](int slab) {
        const int c = first_column + slab;
        const int left = p.out_channels - c;
        const int64_t at = static_cast<int64_t>(tile_m) * p.out_channels + c;
        moments.finish(reinterpret_cast<float*>(shared + kSlabBytes), limit, p.tile_means + at,
                       p.tile_m2s + at, left);
        moments.start();
      });
}

template <typename Math, int kBlockN>
void launch_conv2d_forward(const Conv2dForward<typename Math::T>& p, float* mean, float* var,
                           Stream stream) {
  const int64_t tiles_m = ceil_div(p.rows, kBlockM), tiles_n = ceil_div(p.out_channels, kBlockN);
  launch("batch_norm_relu_conv2d", batch_norm_relu_conv2d_kernel<Math, kBlockN>,
         dim3(static_cast<unsigned>(tiles_m * tiles_n)), dim3(kThreads),
         Conv2dForwardKernel<Math, kBlockN>::shared_bytes(p.input.columns), stream, p);
  launch("merge_moments", merge_moments_kernel<float>,
         dim3(static_cast<unsigned>(ceil_div(p.out_channels, kMergeColumns))), dim3(kThreads), 0,
         stream, p.tile_means, p.tile_m2s, p.rows, p.out_channels, mean, var);
}

}  // namespace preact::cuda
