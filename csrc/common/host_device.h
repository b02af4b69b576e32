// Marks arithmetic that the CPU's and the GPU's code share.
#pragma once

#ifdef __CUDACC__
#define PREACT_HOST_DEVICE __host__ __device__
#else
#define PREACT_HOST_DEVICE
#endif
