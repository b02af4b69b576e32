// Gradient of a 1x1 convolution's weight, the activation computed again from the norm's input.
#pragma once

#include "cuda/gemm.cuh"

namespace preact::cuda {

template <typename T>
struct Conv2dBackwardWeight {
  Matrix<T> grad_output;  // [rows, O]
  Matrix<T> input;        // [pixels, C], read through `map`
  RowMap map;
  Norm<float> norm;  // of C channels
  int64_t rows, rows_per_split;
  float* partial;  // [splits, O, C]
};

// The rows are split by shape alone, so a result does not depend on the device.
struct Splits {
  int64_t count, rows;  // rows of each but the last

  static Splits of(int64_t rows, int64_t tiles, int depth) {
    constexpr int64_t kBlocks = 528, kFewestSteps = 8;
    const int64_t wanted = (kBlocks + tiles - 1) / tiles;
    const int64_t most = (rows + kFewestSteps * depth - 1) / (kFewestSteps * depth);
    int64_t count = wanted < most ? wanted : most;
    if (count < 1) count = 1;
    const int64_t steps = (rows + count * depth - 1) / (count * depth);
    const int64_t each = (steps < 1 ? 1 : steps) * depth;
    return {rows == 0 ? 1 : (rows + each - 1) / each, each};
  }
};

template <typename Math, int kBlockN>
struct Conv2dBackwardWeightKernel {
  using Product = Gemm<Math, kBlockN, true, true>;
  static constexpr int kVectorsAt = Product::kSharedBytes;
  static constexpr int kSharedBytes = kVectorsAt + 3 * 4 * kBlockN;

  static Splits splits(int64_t rows, int64_t out_channels, int64_t channels) {
    const int64_t tiles = (out_channels + kBlockM - 1) / kBlockM;
    return Splits::of(rows, tiles * ((channels + kBlockN - 1) / kBlockN),
                      kBlockK<typename Math::T>);
  }
};

template <typename Math, int kBlockN>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_relu_conv2d_backward_weight_kernel(const Conv2dBackwardWeight<typename Math::T> p) {
  using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN>;
  using Product = typename Kernel::Product;
  using TileA = typename Product::TileA;
  using TileB = typename Product::TileB;
  using T = typename Math::T;
  PREACT_DYNAMIC_SHARED(unsigned char, shared);

  const int64_t channels = p.input.columns, out_channels = p.grad_output.columns;
  const int64_t tiles_n = (channels + kBlockN - 1) / kBlockN;
  const int64_t tiles = (out_channels + kBlockM - 1) / kBlockM * tiles_n;
  const int64_t split = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int64_t first_row = tile / tiles_n * kBlockM;
  const int64_t first_column = tile % tiles_n * kBlockN;
  const int64_t begin = split * p.rows_per_split;
  const int64_t end = begin + p.rows_per_split < p.rows ? begin + p.rows_per_split : p.rows;

  float* const vectors = reinterpret_cast<float*>(shared + Kernel::kVectorsAt);
  load_affine(vectors, p.norm, first_column, kBlockN, channels);
  __syncthreads();

  float sums[kWarpM / 16][Product::kTilesN][4] = {};
  Product::run(
      sums, shared, static_cast<int>((end - begin + kBlockK<T> - 1) / kBlockK<T>),
      [&](int step, unsigned char* a, unsigned char* b) {
        const int64_t k = begin + static_cast<int64_t>(step) * kBlockK<T>;
        int rows_a[TileA::kPasses], rows_b[TileB::kPasses];
#pragma unroll
        for (int pass = 0; pass < TileA::kPasses; ++pass) {
          const int64_t row = k + TileA::own_row(pass);
          rows_a[pass] = row < end ? static_cast<int>(row) : -1;
        }
#pragma unroll
        for (int pass = 0; pass < TileB::kPasses; ++pass) {
          rows_b[pass] = p.map(k + TileB::own_row(pass), end);
        }
        copy_tile<TileA>(a, p.grad_output, rows_a, first_row, out_channels);
        copy_tile<TileB>(b, p.input, rows_b, first_column, channels);
      },
      [&](int step, unsigned char*, unsigned char* b) {
        const int64_t k = begin + static_cast<int64_t>(step) * kBlockK<T>;
        int rows_b[TileB::kPasses];
#pragma unroll
        for (int pass = 0; pass < TileB::kPasses; ++pass) {
          rows_b[pass] = k + TileB::own_row(pass) < end ? 0 : -1;  // whether, not which
        }
        activate_tile<TileB, T>(b, rows_b, vectors, vectors + kBlockN, vectors + 2 * kBlockN);
      });

  float* const partial = p.partial + split * out_channels * channels;
  const bool vector = channels % 8 == 0;
  Product::walk(
      sums, shared,
      [&](int column, int row, float(&values)[8], int) {
        const int64_t c = first_column + column, o = first_row + row;
        const int count = static_cast<int>(channels - c < 8 ? channels - c : 8);
        if (o >= out_channels || count <= 0) return;
        store_eight(partial + o * channels + c, values, count, vector);
      },
      [](int) {});
}

// Adds the splits of each element: `lanes` threads take every lanes-th split of one element, and
// their sums are added in order.
template <typename T>
__global__ void sum_splits_kernel(const float* partial, int64_t splits, int lanes,
                                  int64_t elements, T* result) {
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

template <typename Math, int kBlockN>
void launch_conv2d_backward_weight(const Conv2dBackwardWeight<typename Math::T>& p,
                                   typename Math::T* grad_weight, Stream stream) {
  using Kernel = Conv2dBackwardWeightKernel<Math, kBlockN>;
  const int64_t out_channels = p.grad_output.columns, channels = p.input.columns;
  const int64_t splits = Kernel::splits(p.rows, out_channels, channels).count;
  const int64_t tiles = (out_channels + kBlockM - 1) / kBlockM *
                        ((channels + kBlockN - 1) / kBlockN);
  launch("batch_norm_relu_conv2d_backward_weight",
         batch_norm_relu_conv2d_backward_weight_kernel<Math, kBlockN>,
         dim3(static_cast<unsigned>(tiles * splits)), dim3(kThreads), Kernel::kSharedBytes, stream,
         p);
  int lanes = 1;
  while (lanes < 32 && 2 * lanes <= splits) lanes *= 2;
  const int64_t width = kThreads / lanes;
  launch("sum_splits", sum_splits_kernel<typename Math::T>,
         dim3(static_cast<unsigned>((out_channels * channels + width - 1) / width)),
         dim3(kThreads), 0, stream, p.partial, splits, lanes, out_channels * channels,
         grad_weight);
}

}  // namespace preact::cuda
