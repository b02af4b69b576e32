// Shared arrays, warp operations and the built-in functions of CUDA on top of machine.h.
#pragma once

#include <cmath>

#include "machine.h"

namespace emulation {

template <typename Array, typename Tag>
Array& shared_array(Tag) {
  static const char key = 0;  // one per declaration: its lambda has a type of its own
  return *static_cast<Array*>(Block::current().shared(&key, sizeof(Array)));
}

// Every lane of `mask` hands in an Arguments; body(lanes, mask) sees them all and fills them in.
template <typename Arguments, typename Body>
void warp(Site site, unsigned mask, Arguments& arguments, Body) {
  static_assert(std::is_empty_v<Body>, "the body runs for the whole warp: it may capture nothing");
  Block::current().collective(site, mask, &arguments, [](void* const lanes[32], unsigned active) {
    Arguments* typed[32];
    for (int lane = 0; lane < 32; ++lane) typed[lane] = static_cast<Arguments*>(lanes[lane]);
    Body{}(typed, active);
  });
}

inline int lane() { return static_cast<int>(Block::current().thread() & 31u); }

template <typename T>
T shuffle(Site site, unsigned mask, T value, int source) {
  struct Arguments {
    T value;
    int source;
    Site site;
  } arguments{value, source, site};
  warp(site, mask, arguments, [](Arguments** lanes, unsigned active) {
    T results[32];
    for (int to = 0; to < 32; ++to) {
      if ((active >> to & 1u) == 0) continue;
      const int from = lanes[to]->source;
      if (from < 0 || from > 31 || (active >> from & 1u) == 0) {
        fail("lane %d reads from lane %d, which takes no part, at %s:%d", to, from,
             lanes[to]->site.file, lanes[to]->site.line);
      }
      results[to] = lanes[from]->value;
    }
    for (int to = 0; to < 32; ++to) {
      if (active >> to & 1u) lanes[to]->value = results[to];
    }
  });
  return arguments.value;
}

// Lanes past the end of their segment keep their own value, as in CUDA.
inline int within(int target, int own, int width) {
  return target / width == own / width && target >= 0 ? target : own;
}
template <typename T>
T shuffle_index(Site site, unsigned mask, T value, int source, int width = 32) {
  return shuffle(site, mask, value, lane() / width * width + (source & (width - 1)));
}
template <typename T>
T shuffle_down(Site site, unsigned mask, T value, unsigned delta, int width = 32) {
  return shuffle(site, mask, value, within(lane() + static_cast<int>(delta), lane(), width));
}
template <typename T>
T shuffle_xor(Site site, unsigned mask, T value, int bits, int width = 32) {
  return shuffle(site, mask, value, within(lane() ^ bits, lane(), width));
}

inline unsigned ballot(Site site, unsigned mask, bool predicate) {
  struct Arguments {
    bool predicate;
    unsigned result;
  } arguments{predicate, 0};
  warp(site, mask, arguments, [](Arguments** lanes, unsigned active) {
    unsigned result = 0;
    for (int i = 0; i < 32; ++i) result |= (active >> i & 1u && lanes[i]->predicate) ? 1u << i : 0u;
    for (int i = 0; i < 32; ++i) {
      if (active >> i & 1u) lanes[i]->result = result;
    }
  });
  return arguments.result;
}

}  // namespace emulation

#define EMULATION_SITE (::emulation::Site{__FILE__, __LINE__})
#define __syncthreads() ::emulation::Block::current().barrier(EMULATION_SITE)
#define __syncwarp(...) \
  ((void)::emulation::ballot(EMULATION_SITE, 0xffffffffu __VA_OPT__(&(__VA_ARGS__)), true))
#define __ballot_sync(mask, predicate) ::emulation::ballot(EMULATION_SITE, mask, predicate)
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0)
#define __all_sync(mask, predicate) (__ballot_sync(mask, predicate) == (mask))
#define __shfl_sync(...) ::emulation::shuffle_index(EMULATION_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::emulation::shuffle_down(EMULATION_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::emulation::shuffle_xor(EMULATION_SITE, __VA_ARGS__)

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
