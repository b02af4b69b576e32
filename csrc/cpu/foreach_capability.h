// Includes the file named by PREACT_KERNELS once per instruction set, each time in a namespace of
// its own and with that set enabled, so that one source gives one binary for every processor; and
// that of PREACT_TILES_KERNELS for the two that multiply bfloat16, in tile registers and in
// vectors. Lambdas do not inherit the enabled set: kernels use structs.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/conv2d_shape.h"
#include "common/feature_map.h"
#include "common/moments.h"
#include "cpu/caches.h"
#include "cpu/capability.h"
#include "cpu/conv2d_tiles_layout.h"
#include "cpu/conv2d_winograd.h"
#include "cpu/element.h"
#include "cpu/line_vector.h"
#include "cpu/pool2d.h"

#if PREACT_X86
#include <immintrin.h>

#if defined(__clang__)
#define PREACT_BEGIN(set) \
  _Pragma(PREACT_STRING(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define PREACT_END _Pragma("clang attribute pop")
#else
#define PREACT_BEGIN(set) _Pragma("GCC push_options") _Pragma(PREACT_STRING(GCC target(set)))
#define PREACT_END _Pragma("GCC pop_options")
#endif
#define PREACT_STRING(...) #__VA_ARGS__

#if PREACT_TILES && defined(PREACT_TILES_KERNELS)
// GCC 11 and 12 warn of what their own intrinsics leave undefined on purpose.
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
PREACT_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define PREACT_VECTOR_BYTES 64
#define PREACT_TILE_REGISTERS 1
namespace preact::amx {
#include "cpu/vec.h"

#include "cpu/pairs.h"

#include "cpu/sweep.h"

#include PREACT_TILES_KERNELS
}  // namespace preact::amx
#undef PREACT_TILE_REGISTERS
#undef PREACT_VECTOR_BYTES
PREACT_END

PREACT_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define PREACT_VECTOR_BYTES 64
#define PREACT_TILE_REGISTERS 0
namespace preact::avx512_bf16 {
#include "cpu/vec.h"

#include "cpu/pairs.h"

#include "cpu/sweep.h"

#include PREACT_TILES_KERNELS
}  // namespace preact::avx512_bf16
#undef PREACT_TILE_REGISTERS
#undef PREACT_VECTOR_BYTES
PREACT_END
#endif

#ifdef PREACT_KERNELS
PREACT_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define PREACT_VECTOR_BYTES 64
namespace preact::avx512 {
#include "cpu/vec.h"

#include "cpu/pairs.h"

#include "cpu/sweep.h"

#include PREACT_KERNELS
}  // namespace preact::avx512
#undef PREACT_VECTOR_BYTES
PREACT_END

PREACT_BEGIN("avx2,fma,f16c")
#define PREACT_VECTOR_BYTES 32
namespace preact::avx2 {
#include "cpu/vec.h"

#include "cpu/pairs.h"

#include "cpu/sweep.h"

#include PREACT_KERNELS
}  // namespace preact::avx2
#undef PREACT_VECTOR_BYTES
PREACT_END
#endif
#endif

#ifdef PREACT_KERNELS
#define PREACT_VECTOR_BYTES 16
namespace preact::baseline {
#include "cpu/vec.h"

#include "cpu/pairs.h"

#include "cpu/sweep.h"

#include PREACT_KERNELS
}  // namespace preact::baseline
#undef PREACT_VECTOR_BYTES
#endif
