// The main loop of a matrix product and the walk over its result, shared by the 1x1 convolution's
// forward and both gradients.
//
// A block forms a [kBlockM, kBlockN] tile of the result. Three stages of operand tiles stand in
// shared memory: two on their way, one being multiplied. Every thread applies BN and ReLU to the
// chunks it has copied itself, so one barrier per step is enough: behind it the tile is complete,
// and the stage that is filled next has been read by all.
#pragma once

#include "cuda/gemm_tile.cuh"
#include "cuda/target.cuh"

namespace preact::cuda {

constexpr int kStages = 3;
// A thread takes eight neighbours of a slab's row.
constexpr int kSlabRowFloats = kSlabColumns + 8;
constexpr int kSlabBytes = kBlockM * kSlabRowFloats * 4;
constexpr int kEights = kSlabColumns / 8;
constexpr int kSlabRows = kThreads / kEights;  // rows in one pass of the block

// Which row of an operand belongs to an index of the product's rows: the same one, or where a 1x1
// convolution strides, the pixel it reads (gather) or the one that it gave a result to (scatter).
struct RowMap {
  int height, width;              // of the images whose pixels are the product's rows
  int other_height, other_width;  // of the operand's images
  int stride_h, stride_w;
  bool scatter;

  __device__ int operator()(int row, int rows) const {
    if (row >= rows) return -1;
    if (stride_h == 1 && stride_w == 1) return row;
    int w = row % width, h = row / width % height;
    const int image = row / width / height;
    if (scatter) {
      if (h % stride_h != 0 || w % stride_w != 0) return -1;
      h /= stride_h;
      w /= stride_w;
    } else {
      h *= stride_h;
      w *= stride_w;
    }
    return (image * other_height + h) * other_width + w;
  }
};

// The affine vectors of a range of channels, in shared memory: mean, scale and bias in turn, each
// `size` floats, zero past the last channel.
__device__ inline void load_affine(float* vectors, const Norm<float>& norm, int first, int size,
                                   int channels) {
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const int c = first + i;
    float mean = 0, scale = 0, bias = 0;
    if (c < channels) {
      mean = norm.mean[c];
      scale = inverse_std(norm.var[c], norm.eps);
      if (norm.weight != nullptr) scale = __fmul_rn(scale, norm.weight[c]);
      if (norm.bias != nullptr) bias = norm.bias[c];
    }
    vectors[i] = mean;
    vectors[size + i] = scale;
    vectors[2 * size + i] = bias;
  }
}

// kPending: a stage has room for a second tile of A's shape, behind those of A and B.
template <typename Math_, int kBlockN_, bool kStridedA, bool kStridedB, bool kPending_ = false>
struct Gemm {
  using Math = Math_;
  using T = typename Math::T;
  static constexpr int kBlockN = kBlockN_;
  static constexpr int kTilesN = kBlockN / kWarpsN / 8;
  using TileA = Tile<T, kBlockM, kStridedA>;
  using TileB = Tile<T, kBlockN, kStridedB>;
  static constexpr bool kPending = kPending_;
  static constexpr int kPendingAt = TileA::kBytes + TileB::kBytes;  // from a stage's start
  static constexpr int kStageBytes = kPendingAt + (kPending ? TileA::kBytes : 0);
  static constexpr int kSharedBytes =
      kStages * kStageBytes > kSlabBytes ? kStages * kStageBytes : kSlabBytes;

  // Where the thread's warp stands in the tile of the result.
  __device__ static int warp_m() { return static_cast<int>(threadIdx.x) / 32 / kWarpsN * kWarpM; }
  __device__ static int warp_n() {
    return static_cast<int>(threadIdx.x) / 32 % kWarpsN * (kSlabColumns / kWarpsN);
  }

  // sums += A B over `steps` tiles. copy(step, tile_a, tile_b) starts a step's copies and
  // activate(step, tile_a, tile_b) works on the thread's own chunks once they are there.
  template <typename Copy, typename Activate>
  __device__ static void run(Sums<kTilesN>& sums, unsigned char* shared, int steps,
                             const Copy& copy, const Activate& activate) {
    const auto tile_a = [&](int step) { return shared + step % kStages * kStageBytes; };
    for (int step = 0; step < kStages - 1; ++step) {
      if (step < steps) copy(step, tile_a(step), tile_a(step) + TileA::kBytes);
      cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<kStages - 2>();
      activate(step, tile_a(step), tile_a(step) + TileA::kBytes);
      __syncthreads();
      const int next = step + kStages - 1;
      if (next < steps) copy(next, tile_a(next), tile_a(next) + TileA::kBytes);
      cp_async_commit();
      multiply<TileA, TileB>(Math{}, sums, tile_a(step), tile_a(step) + TileA::kBytes, warp_m(),
                             warp_n());
    }
  }

  // Calls visit(slab, row, column, values, pass) for every eight neighbours of the tile, in the
  // same order of rows for every thread; `row` and `column` count from the tile's corner. After
  // each slab, finish(slab). A barrier stands before each slab: stages, the slab before it and
  // what finish left in shared memory have been read by then.
  template <typename Visit, typename Finish>
  __device__ static void walk(const Sums<kTilesN>& sums, unsigned char* shared, const Visit& visit,
                              const Finish& finish) {
    float* const slab = reinterpret_cast<float*>(shared);
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < kBlockN; first += kSlabColumns) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
        for (int part = 0; part < kTilesPerSlab; ++part) {
          const float (&tile)[4] = sums[i][first / kSlabColumns * kTilesPerSlab + part];
          const int row = warp_m() + 16 * i + lane / 4;
          const int column = warp_n() + 8 * part + lane % 4 * 2;
          *reinterpret_cast<float2*>(slab + slab_index(row, column)) =
              make_float2(tile[0], tile[1]);
          *reinterpret_cast<float2*>(slab + slab_index(row + 8, column)) =
              make_float2(tile[2], tile[3]);
        }
      }
      __syncthreads();
      const int column = static_cast<int>(threadIdx.x) % kEights * 8;
#pragma unroll 1  // the sums still to be written leave few registers
      for (int pass = 0; pass < kBlockM / kSlabRows; ++pass) {
        const int row = static_cast<int>(threadIdx.x) / kEights + pass * kSlabRows;
        float values[8];
        *reinterpret_cast<float4*>(values) =
            *reinterpret_cast<const float4*>(slab + slab_index(row, column));
        *reinterpret_cast<float4*>(values + 4) =
            *reinterpret_cast<const float4*>(slab + slab_index(row, column + 4));
        visit(first + column, row, values, pass);
      }
      finish(first);
    }
  }

 private:
  // Four-float groups alternate between the halves of a row, 36 floats apart: neither the sums'
  // float2 stores nor the float4 loads of eight columns meet a bank twice.
  __device__ static int slab_index(int row, int column) {
    return row * kSlabRowFloats + column / 4 % 2 * (kSlabRowFloats / 2) + column / 8 * 4 +
           column % 4;
  }
};

}  // namespace preact::cuda
