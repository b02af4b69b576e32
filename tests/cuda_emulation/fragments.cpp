// One warp and one tensor-core or copy instruction, its registers as Python wrote and wants them.
#include "cuda/ptx.cuh"
#include "harness.h"

using namespace preact::cuda;

namespace {

constexpr int kLanes = 32;

template <int kSize, typename T>
void own(T (&registers)[kSize], const T* lanes) {
  std::memcpy(registers, lanes + threadIdx.x * kSize, sizeof registers);
}

void ldmatrix_kernel(const uint16_t* rows, bool transposed, uint32_t* result) {
  PREACT_SHARED(uint16_t, shared, kLanes * 8);
  std::memcpy(shared + threadIdx.x * 8, rows + threadIdx.x * 8, 16);
  __syncthreads();
  uint32_t r[4];
  if (transposed) {
    ldmatrix_x4_trans(r, shared + threadIdx.x * 8);
  } else {
    ldmatrix_x4(r, shared + threadIdx.x * 8);
  }
  std::memcpy(result + threadIdx.x * 4, r, sizeof r);
}

template <typename T>
void mma_kernel(const uint32_t* a, const uint32_t* b, const float* c, float* result) {
  uint32_t of_a[4], of_b[2];
  float d[4];
  own(of_a, a);
  own(of_b, b);
  own(d, c);
  if constexpr (std::is_same_v<T, float>) {
    mma_1688_tf32(d, of_a, of_b);
  } else {
    mma_16816<T>(d, of_a, of_b);
  }
  std::memcpy(result + threadIdx.x * 4, d, sizeof d);
}

// Two groups of copies. `result` [3, 32, 4]: the first group's target after the wait that leaves
// one group under way, the second's at that time, and the second's after the last wait.
void cp_async_kernel(const uint32_t* source, int valid, uint32_t* result) {
  PREACT_SHARED(uint32_t, shared, 2 * kLanes * 4);
  const unsigned at = threadIdx.x * 4;
  const auto give = [&](int place, int group) {
    std::memcpy(result + place * kLanes * 4 + at, shared + group * kLanes * 4 + at, 16);
  };
  for (unsigned group = 0; group < 2; ++group) {
    cp_async_16(shared + group * kLanes * 4 + at, source + group * kLanes * 4 + at,
                static_cast<int>(threadIdx.x) < valid);
    cp_async_commit();
  }
  cp_async_wait<1>();
  give(0, 0);
  give(1, 1);
  cp_async_wait<0>();
  give(2, 1);
}

void to_tf32_kernel(const float* values, uint32_t* result) {
  result[threadIdx.x] = to_tf32(values[threadIdx.x]);
}

template <typename T>
void mma(harness::Case& c) {
  launch("mma", mma_kernel<T>, 1, kLanes, 0, {}, c.input<uint32_t>("a"), c.input<uint32_t>("b"),
         c.input<float>("c"), c.output<float>("result", kLanes * 4));
}

void run(harness::Case& c) {
  const std::string op = c.text("op");
  if (op == "mma_float16") return mma<__half>(c);
  if (op == "mma_bfloat16") return mma<__nv_bfloat16>(c);
  if (op == "mma_tf32") return mma<float>(c);
  if (op == "ldmatrix" || op == "ldmatrix_trans") {
    return launch("ldmatrix", ldmatrix_kernel, 1, kLanes, 0, {}, c.input<uint16_t>("rows"),
                  op == "ldmatrix_trans", c.output<uint32_t>("result", kLanes * 4));
  }
  if (op == "cp_async") {
    return launch("cp_async", cp_async_kernel, 1, kLanes, 0, {}, c.input<uint32_t>("source"),
                  static_cast<int>(c.integer("valid")),
                  c.output<uint32_t>("result", 3 * kLanes * 4));
  }
  if (op == "to_tf32") {
    return launch("to_tf32", to_tf32_kernel, 1, kLanes, 0, {}, c.input<float>("values"),
                  c.output<uint32_t>("result", kLanes));
  }
  emulation::fail("no instruction %s", op.c_str());
}

}  // namespace

int main(int count, char** folders) {
  for (int i = 1; i < count; ++i) harness::Case(folders[i]).run(run);
  return 0;
}
