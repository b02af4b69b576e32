// Gradient of a 1x1 convolution's weight, the activation computed again from the norm's input.
#pragma once

#include "common/feature_map.h"
#include "cuda/gemm.cuh"
#include "cuda/pending.cuh"

namespace preact::cuda {

template <typename T>
struct Conv2dBackwardWeight {
  Matrix<T> grad_output;  // [rows, O]
  Pending<T> pending;
  Matrix<T> input;  // [pixels, C], read through `map`
  RowMap map;
  Norm<float> norm;  // of C channels
  int rows, rows_per_split;
  float* partial;  // [splits, O, C]
};

// The rows are split by shape alone, so a result does not depend on the device.
struct Splits {
  int64_t count;
  int rows;  // of each but the last

  static Splits of(int rows, int64_t tiles, int depth) {
    constexpr int64_t kBlocks = 528, kFewestSteps = 8;  // four blocks for each of 132 processors
    const int64_t most = ceil_div(rows, kFewestSteps * depth);
    const int64_t count =
        std::clamp<int64_t>(ceil_div(kBlocks, tiles), 1, std::max<int64_t>(most, 1));
    const int64_t each = std::max<int64_t>(ceil_div(rows, count * depth), 1) * depth;
    return {std::max<int64_t>(ceil_div(rows, each), 1), static_cast<int>(each)};
  }
};

template <typename Math, int kBlockN, bool kPending>
struct Conv2dBackwardWeightKernel {
  using Product = Gemm<Math, kBlockN, true, true, kPending>;
  static constexpr int kVectorsAt = Product::kSharedBytes;
  static constexpr int kCoefficientsAt = kVectorsAt + 3 * 4 * kBlockN;
  static constexpr int kSharedBytes =
      kCoefficientsAt + (kPending ? kCoefficients * 4 * kBlockM : 0);

  static int64_t tiles(int out_channels, int channels) {
    return ceil_div(out_channels, kBlockM) * ceil_div(channels, kBlockN);
  }
  static Splits splits(int rows, int out_channels, int channels) {
    return Splits::of(rows, tiles(out_channels, channels), kBlockK<typename Math::T>);
  }
};

template <typename Math, int kBlockN, bool kPending>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_relu_conv2d_backward_weight_kernel(const Conv2dBackwardWeight<typename Math::T> p) {
  using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN, kPending>;
  using Product = typename Kernel::Product;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  using T = typename Math::T;
  PREACT_DYNAMIC_SHARED(unsigned char, shared);

  const int channels = p.input.columns, out_channels = p.grad_output.columns;
  const int tiles_n = (channels + kBlockN - 1) / kBlockN;
  const int tiles = (out_channels + kBlockM - 1) / kBlockM * tiles_n;
  const int split = static_cast<int>(blockIdx.x) / tiles;
  const int tile = static_cast<int>(blockIdx.x) % tiles;
  const int first_row = tile / tiles_n * kBlockM;
  const int first_column = tile % tiles_n * kBlockN;
  const int begin = split * p.rows_per_split;
  const int end = p.rows - begin < p.rows_per_split ? p.rows : begin + p.rows_per_split;

  float* const vectors = reinterpret_cast<float*>(shared + Kernel::kVectorsAt);
  load_affine(vectors, p.norm, first_column, kBlockN, channels);
  [[maybe_unused]] float* const coefficients =
      reinterpret_cast<float*>(shared + Kernel::kCoefficientsAt);
  if constexpr (kPending) {
    load_coefficients(coefficients, p.pending.coefficients, first_row, kBlockM, out_channels);
  }
  __syncthreads();

  float sums[kWarpM / 16][Product::kTilesN][4] = {};
  Product::run(
      sums, shared, (end - begin + kBlockK<T> - 1) / kBlockK<T>,
      [&](int step, unsigned char* a, unsigned char* b) {
        const int k = begin + step * kBlockK<T>;
        int rows_a[TileA::kPasses], rows_b[TileB::kPasses];
#pragma unroll
        for (int pass = 0; pass < TileA::kPasses; ++pass) {
          const int row = k + TileA::own_row(pass);
          rows_a[pass] = row < end ? row : -1;
        }
#pragma unroll
        for (int pass = 0; pass < TileB::kPasses; ++pass) {
          rows_b[pass] = p.map(k + TileB::own_row(pass), end);
        }
        copy_tile<TileA>(a, p.grad_output, rows_a, first_row, out_channels);
        if constexpr (kPending) {
          copy_tile<TileA>(a + Product::kPendingAt, p.pending.input, rows_a, first_row,
                           out_channels);
        }
        copy_tile<TileB>(b, p.input, rows_b, first_column, channels);
      },
      [&]([[maybe_unused]] int step, [[maybe_unused]] unsigned char* a, unsigned char* b) {
        if constexpr (kPending) {
          int rows_a[TileA::kPasses];  // whether they exist, not which they are
#pragma unroll
          for (int pass = 0; pass < TileA::kPasses; ++pass) {
            const int row = begin + step * kBlockK<T> + TileA::own_row(pass);
            rows_a[pass] = row < end ? 0 : -1;
          }
          complete_tile<TileA, T>(a, a + Product::kPendingAt, rows_a, coefficients, kBlockM);
        }
        // Rows that do not exist are zero in A.
        activate_tile<TileB, T>(b, vectors, vectors + kBlockN, vectors + 2 * kBlockN);
      });

  float* const partial = p.partial + static_cast<int64_t>(split) * out_channels * channels;
  const bool vector = channels % 8 == 0;
  Product::walk(
      sums, shared,
      [&](int column, int row, float (&values)[8], int) {
        const int c = first_column + column, o = first_row + row;
        const int count = channels - c < 8 ? channels - c : 8;
        if (o >= out_channels || count <= 0) return;
        store_eight(partial + static_cast<int64_t>(o) * channels + c, values, count, vector);
      },
      [](int) {});
}

// Adds the splits of each element: `lanes` threads take every lanes-th split of one element, and
// their sums are added in order.
template <typename T>
__global__ void sum_splits_kernel(const float* partial, int64_t splits, int lanes, int64_t elements,
                                  T* result) {
  PREACT_SHARED(float, shared, kThreads);
  const int width = kThreads / lanes;
  const int lane = static_cast<int>(threadIdx.x) / width;
  const int64_t element =
      static_cast<int64_t>(blockIdx.x) * width + static_cast<int>(threadIdx.x) % width;
  float sum = 0;
  if (element < elements) {
    for (int64_t split = lane; split < splits; split += lanes) {
      sum += partial[split * elements + element];
    }
  }
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (lane == 0 && element < elements) {
    for (int i = 1; i < lanes; ++i) sum += shared[i * width + static_cast<int>(threadIdx.x)];
    result[element] = from_float<T>(sum);
  }
}

template <typename Math, int kBlockN, bool kPending>
void launch_conv2d_backward_weight(const Conv2dBackwardWeight<typename Math::T>& p,
                                   typename Math::T* grad_weight, Stream stream) {
  using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN, kPending>;
  const int out_channels = p.grad_output.columns, channels = p.input.columns;
  const int64_t splits = ceil_div(p.rows, p.rows_per_split);
  const int64_t tiles = Kernel::tiles(out_channels, channels);
  const int64_t elements = static_cast<int64_t>(out_channels) * channels;
  launch("batch_norm_relu_conv2d_backward_weight",
         batch_norm_relu_conv2d_backward_weight_kernel<Math, kBlockN, kPending>,
         dim3(static_cast<unsigned>(tiles * splits)), dim3(kThreads), Kernel::kSharedBytes, stream,
         p);
  int lanes = 1;
  while (lanes < 32 && 2 * lanes <= splits) lanes *= 2;
  launch("sum_splits", sum_splits_kernel<typename Math::T>,
         dim3(static_cast<unsigned>(ceil_div(elements, kThreads / lanes))), dim3(kThreads), 0,
         stream, p.partial, splits, lanes, elements, grad_weight);
}

}  // namespace preact::cuda
