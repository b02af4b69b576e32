#include "cpu/channels.h"

#include "common/backward_terms.h"
#define PREACT_KERNELS "cpu/channels_kernel.h"
#include "cpu/foreach_capability.h"

namespace preact::cpu {

template <typename A>
void affine_channels(A* mean, A* invstd, A* scale, A* bias, int64_t channels, double eps) {
  PREACT_SELECT(affine_channels, A)(mean, invstd, scale, bias, channels, eps);
}

template <typename A>
void backward_channels(const A* scale, const A* invstd, const A* sum_dz_x, const A* sum_dz,
                       A* slope, A* offset, int64_t channels, int64_t count) {
  PREACT_SELECT(backward_channels, A)
  (scale, invstd, sum_dz_x, sum_dz, slope, offset, channels, count);
}

template <typename A>
void statistics_channels(double* mean, double* m2, const double* counts, int64_t chunks,
                         int64_t channels, A* means, A* variances) {
  PREACT_SELECT(statistics_channels, A)(mean, m2, counts, chunks, channels, means, variances);
}

template <typename A>
void gradient_channels(double* sum_dz, double* sum_dz_x, int64_t chunks, int64_t channels,
                       const A* invstd, A* weight, A* bias) {
  PREACT_SELECT(gradient_channels, A)(sum_dz, sum_dz_x, chunks, channels, invstd, weight, bias);
}

#define PREACT_INSTANTIATE(A)                                                                   \
  template void affine_channels(A*, A*, A*, A*, int64_t, double);                               \
  template void backward_channels(const A*, const A*, const A*, const A*, A*, A*, int64_t,      \
                                  int64_t);                                                     \
  template void statistics_channels(double*, double*, const double*, int64_t, int64_t, A*, A*); \
  template void gradient_channels(double*, double*, int64_t, int64_t, const A*, A*, A*);
PREACT_INSTANTIATE(float)
PREACT_INSTANTIATE(double)

}  // namespace preact::cpu
