// Stands in for csrc/cuda/target.cuh: it comes first on the include path of the emulation.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulation.h"

#define PREACT_SHARED(type, name, size) \
  type(&name)[size] = ::emulation::shared_array<type[size]>([] {})
#define PREACT_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(::emulation::Block::current().dynamic())

namespace preact::cuda {

struct Stream {};

inline int multiprocessors() { return 1; }  // few blocks, so that grid-stride loops go round

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_bytes, Stream, std::type_identity_t<Parameters>... arguments) {
  ::emulation::run(name, grid, block, dynamic_bytes, [&] { kernel(arguments...); });
}

}  // namespace preact::cuda
