// Arrays that begin with a cache line.
#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace preact {

template <typename V>
struct LineAllocator {
  using value_type = V;

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}

  V* allocate(std::size_t count) {
    return static_cast<V*>(::operator new(count * sizeof(V), kLine));
  }
  void deallocate(V* values, std::size_t) { ::operator delete(values, kLine); }
  bool operator==(const LineAllocator&) const { return true; }

 private:
  static constexpr std::align_val_t kLine{64};
};

// Values that kernels load and store in whole vectors: each of those that begin elsewhere lies in
// two lines and takes twice as long.
template <typename V>
using LineVector = std::vector<V, LineAllocator<V>>;

}  // namespace preact
