// Shape of a feature map as the kernels see it, and how its reductions are split.
#pragma once

#include <algorithm>
#include <cstdint>

namespace preact {

// [N, C, S] in memory, or [N, S, C] where channels_last.
struct FeatureMap {
  int64_t batch;
  int64_t channels;
  int64_t spatial;
  bool channels_last;

  int64_t count() const { return batch * spatial; }  // values per channel
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A reduction over N and S is cut into chunks by shape alone, never by thread count, so that a
// result is the same on any number of threads. A chunk is a run of rows (channels_last) or of
// images (otherwise, one task per chunk and channel).
struct Chunks {
  int64_t count;
  int64_t size;

  static Chunks of(const FeatureMap& map) {
    constexpr int64_t kElements = 32768, kMany = 16, kMost = 128;
    constexpr int64_t kFewestRows = 256, kRows = 1024, kPlaneValues = 4096;
    const int64_t elements = map.count() * map.channels;
    // Enough for several threads first, then larger ones: each begins without a mean, and one
    // thread joins the results of all. Planes are divided among threads by channels as well.
    const int64_t large = std::min(elements / (2 * kElements), map.count() / kRows);
    const int64_t wanted =
        std::clamp<int64_t>(std::max(std::min(elements / kElements, kMany), large), 1, kMost);
    const int64_t length = map.channels_last ? map.count() : map.batch;
    const int64_t most = map.channels_last ? ceil_div(length, kFewestRows)
                                           : std::min(map.count() / kPlaneValues, length);
    const int64_t count = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(most, 1));
    const int64_t size = std::max<int64_t>(ceil_div(length, count), 1);
    return {std::max<int64_t>(ceil_div(length, size), 1), size};
  }

  // Tasks run in parallel. Where not channels_last, task = chunk * channels + channel.
  int64_t tasks(const FeatureMap& map) const {
    return map.channels_last ? count : count * map.channels;
  }
  // A task's rows, or images: [begin, end).
  int64_t begin(const FeatureMap& map, int64_t task) const {
    return (map.channels_last ? task : task / std::max<int64_t>(map.channels, 1)) * size;
  }
  int64_t end(const FeatureMap& map, int64_t task) const {
    return std::min(begin(map, task) + size, map.channels_last ? map.count() : map.batch);
  }
};

}  // namespace preact
