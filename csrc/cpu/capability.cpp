#include "cpu/capability.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if PREACT_X86
#include <cpuid.h>
#endif
#if PREACT_TILES
#include <sys/syscall.h>
#include <unistd.h>

// Where something preloaded does what tile registers would: tests/tile_emulation.
extern "C" __attribute__((weak, visibility("default"))) int preact_tile_registers_are_emulated();
#elif PREACT_X86
#pragma message("preact: no products of bfloat16, they need Linux and GCC 11 or Clang 12")
#endif

namespace preact {
namespace {

#if PREACT_X86
// This and the next suppose AVX-512.
bool detect_avx512_bf16() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kBFloat16 = 1u << 5;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & kBFloat16);
}
#endif
#if PREACT_TILES
bool detect_amx() {
  if (preact_tile_registers_are_emulated != nullptr) return true;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTileBFloat16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if (!(edx & kTileBFloat16) || !(edx & kTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

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
#if PREACT_TILES
  if (avx512 && detect_avx512_bf16()) {
    return detect_amx() ? Capability::amx : Capability::avx512_bf16;
  }
#endif
  return avx512 ? Capability::avx512 : Capability::avx2;
#else
  return Capability::baseline;
#endif
}

Capability lowered(Capability detected) {
  const char* wanted = std::getenv("PREACT_CPU_CAPABILITY");
  if (wanted == nullptr) return detected;
  if (std::strcmp(wanted, "baseline") == 0) return Capability::baseline;
  if (std::strcmp(wanted, "avx2") == 0) return std::min(detected, Capability::avx2);
  if (std::strcmp(wanted, "avx512") == 0) return std::min(detected, Capability::avx512);
  if (std::strcmp(wanted, "avx512_bf16") == 0) return std::min(detected, Capability::avx512_bf16);
  return detected;
}

bool detect_amd() {
#if PREACT_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

}  // namespace

const bool kFollowsStreams = detect_amd();

Capability capability() {
  static const Capability chosen = lowered(detect());
  return chosen;
}

}  // namespace preact

// Whether the processor multiplies bfloat16, whatever these kernels do.
extern "C" __attribute__((visibility("default"))) int preact_processor_multiplies_bfloat16() {
#if PREACT_X86
  return __builtin_cpu_supports("avx512f") && preact::detect_avx512_bf16();
#else
  return 0;
#endif
}

extern "C" __attribute__((visibility("default"))) const char* preact_cpu_capability() {
  switch (preact::capability()) {
    case preact::Capability::amx: return "AMX";
    case preact::Capability::avx512_bf16: return "AVX512_BF16";
    case preact::Capability::avx512: return "AVX512";
    case preact::Capability::avx2: return "AVX2";
    default: return "baseline";
  }
}
