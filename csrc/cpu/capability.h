// The instruction sets one binary carries code for, and the choice among them at run time.
#pragma once

#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#define PREACT_X86 1
#else
#define PREACT_X86 0
#endif

// Tile registers: the compiler has to know AVX512_BF16, the assembler AMX, and the kernel of the
// system grants them to a process that asks.
#if PREACT_X86 && defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define PREACT_AMX 1
#else
#define PREACT_AMX 0
#endif

namespace preact {

enum class Capability { baseline, avx2, avx512, amx };

// The best set this processor runs; PREACT_CPU_CAPABILITY in the environment lowers it.
Capability capability();

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
