// The least that a pass can take as an op: the same call, allocations and threads, and the same
// bytes read and written by plain vector moves, with one operation for each vector read that
// nothing waits for. Compiled where it is measured; see limits.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __AVX512F__
constexpr int64_t kVector = 64;
#else
constexpr int64_t kVector = 32;
#endif
using Vector = uint32_t __attribute__((vector_size(kVector)));
constexpr int64_t kUnrolled = 4, kBlock = kUnrolled * kVector;
constexpr int64_t kGrainElements = 32768;  // as ATen's
constexpr int64_t kWriteAhead = 256;

Vector load(const char* p) {
  Vector value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Bytes [begin, end) of all maps: their exclusive or is written, or without `out` returned, its own
// words combined. Lines `AHEAD` bytes on are asked for.
template <int READ, int64_t AHEAD>
uint32_t walk(const std::array<const char*, READ>& in, char* out, int64_t begin, int64_t end) {
  Vector seen[kUnrolled]{};
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kUnrolled; ++k) {
      const int64_t own = at + k * kVector;
      Vector value = load(in[0] + own);
#pragma GCC unroll 3
      for (int map = 1; map < READ; ++map) value ^= load(in[map] + own);
      if (AHEAD > 0) {
#pragma GCC unroll 3
        for (int map = 0; map < READ; ++map) __builtin_prefetch(in[map] + own + AHEAD);
        if (out != nullptr) __builtin_prefetch(out + own + kWriteAhead, 1);
      }
      if (out != nullptr) {
        std::memcpy(out + own, &value, sizeof value);
      } else {
        seen[k] ^= value;
      }
    }
  }
  const Vector all = (seen[0] ^ seen[1]) ^ (seen[2] ^ seen[3]);
  uint32_t word = 0;
  for (int64_t i = 0; i < kVector / 4; ++i) word ^= all[i];
  for (; at < end; at += sizeof word) {
    uint32_t value = 0;
    for (int map = 0; map < READ; ++map) {
      uint32_t one = 0;
      std::memcpy(&one, in[map] + at, std::min<int64_t>(sizeof one, end - at));
      value ^= one;
    }
    if (out != nullptr) std::memcpy(out + at, &value, std::min<int64_t>(sizeof value, end - at));
    word ^= value;
  }
  return word;
}

int64_t width_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    default: return 2;
  }
}

template <int READ, int64_t AHEAD>
uint32_t stream(const std::array<const char*, READ>& in, char* out, int64_t bytes, int64_t width) {
  std::atomic<uint32_t> seen{0};
  const int64_t blocks = (bytes + kBlock - 1) / kBlock;
  torch::stable::parallel_for(
      0, blocks, kGrainElements * width / kBlock, [&](int64_t begin, int64_t end) {
        seen ^= out == nullptr
                    ? walk<READ, AHEAD>(in, nullptr, begin * kBlock, std::min(end * kBlock, bytes))
                    : walk<READ, AHEAD>(in, out, begin * kBlock, std::min(end * kBlock, bytes));
      });
  return seen;
}

// Reads the maps and writes their exclusive or to `out`, or what walk returns to a word of `word`.
template <int READ>
void move(const Tensor* const (&maps)[READ], const Tensor* out, const Tensor* word, bool ahead) {
  std::array<const char*, READ> in;
  for (int i = 0; i < READ; ++i) in[i] = static_cast<const char*>(maps[i]->const_data_ptr());
  const int64_t width = width_of(*maps[0]);
  char* const to = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
  const auto run = ahead ? &stream<READ, 2048> : &stream<READ, 0>;
  const uint32_t seen = run(in, to, maps[0]->numel() * width, width);
  if (word) std::memcpy(word->mutable_data_ptr(), &seen, sizeof seen);
}

Tensor vector_of(const Tensor& map) {
  const int64_t size[1] = {map.size(1)};
  return torch::stable::empty({size, 1}, ScalarType::Float, std::nullopt, map.device());
}

using Two = std::tuple<Tensor, Tensor>;

Two stats(const Tensor& x, bool ahead) {
  Two found{vector_of(x), vector_of(x)};
  move<1>({&x}, nullptr, &std::get<0>(found), ahead);
  return found;
}

Tensor apply(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor&, double,
             bool ahead) {
  const Tensor result = torch::stable::empty_like(x);
  move<1>({&x}, &result, nullptr, ahead);
  return result;
}

Two reduce(const Tensor& grad, const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
           const Tensor&, double, bool ahead) {
  Two found{vector_of(x), vector_of(x)};
  move<2>({&grad, &x}, nullptr, &std::get<0>(found), ahead);
  return found;
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor&, const Tensor&, const Tensor&,
                const Tensor&, const Tensor&, const Tensor&, const Tensor& skip, double,
                bool ahead) {
  const Tensor result = torch::stable::empty_like(x);
  move<3>({&grad, &x, &skip}, &result, nullptr, ahead);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> add(const Tensor& x, const Tensor& other, bool ahead) {
  std::tuple<Tensor, Tensor, Tensor> found{torch::stable::empty_like(x), vector_of(x),
                                           vector_of(x)};
  move<2>({&x, &other}, &std::get<0>(found), nullptr, ahead);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY(preact_limits, m) {
  m.def("stats(Tensor x, bool ahead) -> (Tensor, Tensor)");
  m.def(
      "apply(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, bool ahead)"
      " -> Tensor");
  m.def(
      "reduce(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias,"
      " float eps, bool ahead) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias,"
      " Tensor grad_weight, Tensor grad_bias, Tensor skip, float eps, bool ahead) -> Tensor");
  m.def("add(Tensor x, Tensor other, bool ahead) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(preact_limits, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("reduce", TORCH_BOX(&reduce));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("add", TORCH_BOX(&add));
}
