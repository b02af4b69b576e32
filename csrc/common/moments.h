// Mean and sum of squared deviations (m2) of samples merged by Chan, Golub & LeVeque's formula.
#pragma once

#include "common/host_device.h"

namespace preact {

// Joins a sample of `added` values to one of `count`. The weights are the same for all channels, so
// they are worked out once and the channels' loop has no division.
class MomentsMerge {
 public:
  PREACT_HOST_DEVICE MomentsMerge(double count, double added)
      : fraction_(added / (count + added)), cross_(count * fraction_) {}

  PREACT_HOST_DEVICE void operator()(double& mean, double& m2, double other_mean,
                                     double other_m2) const {
    const double delta = other_mean - mean;
    mean += delta * fraction_;
    m2 += other_m2 + delta * delta * cross_;
  }

 private:
  double fraction_;
  double cross_;
};

}  // namespace preact
