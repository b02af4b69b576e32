// Tiles of a matrix product in shared memory: their layout, how they are filled, and the product of
// two of them on tensor cores or with plain multiply-adds.
//
// An operand lies in memory as rows of contiguous elements. Either a row holds neighbours of the
// reduced index k (kStrided false: tile [rows, kBlockK]) or of the other index (kStrided true: tile
// [kBlockK, columns]). 16-byte chunks of a tile's row are permuted so that neither the copies nor
// the fragments' loads meet a bank twice.
#pragma once

#include "cuda/affine.cuh"
#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace preact::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32, kWarpsM = 4, kWarpsN = 2;
constexpr int kBlockM = 128;
constexpr int kWarpM = kBlockM / kWarpsM;
constexpr int kChunkBytes = 16;
constexpr int kBlockKBytes = 64;

// Ways to multiply: T is the type in memory, kStep the depth of one step.
template <typename T_>
struct HalfMath {
  using T = T_;
  static constexpr int kStep = 16;
};
struct Tf32Math {
  using T = float;
  static constexpr int kStep = 8;
};
struct FloatMath {
  using T = float;
  static constexpr int kStep = 4;
};

template <typename T>
constexpr int kBlockK = kBlockKBytes / static_cast<int>(sizeof(T));

template <typename T, int kExtent, bool kStrided_>
struct Tile {
  static constexpr bool kStrided = kStrided_;
  static constexpr int kRows = kStrided ? kBlockK<T> : kExtent;
  static constexpr int kColumns = kStrided ? kExtent : kBlockK<T>;
  static constexpr int kRowBytes = kColumns * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / kChunkBytes;
  static constexpr int kBytes = kRows * kRowBytes;
  static constexpr int kRowsPerPass = kThreads / kChunks;
  static constexpr int kPasses = kRows / kRowsPerPass;
  static_assert(kPasses * kRowsPerPass == kRows);

  // Eight rows at one chunk, or for 32-bit elements four strided ones, fall into different banks.
  __device__ static int offset(int row, int chunk) {
    const int mixed = !kStrided        ? chunk ^ ((row >> 1) & 3)
                      : sizeof(T) == 2 ? chunk ^ (row & 7)
                                       : chunk ^ ((row & 3) << 1);
    return row * kRowBytes + mixed * kChunkBytes;
  }
  __device__ static int element(int row, int column) {
    constexpr int kPerChunk = kVector<T>;
    return offset(row, column / kPerChunk) + column % kPerChunk * static_cast<int>(sizeof(T));
  }
  // The thread's chunk, the same in all its rows, and its row in a pass.
  __device__ static int own_chunk() { return static_cast<int>(threadIdx.x) % kChunks; }
  __device__ static int own_row(int pass) {
    return static_cast<int>(threadIdx.x) / kChunks + pass * kRowsPerPass;
  }
};

// An operand in memory, [rows, columns] with rows dense. `vector`: every row is 16-byte aligned.
// Rows and columns are counted in 32 bits, offsets in 64.
template <typename T>
struct Matrix {
  const T* data;
  int columns;
  bool vector;
};

// Starts the copies of the thread's chunks: rows `rows[pass]` (negative: none, zeros instead) and
// the columns from `column` on, which exist below `last`.
template <typename Tile, typename T>
__device__ inline void copy_tile(unsigned char* tile, const Matrix<T>& matrix,
                                 const int (&rows)[Tile::kPasses], int column, int last) {
  column += Tile::own_chunk() * kVector<T>;
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    unsigned char* const target = tile + Tile::offset(Tile::own_row(pass), Tile::own_chunk());
    const bool valid = rows[pass] >= 0 && column < last;
    const int64_t offset = static_cast<int64_t>(rows[pass]) * matrix.columns + column;
    const T* const source = matrix.data + offset;  // where not `valid`, nothing reads it
    if (matrix.vector) {
      cp_async_16(target, source, valid);
    } else {
#pragma unroll 1  // the unusual way may not take registers from the usual one
      for (int e = 0; e < kVector<T>; ++e) {
        reinterpret_cast<T*>(target)[e] =
            valid && column + e < last ? source[e] : from_float<T>(0.0f);
      }
    }
  }
}

// Applies BN and ReLU to the thread's own chunks, which need no barrier to be read: the vectors are
// those of the tile's first column on. Rows that do not exist come out as the ReLU of the shift:
// they must meet zeros, or give results that nobody keeps.
template <typename Tile, typename T>
__device__ inline void activate_tile(unsigned char* tile, const float* mean, const float* scale,
                                     const float* bias) {
  const int first = Tile::own_chunk() * kVector<T>;
  float m[kVector<T>], s[kVector<T>], b[kVector<T>];
#pragma unroll
  for (int part = 0; part < kVector<T>; part += 4) {
    *reinterpret_cast<float4*>(m + part) = *reinterpret_cast<const float4*>(mean + first + part);
    *reinterpret_cast<float4*>(s + part) = *reinterpret_cast<const float4*>(scale + first + part);
    *reinterpret_cast<float4*>(b + part) = *reinterpret_cast<const float4*>(bias + first + part);
  }
#pragma unroll
  for (int pass = 0; pass < Tile::kPasses; ++pass) {
    unsigned char* const chunk = tile + Tile::offset(Tile::own_row(pass), Tile::own_chunk());
    T values[kVector<T>];
    load_vector(values, chunk);
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      const float z = normalize(to_float(values[e]), m[e], s[e], b[e]);
      values[e] = from_float<T>(where_active(z, z));
    }
    store_vector(chunk, values);
  }
}

// The result leaves in slabs of 64 columns, to each of which every warp gives its part, so that few
// sums stay in registers while a slab is worked on.
constexpr int kSlabColumns = 64;
constexpr int kTilesPerSlab = kSlabColumns / kWarpsN / 8;

// First column of a warp's tile j, counted from its first.
__device__ constexpr int tile_column(int j) {
  return j / kTilesPerSlab * kSlabColumns + j % kTilesPerSlab * 8;
}

// The sums of a warp: [kWarpM, 8 kTilesN] in mma's layout. Of the 16x8 tile [i][j] a lane holds
// rows lane / 4 (elements 0 and 1) and lane / 4 + 8 (2 and 3), columns lane % 4 * 2 and + 1.
template <int kTilesN>
using Sums = float[kWarpM / 16][kTilesN][4];

// sums += A B of the warp whose rows begin at m0 and whose columns at n0, one tile deep.
template <typename TileA, typename TileB, int kTilesN, typename T>
__device__ inline void multiply(HalfMath<T>, Sums<kTilesN>& sums, const unsigned char* a,
                                const unsigned char* b, int m0, int n0) {
  const int lane = threadIdx.x % 32;
  const int low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
#pragma unroll
  for (int step = 0; step < kBlockK<T> / 16; ++step) {
    uint32_t of_a[kWarpM / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      const int m = m0 + 16 * i;
      if constexpr (TileA::kStrided) {
        ldmatrix_x4_trans(of_a[i], a + TileA::offset(16 * step + 8 * high + low, m / 8 + middle));
      } else {
        ldmatrix_x4(of_a[i], a + TileA::offset(m + 8 * middle + low, 2 * step + high));
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesN; j += 2) {
      const int n = n0 + tile_column(j);
      uint32_t of_b[4];
      if constexpr (TileB::kStrided) {
        ldmatrix_x4_trans(of_b, b + TileB::offset(16 * step + 8 * middle + low, n / 8 + high));
      } else {
        ldmatrix_x4(of_b, b + TileB::offset(n + 8 * high + low, 2 * step + middle));
      }
      const uint32_t left[2] = {of_b[0], of_b[1]}, right[2] = {of_b[2], of_b[3]};
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) {
        mma_16816<T>(sums[i][j], of_a[i], left);
        mma_16816<T>(sums[i][j + 1], of_a[i], right);
      }
    }
  }
}

// Element (index, k) of an operand, whichever way it lies.
template <typename Tile>
__device__ inline float value_at(const unsigned char* tile, int index, int k) {
  return *reinterpret_cast<const float*>(
      tile + (Tile::kStrided ? Tile::element(k, index) : Tile::element(index, k)));
}

template <typename TileA, typename TileB, int kTilesN>
__device__ inline void multiply(Tf32Math, Sums<kTilesN>& sums, const unsigned char* a,
                                const unsigned char* b, int m0, int n0) {
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll
  for (int step = 0; step < kBlockK<float> / 8; ++step) {
    const int k = 8 * step + member;
    uint32_t of_a[kWarpM / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
      const int m = m0 + 16 * i + group;
      for (int r = 0; r < 4; ++r) {
        of_a[i][r] = to_tf32(value_at<TileA>(a, m + r % 2 * 8, k + r / 2 * 4));
      }
    }
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int n = n0 + tile_column(j) + group;
      const uint32_t of_b[2] = {to_tf32(value_at<TileB>(b, n, k)),
                                to_tf32(value_at<TileB>(b, n, k + 4))};
      for (int i = 0; i < kWarpM / 16; ++i) mma_1688_tf32(sums[i][j], of_a[i], of_b);
    }
  }
}

// Four neighbours in k of one row or column.
template <typename Tile>
__device__ inline void load_four(float (&values)[4], const unsigned char* tile, int index, int k) {
  if constexpr (Tile::kStrided) {
    for (int e = 0; e < 4; ++e) values[e] = value_at<Tile>(tile, index, k + e);
  } else {
    load_vector(values, tile + Tile::offset(index, k / 4));
  }
}

template <typename TileA, typename TileB, int kTilesN>
__device__ inline void multiply(FloatMath, Sums<kTilesN>& sums, const unsigned char* a,
                                const unsigned char* b, int m0, int n0) {
  const int lane = threadIdx.x % 32, group = lane / 4, member = lane % 4;
#pragma unroll 1
  for (int k = 0; k < kBlockK<float>; k += 4) {
    float of_a[kWarpM / 8][4];
#pragma unroll
    for (int i = 0; i < kWarpM / 8; ++i) load_four<TileA>(of_a[i], a, m0 + 8 * i + group, k);
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float of_b[4];
        load_four<TileB>(of_b, b, n0 + tile_column(j) + 2 * member + half, k);
#pragma unroll
        for (int i = 0; i < kWarpM / 8; ++i) {
          float& sum = sums[i / 2][j][i % 2 * 2 + half];
          for (int e = 0; e < 4; ++e) sum = __fmaf_rn(of_a[i][e], of_b[e], sum);
        }
      }
    }
  }
}

}  // namespace preact::cuda
