// Chunks of work shared among threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace preact::cpu {

// Every thread has a run of chunks of its own, the same in every op, whose data its caches may
// still hold, and takes them in order. One that has done its own takes the last of another's: a
// processor's cores are not equally fast, and are not always left to one process. What a chunk
// results in must not depend on who takes it.
class ChunkQueue {
 public:
  // For `most` threads or fewer, as many as there are chunks for; of these less than 2^32.
  ChunkQueue(int64_t chunks, int64_t most);

  int64_t threads() const { return static_cast<int64_t>(runs_.size()); }
  // The next chunk for `thread`; -1 where none is left.
  int64_t next(int64_t thread);

 private:
  // Chunks [first, end) that nobody has taken, both in one word so that they change together; a
  // cache line each.
  struct alignas(64) Run {
    std::atomic<uint64_t> left{0};
  };
  std::vector<Run> runs_;
};

// The turns of one thread.
class Turns {
 public:
  Turns(ChunkQueue& queue, int64_t thread) : queue_(queue), thread_(thread) {}
  int64_t next() { return queue_.next(thread_); }

 private:
  ChunkQueue& queue_;
  int64_t thread_;
};

}  // namespace preact::cpu
