#include "cpu/caches.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#if defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__unix__)
#include <unistd.h>
#endif

namespace preact::cpu {
namespace {

Caches reported() {
#if defined(__APPLE__)
  const auto bytes = [](const char* name) {
    int64_t value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 ? value : int64_t{0};
  };
  return {bytes("hw.l1dcachesize"), bytes("hw.l2cachesize")};
#elif defined(_SC_LEVEL1_DCACHE_SIZE)
  return {sysconf(_SC_LEVEL1_DCACHE_SIZE), sysconf(_SC_LEVEL2_CACHE_SIZE)};
#else
  return {0, 0};
#endif
}

Caches detect() {
  // Blocks for a larger first level would make sums of single precision longer, which round worse.
  constexpr Caches kLeast{8 << 10, 64 << 10}, kUsual{32 << 10, 512 << 10},
      kMost{64 << 10, 64 << 20};
  Caches found = reported();
  if (const char* const wanted = std::getenv("PREACT_CPU_CACHES")) {
    long long first = 0, second = 0;
    if (std::sscanf(wanted, "%lld,%lld", &first, &second) == 2) found = {first, second};
  }
  // Virtual machines and some processors report nothing.
  const auto sound = [](int64_t size, int64_t least, int64_t usual, int64_t most) {
    return size > 0 ? std::clamp(size, least, most) : usual;
  };
  return {sound(found.first, kLeast.first, kUsual.first, kMost.first),
          sound(found.second, kLeast.second, kUsual.second, kMost.second)};
}

}  // namespace

const Caches& caches() {
  static const Caches found = detect();
  return found;
}

}  // namespace preact::cpu

extern "C" __attribute__((visibility("default"))) void preact_cpu_caches(int64_t* bytes) {
  bytes[0] = preact::cpu::caches().first;
  bytes[1] = preact::cpu::caches().second;
}
