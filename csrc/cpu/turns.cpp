#include "cpu/turns.h"

#include <algorithm>

#include "common/feature_map.h"

namespace preact::cpu {
namespace {

constexpr int kHalf = 32;

uint64_t run_of(int64_t first, int64_t end) {
  return static_cast<uint64_t>(end) << kHalf | static_cast<uint64_t>(first);
}
int64_t first_of(uint64_t run) { return static_cast<int64_t>(run & 0xffffffffu); }
int64_t end_of(uint64_t run) { return static_cast<int64_t>(run >> kHalf); }

// One chunk of a run: its first, or its last. -1 where it is empty.
int64_t take(std::atomic<uint64_t>& left, bool from_end) {
  uint64_t run = left.load(std::memory_order_relaxed);
  for (;;) {
    const int64_t first = first_of(run), end = end_of(run);
    if (first >= end) return -1;
    const uint64_t rest = from_end ? run_of(first, end - 1) : run_of(first + 1, end);
    if (left.compare_exchange_weak(run, rest, std::memory_order_relaxed)) {
      return from_end ? end - 1 : first;
    }
  }
}

}  // namespace

ChunkQueue::ChunkQueue(int64_t chunks, int64_t most)
    : runs_(std::max<int64_t>(std::min(chunks, most), 1)) {
  const int64_t each = ceil_div(chunks, threads());
  for (int64_t thread = 0; thread < threads(); ++thread) {
    const int64_t first = std::min(thread * each, chunks);
    runs_[thread].left = run_of(first, std::min(first + each, chunks));
  }
}

int64_t ChunkQueue::next(int64_t thread) {
  const int64_t own = take(runs_[thread].left, false);
  if (own >= 0) return own;
  for (;;) {
    // Of the one that has most left to do.
    int64_t longest = 0, of = -1;
    for (int64_t other = 0; other < threads(); ++other) {
      const uint64_t run = runs_[other].left.load(std::memory_order_relaxed);
      const int64_t left = end_of(run) - first_of(run);
      if (left > longest) {
        longest = left;
        of = other;
      }
    }
    if (of < 0) return -1;
    const int64_t taken = take(runs_[of].left, true);
    if (taken >= 0) return taken;
  }
}

}  // namespace preact::cpu
