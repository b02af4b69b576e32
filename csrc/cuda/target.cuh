// What differs between a GPU and the host emulation of the tests, which has a file of this name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

// An array in shared memory, and the kernel's dynamic shared memory, aligned for 16-byte access.
#define PREACT_SHARED(type, name, size) __shared__ __align__(16) type name[size]
#define PREACT_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(128) unsigned char preact_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(preact_dynamic_shared)

namespace preact::cuda {

using Stream = cudaStream_t;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "multiprocessors");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  return count;
}

// Queues a kernel; an error names it.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_bytes, Stream stream, std::type_identity_t<Parameters>... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  if (dynamic_bytes > kWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(dynamic_bytes)),
          name);
  }
  kernel<<<grid, block, dynamic_bytes, stream>>>(arguments...);
  check(cudaGetLastError(), name);
}

}  // namespace preact::cuda
