// Per-channel vectors around a pass over a map, for float and double: see channels_kernel.h.
#pragma once

#include <cstdint>

namespace preact::cpu {

template <typename A>
void affine_channels(A* mean, A* invstd, A* scale, A* bias, int64_t channels, double eps);

template <typename A>
void backward_channels(const A* scale, const A* invstd, const A* sum_dz_x, const A* sum_dz,
                       A* slope, A* offset, int64_t channels, int64_t count);

template <typename A>
void statistics_channels(double* mean, double* m2, const double* counts, int64_t chunks,
                         int64_t channels, A* means, A* variances);

template <typename A>
void gradient_channels(double* sum_dz, double* sum_dz_x, int64_t chunks, int64_t channels,
                       const A* invstd, A* weight, A* bias);

}  // namespace preact::cpu
