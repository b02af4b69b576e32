// Stands in for csrc/cuda/ptx.cuh: the same instructions on the host, with the fragment layouts of
// the PTX ISA's tables.
//
// An asynchronous copy ruins its target at once and lands only in the wait for its group, so both a
// missing wait and a buffer filled too early show. ldmatrix fails on a bank conflict.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace emulation {

// Copies of one thread that have not landed, in groups; the last group is open.
class AsyncCopies {
 public:
  static AsyncCopies& of_this_thread() {
    static std::vector<AsyncCopies> threads(1024);
    AsyncCopies& own = threads[Block::current().thread()];
    const uint3 block = blockIdx;
    if (block.x != own.block_.x || block.y != own.block_.y || block.z != own.block_.z) {
      for (const auto& group : own.groups_) {
        if (!group.empty()) fail("a block ended while cp.async had copies under way");
      }
      own = AsyncCopies();
      own.block_ = block;
    }
    return own;
  }

  void add(void* target, const void* source, bool valid) {
    if (reinterpret_cast<uintptr_t>(target) % 16 != 0 ||
        reinterpret_cast<uintptr_t>(source) % 16 != 0) {
      fail("cp.async of 16 bytes at an address that is not a multiple of 16");
    }
    poison(target, 16);
    groups_.back().push_back({target, source, valid});
  }
  void commit() { groups_.emplace_back(); }
  void wait(size_t pending) {
    while (groups_.size() - 1 > pending) {
      for (const Copy& copy : groups_.front()) {
        if (copy.valid) {
          std::memcpy(copy.target, copy.source, 16);
        } else {
          std::memset(copy.target, 0, 16);
        }
      }
      groups_.erase(groups_.begin());
    }
  }

 private:
  struct Copy {
    void* target;
    const void* source;
    bool valid;
  };
  std::vector<std::vector<Copy>> groups_{1};
  uint3 block_{~0u, ~0u, ~0u};
};

struct LoadMatrices {
  const unsigned char* row;
  uint32_t result[4];
};

template <bool kTransposed>
void load_matrices(Site site, uint32_t (&r)[4], const void* row) {
  LoadMatrices arguments{static_cast<const unsigned char*>(row), {}};
  warp(site, 0xffffffffu, arguments, [](LoadMatrices** lanes, unsigned) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t elements[8][8];
      unsigned banks = 0;
      for (int i = 0; i < 8; ++i) {
        const unsigned char* const from = lanes[8 * matrix + i]->row;
        const auto address = reinterpret_cast<uintptr_t>(from);
        if (address % 16 != 0) fail("ldmatrix of a row that is not aligned to 16 bytes");
        banks |= 1u << (address / 16 % 8);
        std::memcpy(elements[i], from, 16);
      }
      if (banks != 0xffu) fail("ldmatrix meets bank conflicts");
      for (int lane = 0; lane < 32; ++lane) {
        const int i = lane / 4, j = lane % 4 * 2;
        const uint32_t low = kTransposed ? elements[j][i] : elements[i][j];
        const uint32_t high = kTransposed ? elements[j + 1][i] : elements[i][j + 1];
        lanes[lane]->result[matrix] = low | high << 16;
      }
    }
  });
  std::memcpy(r, arguments.result, sizeof r);
}

template <typename T>
float half_of(uint32_t pair, int index) {
  T value;
  value.bits = static_cast<uint16_t>(pair >> 16 * index);
  if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

// Row, column and packing of a lane's registers for m16n8k16 with 16-bit and m16n8k8 with 32-bit
// elements; kDepth is the depth in elements.
template <typename T>
struct Fragments {
  static constexpr int kPacked = sizeof(T) == 2 ? 2 : 1, kDepth = 8 * kPacked;
  uint32_t a[4], b[2];
  float d[4];

  static float value(uint32_t word, int index) {
    if constexpr (sizeof(T) == 2) {
      return half_of<T>(word, index);
    } else {
      return __uint_as_float(word & 0xffffe000u);  // the tensor core reads no more
    }
  }
};

template <typename T>
void multiply_add(Site site, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  using F = Fragments<T>;
  F arguments;
  std::memcpy(arguments.a, a, sizeof a);
  std::memcpy(arguments.b, b, sizeof b);
  std::memcpy(arguments.d, d, sizeof d);
  warp(site, 0xffffffffu, arguments, [](F** lanes, unsigned) {
    float left[16][F::kDepth], right[F::kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, member = lane % 4;
      for (int e = 0; e < F::kPacked; ++e) {
        const int k = member * F::kPacked + e;
        for (int half = 0; half < 2; ++half) {
          const int deep = k + half * F::kDepth / 2;
          left[group][deep] = F::value(lanes[lane]->a[2 * half], e);
          left[group + 8][deep] = F::value(lanes[lane]->a[2 * half + 1], e);
          right[deep][group] = F::value(lanes[lane]->b[half], e);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = lanes[lane]->d[i];
        for (int k = 0; k < F::kDepth; ++k) sum += left[row][k] * right[k][column];
        lanes[lane]->d[i] = sum;
      }
    }
  });
  std::memcpy(d, arguments.d, sizeof d);
}

}  // namespace emulation

namespace preact::cuda {

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::AsyncCopies::of_this_thread().add(shared, global, valid);
}
inline void cp_async_commit() { emulation::AsyncCopies::of_this_thread().commit(); }
template <int kPending>
void cp_async_wait() {
  emulation::AsyncCopies::of_this_thread().wait(kPending);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices<false>(EMULATION_SITE, r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  emulation::load_matrices<true>(EMULATION_SITE, r, row);
}
template <typename T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add<T>(EMULATION_SITE, d, a, b);
}
inline void mma_1688_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::multiply_add<float>(EMULATION_SITE, d, a, b);
}
// Nearest, ties away from zero: 10 bits of the mantissa stay.
inline uint32_t to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return finite ? (bits + 0x1000u) & 0xffffe000u : bits;
}

}  // namespace preact::cuda
