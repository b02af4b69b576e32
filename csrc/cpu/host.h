// What every CPU op does around its kernel.
#pragma once

#include <type_traits>
#include <vector>

#include "common/tensors.h"
#include "cpu/capability.h"
#include "cpu/channels.h"
#include "cpu/element.h"
#include "cpu/line_vector.h"
#include "cpu/turns.h"

namespace preact::cpu {

// Calls `function.template operator()<T>()` with the element type of `type`.
template <typename Function>
void dispatch(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float: return function.template operator()<float>();
    case ScalarType::Double: return function.template operator()<double>();
    case ScalarType::BFloat16: return function.template operator()<BFloat16>();
    case ScalarType::Half: return function.template operator()<Half>();
    default: STD_TORCH_CHECK(false, "input must be float32, float64, bfloat16 or float16");
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Fewer elements, as for ATen, are not worth another thread.
constexpr int64_t kGrainElements = 32768;

// Calls function(turns) on each of PyTorch's threads that there are chunks for.
template <typename Function>
void parallel_over_turns(int64_t chunks, const Function& function) {
  ChunkQueue queue(chunks, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, queue.threads(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) function(Turns(queue, thread));
  });
}

// Calls function(chunk) for each chunk, on PyTorch's threads.
template <typename Function>
void parallel_over_chunks(int64_t chunks, const Function& function) {
  parallel_over_turns(chunks, [&](Turns turns) {
    for (int64_t chunk = turns.next(); chunk >= 0; chunk = turns.next()) function(chunk);
  });
}

// Runs function(begin, end) over parts of [0, length), of about `grain` or more, on PyTorch's
// threads. What function captures should be pointers and sizes: another core waits for each line of
// a tensor's own memory.
template <typename Function>
void parallel_over_parts(int64_t length, int64_t grain, const Function& function) {
  constexpr int64_t kTurns = 8;  // of each thread, lest one waits long for another
  const int64_t most = kTurns * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = std::min(ceil_div(length, std::max<int64_t>(grain, 1)), most);
  if (parts <= 1) return function(0, length);
  parallel_over_chunks(
      parts, [&](int64_t part) { function(part * length / parts, (part + 1) * length / parts); });
}

// Over rows (channels_last) or planes.
template <typename Function>
void parallel_over_map(const FeatureMap& map, const Function& function) {
  const int64_t length = map.channels_last ? map.count() : map.batch * map.channels;
  const int64_t width = std::max<int64_t>(map.channels_last ? map.channels : map.spatial, 1);
  parallel_over_parts(length, kGrainElements / width, function);
}

// Over the tasks of chunks.
template <typename Function>
void parallel_over_tasks(const FeatureMap& map, const Chunks& chunks, const Function& function) {
  const int64_t tasks = chunks.tasks(map);
  const int64_t elements =
      std::max<int64_t>(map.count() * map.channels / std::max<int64_t>(tasks, 1), 1);
  parallel_over_parts(tasks, ceil_div(kGrainElements, elements), function);
}

// weight * invstd, the mean and the bias of each channel, with absent parameters filled in.
template <typename A>
struct Affine {
  LineVector<A> mean, invstd, scale, bias;

  Affine(const Tensor& input, const Tensor& mean_, const Tensor& var_,
         const OptionalTensor& weight_, const OptionalTensor& bias_, double eps) {
    const int64_t channels = input.size(1);
    const auto copy = [&](const Tensor& vector, const char* name) {
      const Tensor same = channel_vector(vector, input, name);
      return LineVector<A>(data<A>(same), data<A>(same) + channels);
    };
    mean = copy(mean_, "mean");
    invstd = copy(var_, "var");
    scale = weight_ ? copy(*weight_, "weight") : LineVector<A>(channels, A(1));
    bias = bias_ ? copy(*bias_, "bias") : LineVector<A>(channels, A(0));
    affine_channels(mean.data(), invstd.data(), scale.data(), bias.data(), channels, eps);
  }
};

// What the two sums of the backward add to scale * dz: slope * (x - mean) + offset, per channel;
// zero where the statistics are constants and there are no sums.
template <typename A>
struct BackwardSums {
  LineVector<A> slope, offset;

  BackwardSums(const Tensor& input, const Affine<A>& affine, const OptionalTensor& grad_weight,
               const OptionalTensor& grad_bias, int64_t count)
      : slope(affine.scale.size(), A(0)), offset(affine.scale.size(), A(0)) {
    if (!grad_weight) return;
    const Tensor sum_dz_x = channel_vector(*grad_weight, input, "grad_weight");
    const Tensor sum_dz = channel_vector(*grad_bias, input, "grad_bias");
    backward_channels(affine.scale.data(), affine.invstd.data(), data<A>(sum_dz_x), data<A>(sum_dz),
                      slope.data(), offset.data(), input.size(1), count);
  }
};

// Per-task partial results: two doubles for each of a task's channels.
struct Partials {
  LineVector<double> first, second;

  Partials(int64_t chunks, int64_t channels)
      : first(chunks * channels), second(chunks * channels) {}
  Partials(const FeatureMap& map, const Chunks& chunks) : Partials(chunks.count, map.channels) {}
};

// Adds up the chunks' sums of dz and dz * (x - mean), in order, into the batch norm's gradients.
template <typename A>
void write_norm_gradients(Partials& sums, int64_t chunks, const Affine<A>& affine,
                          const Tensor& grad_weight, const Tensor& grad_bias) {
  gradient_channels(sums.first.data(), sums.second.data(), chunks, grad_bias.size(0),
                    affine.invstd.data(), mutable_data<A>(grad_weight), mutable_data<A>(grad_bias));
}

// Joins the moments of `chunks` chunks, in order, into mean and biased variance vectors; count_of
// says how many values a channel has in a chunk.
template <typename A, typename Count>
void write_statistics(Partials& partials, int64_t chunks, const Count& count_of, const Tensor& mean,
                      const Tensor& var) {
  std::vector<double> counts(chunks);
  for (int64_t i = 0; i < chunks; ++i) counts[i] = static_cast<double>(count_of(i));
  statistics_channels(partials.first.data(), partials.second.data(), counts.data(), chunks,
                      mean.size(0), mutable_data<A>(mean), mutable_data<A>(var));
}

template <typename A>
void write_statistics(Partials& partials, const FeatureMap& map, const Chunks& chunks,
                      const Tensor& mean, const Tensor& var) {
  const auto count_of = [&](int64_t chunk) {
    const int64_t task = map.channels_last ? chunk : chunk * map.channels;
    return (chunks.end(map, task) - chunks.begin(map, task)) *
           (map.channels_last ? 1 : map.spatial);
  };
  write_statistics<A>(partials, chunks.count, count_of, mean, var);
}

}  // namespace preact::cpu
