// The least that a pass can take as an op: the same call, allocations and threads, and the same
// bytes read and written by plain vector moves, with one operation for each vector read that
// nothing waits for; or, where it `computes`, with the pass's arithmetic for one channel's values
// throughout: nothing begins or ends at a channel, and bfloat16 is cut off where it should be
// rounded. Compiled where it is measured; see limits.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __AVX__
#include <immintrin.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int64_t kVector = 64;
#elif defined(__AVX__)
constexpr int64_t kVector = 32;
#else
constexpr int64_t kVector = 16;
#endif
using Vector = uint32_t __attribute__((vector_size(kVector)));
using Floats = float __attribute__((vector_size(kVector)));
constexpr int64_t kUnrolled = 4, kBlock = kUnrolled * kVector;
constexpr int64_t kGrainElements = 32768;  // as ATen's
constexpr int64_t kWriteAhead = 256;

Vector load(const char* p) {
  Vector value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <int READ, int64_t AHEAD>
void ask_for_lines(const std::array<const char*, READ>& in, const char* out, int64_t at) {
  if (AHEAD == 0) return;
#pragma GCC unroll 3
  for (int map = 0; map < READ; ++map) __builtin_prefetch(in[map] + at + AHEAD);
  if (out != nullptr) __builtin_prefetch(out + at + kWriteAhead, 1);
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
      ask_for_lines<READ, AHEAD>(in, out, own);
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

// One channel's values, in every lane; of sums alone, whose shift is their own, zeros.
struct Channel {
  Floats mean, scale, bias, slope, offset;
};
struct Sums {
  Floats first, second;
};

Floats where_active(Floats z, Floats value) { return z > 0 ? value : Floats{}; }
// Spelt out: the compiler takes two instructions for a choice.
Floats relu(Floats z) {
#if defined(__AVX512F__)
  return _mm512_max_ps(z, Floats{});
#elif defined(__AVX__)
  return _mm256_max_ps(z, Floats{});
#else
  return where_active(z, z);
#endif
}

void add_moments(Floats x, const Channel& channel, Sums& sums) {
  const Floats centred = x - channel.mean;
  sums.first += centred;
  sums.second += centred * centred;
}
Floats dz_of(Floats grad, Floats centred, const Channel& channel) {
  return where_active(centred * channel.scale + channel.bias, grad);
}

// What each pass does to the elements of its maps.
struct Stats {
  static constexpr int kRead = 1;
  static Floats element(const Floats* in, const Channel& channel, Sums& sums) {
    add_moments(in[0], channel, sums);
    return in[0];
  }
};
struct Apply {
  static constexpr int kRead = 1;
  static Floats element(const Floats* in, const Channel& channel, Sums&) {
    return relu((in[0] - channel.mean) * channel.scale + channel.bias);
  }
};
struct Reduce {
  static constexpr int kRead = 2;
  static Floats element(const Floats* in, const Channel& channel, Sums& sums) {
    const Floats centred = in[1] - channel.mean;
    const Floats dz = dz_of(in[0], centred, channel);
    sums.first += dz;
    sums.second += dz * centred;
    return dz;
  }
};
struct Backward {
  static constexpr int kRead = 3;
  static Floats element(const Floats* in, const Channel& channel, Sums&) {
    const Floats centred = in[1] - channel.mean;
    const Floats dz = dz_of(in[0], centred, channel);
    return (channel.scale * dz + (centred * channel.slope + channel.offset)) + in[2];
  }
};
struct Add {
  static constexpr int kRead = 2;
  static Floats element(const Floats* in, const Channel& channel, Sums& sums) {
    const Floats sum = in[0] + in[1];
    add_moments(sum, channel, sums);
    return sum;
  }
};

// As walk, whole blocks alone: what is left of the last one is not looked at. PARTS of a vector are
// widened one by one: one of float, two of bfloat16, those of even index and those of odd.
template <typename Pass, int PARTS, int64_t AHEAD>
float compute(const std::array<const char*, Pass::kRead>& in, char* out, int64_t begin, int64_t end,
              const Channel& given) {
  constexpr int kRead = Pass::kRead;
  // More would not stay in sixteen registers.
  constexpr int kChains = kVector == 64 || PARTS == 1 ? 4 : 2;
  const Channel channel = given;
  Sums sums[kChains][PARTS]{};
  for (int64_t at = begin; at + kBlock <= end; at += kBlock) {
#pragma GCC unroll 4
    for (int64_t k = 0; k < kUnrolled; ++k) {
      const int64_t own = at + k * kVector;
      ask_for_lines<kRead, AHEAD>(in, out, own);
      Vector words[kRead], result{};
#pragma GCC unroll 3
      for (int map = 0; map < kRead; ++map) words[map] = load(in[map] + own);
#pragma GCC unroll 2
      for (int part = 0; part < PARTS; ++part) {
        Floats values[kRead];
#pragma GCC unroll 3
        for (int map = 0; map < kRead; ++map) {
          const Vector wide = PARTS == 1  ? words[map]
                              : part == 0 ? words[map] << 16
                                          : words[map] & 0xffff0000u;
          values[map] = std::bit_cast<Floats>(wide);
        }
        const auto one =
            std::bit_cast<Vector>(Pass::element(values, channel, sums[k % kChains][part]));
        result = PARTS == 1 ? one : part == 0 ? one >> 16 : result | (one & 0xffff0000u);
      }
      if (out != nullptr) std::memcpy(out + own, &result, sizeof result);
    }
  }
  Floats all{};
  for (const auto& chain : sums) {
    for (const Sums& some : chain) all += some.first + some.second;
  }
  float total = 0;
  for (int64_t i = 0; i < kVector / 4; ++i) total += all[i];
  return total;
}

int64_t width_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return 8;
    case ScalarType::Float: return 4;
    default: return 2;
  }
}

// Calls work(begin, end) with runs of bytes, on PyTorch's threads; all that it returned combined.
template <typename Work>
uint32_t stream(const Tensor& map, const Work& work) {
  const int64_t width = width_of(map), bytes = map.numel() * width;
  std::atomic<uint32_t> seen{0};
  const int64_t blocks = (bytes + kBlock - 1) / kBlock;
  torch::stable::parallel_for(0, blocks, kGrainElements * width / kBlock,
                              [&](int64_t begin, int64_t end) {
                                seen ^= work(begin * kBlock, std::min(end * kBlock, bytes));
                              });
  return seen;
}

template <int64_t AHEAD, int READ>
uint32_t moved(const Tensor& map, const std::array<const char*, READ>& in, char* out) {
  return stream(map, [&](int64_t begin, int64_t end) {
    return out == nullptr ? walk<READ, AHEAD>(in, nullptr, begin, end)
                          : walk<READ, AHEAD>(in, out, begin, end);
  });
}

template <typename Pass, int PARTS, int64_t AHEAD>
uint32_t computed(const Tensor& map, const std::array<const char*, Pass::kRead>& in, char* out,
                  const Channel& channel) {
  return stream(map, [&](int64_t begin, int64_t end) {
    return std::bit_cast<uint32_t>(
        out == nullptr ? compute<Pass, PARTS, AHEAD>(in, nullptr, begin, end, channel)
                       : compute<Pass, PARTS, AHEAD>(in, out, begin, end, channel));
  });
}

// Reads the maps and writes to `out`, and to `word` a word of all sums, or of all words read.
template <typename Pass>
void run(const Tensor* const (&maps)[Pass::kRead], const Channel& channel, const Tensor* out,
         const Tensor* word, bool ahead, bool computes) {
  constexpr int kRead = Pass::kRead;
  std::array<const char*, kRead> in;
  for (int i = 0; i < kRead; ++i) in[i] = static_cast<const char*>(maps[i]->const_data_ptr());
  char* const to = out ? static_cast<char*>(out->mutable_data_ptr()) : nullptr;
  const Tensor& map = *maps[0];
  uint32_t seen = 0;
  if (!computes) {
    seen = ahead ? moved<2048, kRead>(map, in, to) : moved<0, kRead>(map, in, to);
  } else if (map.scalar_type() == ScalarType::Float) {
    seen = ahead ? computed<Pass, 1, 2048>(map, in, to, channel)
                 : computed<Pass, 1, 0>(map, in, to, channel);
  } else {
    STD_TORCH_CHECK(map.scalar_type() == ScalarType::BFloat16, "float32 and bfloat16 alone");
    seen = ahead ? computed<Pass, 2, 2048>(map, in, to, channel)
                 : computed<Pass, 2, 0>(map, in, to, channel);
  }
  if (word) std::memcpy(word->mutable_data_ptr(), &seen, sizeof seen);
}

Tensor vector_of(const Tensor& map) {
  const int64_t size[1] = {map.size(1)};
  return torch::stable::empty({size, 1}, ScalarType::Float, std::nullopt, map.device());
}

float first_of(const Tensor& vector) { return *static_cast<const float*>(vector.const_data_ptr()); }

Channel channel_of(const Tensor& mean, const Tensor& var, const Tensor& weight, const Tensor& bias,
                   double eps) {
  const Floats none{};
  const float invstd = static_cast<float>(1 / std::sqrt(first_of(var) + eps));
  return {none + first_of(mean), none + first_of(weight) * invstd, none + first_of(bias), none,
          none};
}

using Two = std::tuple<Tensor, Tensor>;

Two stats(const Tensor& x, bool ahead, bool computes) {
  Two found{vector_of(x), vector_of(x)};
  run<Stats>({&x}, Channel{}, nullptr, &std::get<0>(found), ahead, computes);
  return found;
}

Tensor apply(const Tensor& x, const Tensor& mean, const Tensor& var, const Tensor& weight,
             const Tensor& bias, double eps, bool ahead, bool computes) {
  const Tensor result = torch::stable::empty_like(x);
  const Channel channel = computes ? channel_of(mean, var, weight, bias, eps) : Channel{};
  run<Apply>({&x}, channel, &result, nullptr, ahead, computes);
  return result;
}

Two reduce(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
           const Tensor& weight, const Tensor& bias, double eps, bool ahead, bool computes) {
  Two found{vector_of(x), vector_of(x)};
  const Channel channel = computes ? channel_of(mean, var, weight, bias, eps) : Channel{};
  run<Reduce>({&grad, &x}, channel, nullptr, &std::get<0>(found), ahead, computes);
  return found;
}

Tensor backward(const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var,
                const Tensor& weight, const Tensor& bias, const Tensor& grad_weight,
                const Tensor& grad_bias, const Tensor& skip, double eps, bool ahead,
                bool computes) {
  const Tensor result = torch::stable::empty_like(x);
  Channel channel = computes ? channel_of(mean, var, weight, bias, eps) : Channel{};
  if (computes) {
    channel.slope += first_of(grad_weight);
    channel.offset += first_of(grad_bias);
  }
  run<Backward>({&grad, &x, &skip}, channel, &result, nullptr, ahead, computes);
  return result;
}

std::tuple<Tensor, Tensor, Tensor> add(const Tensor& x, const Tensor& other, bool ahead,
                                       bool computes) {
  std::tuple<Tensor, Tensor, Tensor> found{torch::stable::empty_like(x), vector_of(x),
                                           vector_of(x)};
  run<Add>({&x, &other}, Channel{}, &std::get<0>(found), &std::get<1>(found), ahead, computes);
  return found;
}

}  // namespace

STABLE_TORCH_LIBRARY(preact_limits, m) {
  m.def("stats(Tensor x, bool ahead, bool computes) -> (Tensor, Tensor)");
  m.def(
      "apply(Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias, float eps, bool ahead,"
      " bool computes) -> Tensor");
  m.def(
      "reduce(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias,"
      " float eps, bool ahead, bool computes) -> (Tensor, Tensor)");
  m.def(
      "backward(Tensor grad, Tensor x, Tensor mean, Tensor var, Tensor weight, Tensor bias,"
      " Tensor grad_weight, Tensor grad_bias, Tensor skip, float eps, bool ahead, bool computes)"
      " -> Tensor");
  m.def("add(Tensor x, Tensor other, bool ahead, bool computes) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(preact_limits, CPU, m) {
  m.impl("stats", TORCH_BOX(&stats));
  m.impl("apply", TORCH_BOX(&apply));
  m.impl("reduce", TORCH_BOX(&reduce));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("add", TORCH_BOX(&add));
}
