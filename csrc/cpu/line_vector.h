// Arrays that begin with a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace preact {

// More is asked for than there is to hold, and where that lies is kept before the line: allocations
// of a stated alignment take glibc longer.
template <typename V>
struct LineAllocator {
  using value_type = V;

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}

  V* allocate(std::size_t count) {
    char* const given = static_cast<char*>(::operator new(count * sizeof(V) + kLine));
    char* const line = given + (kLine - reinterpret_cast<std::uintptr_t>(given) % kLine);
    std::memcpy(line - sizeof given, &given, sizeof given);
    return reinterpret_cast<V*>(line);
  }
  void deallocate(V* values, std::size_t) {
    char* given;
    std::memcpy(&given, reinterpret_cast<char*>(values) - sizeof given, sizeof given);
    ::operator delete(given);
  }
  bool operator==(const LineAllocator&) const { return true; }

 private:
  static constexpr std::size_t kLine = 64;
};

// Values that kernels load and store in whole vectors: each of those that begin elsewhere lies in
// two lines and takes twice as long.
template <typename V>
using LineVector = std::vector<V, LineAllocator<V>>;

}  // namespace preact
