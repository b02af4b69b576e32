// What blocks of work are measured by.
#pragma once

#include <bit>
#include <cstdint>

namespace preact::cpu {

// Bytes of one core's data caches of the first and second level.
struct Caches {
  int64_t first, second;
};

// As the system reports them, or what most processors have at least where it does not;
// PREACT_CPU_CACHES in the environment, as "32768,1048576", says otherwise.
const Caches& caches();

// How many of `bytes` each fill half of the first-level cache, rounded down to a power of two.
inline int64_t fill_half(int64_t bytes) {
  return static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(caches().first / 2 / bytes)));
}

}  // namespace preact::cpu
