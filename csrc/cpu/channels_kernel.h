// What is worked out once for each channel. Included by foreach_capability.h: one after another,
// the roots and divisions of a layer of 2048 channels take as long as a pass over a small map.

// invstd holds variances and scale weights; they become what they are called.
template <typename A>
void affine_channels(A* __restrict mean, A* __restrict invstd, A* __restrict scale,
                     A* __restrict bias, int64_t channels, double eps) {
  // Kernels round to bfloat16 by bits, which no NaN of another kind would survive.
  constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
  for (int64_t c = 0; c < channels; ++c) {
    invstd[c] = static_cast<A>(1.0 / std::sqrt(static_cast<double>(invstd[c]) + eps));
    const A scaled = scale[c] * invstd[c];
    scale[c] = scaled == scaled ? scaled : kNaN;
    mean[c] = mean[c] == mean[c] ? mean[c] : kNaN;
    bias[c] = bias[c] == bias[c] ? bias[c] : kNaN;
  }
}

template <typename A>
void backward_channels(const A* scale, const A* invstd, const A* sum_dz_x, const A* sum_dz,
                       A* __restrict slope, A* __restrict offset, int64_t channels, int64_t count) {
  constexpr A kNaN = std::numeric_limits<A>::quiet_NaN();
  const A inverse = A(1) / static_cast<A>(count);
  for (int64_t c = 0; c < channels; ++c) {
    const BackwardTerms<A> terms(scale[c], invstd[c], sum_dz_x[c], sum_dz[c], inverse);
    slope[c] = terms.slope == terms.slope ? terms.slope : kNaN;
    offset[c] = terms.offset == terms.offset ? terms.offset : kNaN;
  }
}

// Joins the moments [chunks][C] in order; those of the first chunk are overwritten. A channel has
// counts[chunk] values in a chunk.
template <typename A>
void statistics_channels(double* __restrict mean, double* __restrict m2, const double* counts,
                         int64_t chunks, int64_t channels, A* means, A* variances) {
  double count = counts[0];
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const MomentsMerge join(count, counts[chunk]);
    const double *const other_mean = mean + chunk * channels, *const other_m2 =
                                                                  m2 + chunk * channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) join(mean[c], m2[c], other_mean[c], other_m2[c]);
    count += counts[chunk];
  }
  for (int64_t c = 0; c < channels; ++c) means[c] = static_cast<A>(mean[c]);
  for (int64_t c = 0; c < channels; ++c) variances[c] = static_cast<A>(m2[c] / count);
}

// Adds up the sums [chunks][C] of dz and of dz * (x - mean) in order; those of the first chunk are
// overwritten.
template <typename A>
void gradient_channels(double* __restrict sum_dz, double* __restrict sum_dz_x, int64_t chunks,
                       int64_t channels, const A* invstd, A* weight, A* bias) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const double* const dz = sum_dz + chunk * channels;
    const double* const dz_x = sum_dz_x + chunk * channels;
#pragma GCC ivdep
    for (int64_t c = 0; c < channels; ++c) {
      sum_dz[c] += dz[c];
      sum_dz_x[c] += dz_x[c];
    }
  }
  for (int64_t c = 0; c < channels; ++c) bias[c] = static_cast<A>(sum_dz[c]);
  for (int64_t c = 0; c < channels; ++c) weight[c] = static_cast<A>(sum_dz_x[c] * invstd[c]);
}
