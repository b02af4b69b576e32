// Threads that share chunks by a ChunkQueue, and what each is given.
#include "cpu/turns.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <latch>
#include <thread>

using preact::cpu::ChunkQueue;
using preact::cpu::Turns;

namespace {

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

void every_chunk_is_given_once(int64_t chunks, int64_t threads) {
  ChunkQueue queue(chunks, threads);
  require(queue.threads() == std::max<int64_t>(std::min(chunks, threads), 1), "number of threads");
  std::vector<std::vector<int64_t>> given(queue.threads());
  std::vector<std::thread> workers;
  std::latch start(queue.threads());
  for (int64_t thread = 0; thread < queue.threads(); ++thread) {
    workers.emplace_back([&, thread] {
      Turns turns(queue, thread);
      start.arrive_and_wait();
      for (int64_t chunk = turns.next(); chunk >= 0; chunk = turns.next()) {
        given[thread].push_back(chunk);
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
  std::vector<int64_t> all;
  for (const auto& one : given) all.insert(all.end(), one.begin(), one.end());
  std::sort(all.begin(), all.end());
  require(static_cast<int64_t>(all.size()) == chunks, "number of chunks given");
  for (int64_t chunk = 0; chunk < chunks; ++chunk) require(all[chunk] == chunk, "a chunk missing");
}

struct Turn {
  int64_t thread, chunk;
};

void turns_are(ChunkQueue& queue, const std::vector<Turn>& expected, const char* what) {
  for (const Turn& turn : expected) require(queue.next(turn.thread) == turn.chunk, what);
}

}  // namespace

int main() {
  for (const int64_t threads : {1, 2, 3, 8}) {
    for (const int64_t chunks : {0, 1, 2, 7, 64, 1000}) {
      for (int round = 0; round < 5; ++round) every_chunk_is_given_once(chunks, threads);
    }
    every_chunk_is_given_once(200000, threads);
  }
  ChunkQueue equals(8, 2);
  turns_are(equals, {{0, 0}, {1, 4}, {0, 1}, {1, 5}, {1, 6}, {0, 2}, {0, 3}, {1, 7}, {0, -1}},
            "threads equally fast keep their own chunks, in order");
  ChunkQueue slow(8, 2);
  turns_are(slow,
            {{0, 0}, {1, 4}, {1, 5}, {1, 6}, {1, 7}, {1, 3}, {1, 2}, {0, 1}, {0, -1}, {1, -1}},
            "of a slow thread the other takes the last");
  ChunkQueue alone(5, 4);
  turns_are(alone, {{2, 4}, {2, 1}, {2, 3}, {2, 0}, {2, 2}, {2, -1}, {0, -1}, {3, -1}},
            "a thread alone, as in a loop inside another, takes them all");
  ChunkQueue most(9, 3);
  turns_are(most, {{0, 0}, {0, 1}, {0, 2}, {2, 6}, {0, 5}, {0, 4}, {0, 8}},
            "help goes where most is left");
  return 0;
}
