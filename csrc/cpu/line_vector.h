// Arrays that begin with a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

namespace preact {

// Allocates a line more, and keeps the address that it was given before the first value: glibc
// takes longer for allocations of a stated alignment.
template <typename V>
struct LineAllocator {
  using value_type = V;

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) noexcept {}

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
  static_assert(alignof(V) <= kLine && __STDCPP_DEFAULT_NEW_ALIGNMENT__ >= sizeof(char*));
};

// Values that kernels load and store in whole vectors: each of those that begin elsewhere lies in
// two lines and takes twice as long.
template <typename V>
using LineVector = std::vector<V, LineAllocator<V>>;

}  // namespace preact
