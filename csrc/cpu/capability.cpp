#include "cpu/capability.h"

#include <cstdlib>
#include <cstring>

#if PREACT_X86
#include <cpuid.h>
#endif

namespace preact {
namespace {

Capability detect() {
#if PREACT_X86
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
  if (!f16c || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    return Capability::baseline;
  }
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx512 ? Capability::avx512 : Capability::avx2;
#else
  return Capability::baseline;
#endif
}

Capability lowered(Capability detected) {
  const char* wanted = std::getenv("PREACT_CPU_CAPABILITY");
  if (wanted == nullptr) return detected;
  if (std::strcmp(wanted, "baseline") == 0) return Capability::baseline;
  if (std::strcmp(wanted, "avx2") == 0 && detected == Capability::avx512) return Capability::avx2;
  return detected;
}

}  // namespace

Capability capability() {
  static const Capability chosen = lowered(detect());
  return chosen;
}

}  // namespace preact

extern "C" __attribute__((visibility("default"))) const char* preact_cpu_capability() {
  switch (preact::capability()) {
    case preact::Capability::avx512: return "AVX512";
    case preact::Capability::avx2: return "AVX2";
    default: return "baseline";
  }
}
