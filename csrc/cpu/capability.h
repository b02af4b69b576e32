// The instruction sets one binary carries code for, and the choice among them at run time.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PREACT_X86 1
#else
#define PREACT_X86 0
#endif

// Products of bfloat16 tiles: the compiler has to know AVX512_BF16, the assembler AMX, and the
// kernel of the system grants tile registers to a process that asks.
#if PREACT_X86 && defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define PREACT_TILES 1
#else
#define PREACT_TILES 0
#endif

namespace preact {

enum class Capability { baseline, avx2, avx512, avx512_bf16, amx };

// The best set this processor runs; PREACT_CPU_CAPABILITY in the environment lowers it.
Capability capability();

// Whether the processor's own prefetchers keep up with a pass over a map, and lines asked for ahead
// are in their way: AMD's do, on the one measured (Zen 4).
extern const bool kFollowsStreams;

}  // namespace preact

// The address of a kernel template's instance for `T` in the chosen instruction set's namespace.
#if PREACT_X86
#define PREACT_SELECT(name, T)                                                         \
  (::preact::capability() >= ::preact::Capability::avx512 ? &::preact::avx512::name<T> \
   : ::preact::capability() == ::preact::Capability::avx2 ? &::preact::avx2::name<T>   \
                                                          : &::preact::baseline::name<T>)
#else
#define PREACT_SELECT(name, T) (&::preact::baseline::name<T>)
#endif

// The same of a kernel of the two levels that multiply bfloat16.
#define PREACT_SELECT_TILES(name)                                             \
  (::preact::capability() == ::preact::Capability::amx ? &::preact::amx::name \
                                                       : &::preact::avx512_bf16::name)
