// What the batch's own statistics add to a batch norm's gradient.
#pragma once

#include "common/host_device.h"

namespace preact {

// dx = scale * dz + (x - mean) * slope + offset
template <typename A>
struct BackwardTerms {
  A slope;
  A offset;

  PREACT_HOST_DEVICE BackwardTerms(A scale, A invstd, A sum_dz_x, A sum_dz, A inverse_count) {
    const A share = -scale * inverse_count;
    slope = share * invstd * sum_dz_x;
    offset = share * sum_dz;
  }
};

}  // namespace preact
