#include <vector>

#include "common/tensors.h"

namespace preact::cpu {
namespace {

// running = momentum * scale * batch + (1 - momentum) * running: as a sum, so that with a momentum
// of 1 nothing of a larger old value is left in what a small new one rounds to.
template <typename T>
void update(const Tensor& running, const Tensor& batch, double momentum, double scale) {
  T* const to = static_cast<T*>(running.mutable_data_ptr());
  const T* const from = static_cast<const T*>(batch.const_data_ptr());
  const T added = static_cast<T>(momentum * scale), kept = static_cast<T>(1.0 - momentum);
  for (int64_t c = 0; c < running.size(0); ++c) to[c] = added * from[c] + kept * to[c];
}

void update_vector(Tensor& running, const Tensor& batch, double momentum, double scale) {
  STD_TORCH_CHECK(running.dim() == 1 && batch.dim() == 1 && running.size(0) == batch.size(0) &&
                      running.device() == batch.device(),
                  "running and batch must hold vectors of the same size, on the same device");
  const auto is_float = [](const Tensor& vector) {
    return vector.scalar_type() == ScalarType::Float && vector.is_contiguous();
  };
  if (is_float(running) && is_float(batch)) {
    update<float>(running, batch, momentum, scale);
    return;
  }
  const auto wide = [](const Tensor& vector) {
    return dense(torch::stable::to(vector, ScalarType::Double), MemoryFormat::Contiguous);
  };
  const Tensor result = torch::stable::clone(wide(running));
  update<double>(result, wide(batch), momentum, scale);
  torch::stable::copy_(running, result);
}

}  // namespace

// running and batch hold mean and variance of each norm in turn, over count values a channel.
void update_running_stats(std::vector<Tensor> running, std::vector<Tensor> batch,
                          std::vector<double> momenta, int64_t count) {
  STD_TORCH_CHECK(running.size() == 2 * momenta.size() && batch.size() == 2 * momenta.size(),
                  "running and batch must hold two vectors for each momentum");
  STD_TORCH_CHECK(count > 1, "count must be at least 2");
  const double unbiased = static_cast<double>(count) / static_cast<double>(count - 1);
  for (size_t i = 0; i < running.size(); ++i) {
    update_vector(running[i], batch[i], momenta[i / 2], i % 2 == 0 ? 1.0 : unbiased);
  }
}

}  // namespace preact::cpu

STABLE_TORCH_LIBRARY_IMPL(preact, CPU, m) {
  m.impl("update_running_stats", TORCH_BOX(&preact::cpu::update_running_stats));
}
