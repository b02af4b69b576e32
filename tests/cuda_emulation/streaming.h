// The parts of a case that all streaming kernels share.
#pragma once

#include "harness.h"

#include "common/feature_map.h"
#include "cuda/affine.cuh"
#include "cuda/element.cuh"

namespace harness {

inline preact::FeatureMap feature_map(const Case& c) {
  return {c.integer("batch"), c.integer("channels"), c.integer("spatial"),
          c.integer("channels_last") != 0};
}

inline int64_t elements(const preact::FeatureMap& map) { return map.count() * map.channels; }

template <typename A>
preact::cuda::Norm<A> norm(Case& c) {
  return {c.input<A>("mean"), c.input<A>("var"), c.input<A>("weight"), c.input<A>("bias"),
          static_cast<A>(c.number("eps"))};
}

}  // namespace harness
