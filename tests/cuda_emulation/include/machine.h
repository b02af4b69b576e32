// Runs CUDA kernels on the host: blocks one after another, a block's threads as fibres.
//
// A fibre runs until it meets a barrier or a warp operation. Which of the runnable fibres is next
// depends on a seed (0: the lowest thread first, 1: the highest first, else shuffled anew after
// every barrier), so what a missing barrier allows to happen does happen under some seed. Shared
// memory is fresh in every block, filled with NaN, and bounded by AddressSanitizer's redzones.
// Divergence ends the program with a message and kFailure.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <queue>
#include <random>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#include "types.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATION_ASAN(call) call
#else
#define EMULATION_ASAN(call)
#endif

// For x86-64. Saves the callee's registers on the stack it leaves and takes them from the one it
// enters.
extern "C" void emulation_switch(void** from, void* to);
constexpr int kSavedWords = 6;
asm(R"(
.text
.globl emulation_switch
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
namespace emulation {

constexpr int kFailure = 70;           // exit status where a kernel misuses the machine
constexpr size_t kStack = 256 * 1024;  // committed by the system page by page
constexpr unsigned kMaxThreads = 1024;

inline uint64_t seed = 0;  // the thread and block order; set before a launch
inline const char* kernel_name = "";
// Which edit is in force, of a copy of the kernels that has several behind switches.
inline const int mutation = std::atoi(std::getenv("MUTATION") ? std::getenv("MUTATION") : "-1");

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const {
    return line == other.line && std::strcmp(file, other.file) == 0;
  }
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::fprintf(stderr, "emulation: %s, block (%u, %u, %u): ", kernel_name, blockIdx.x, blockIdx.y,
               blockIdx.z);
  std::va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  std::_Exit(kFailure);
}

// Every byte 0xff: a NaN in each floating-point type.
inline void poison(void* memory, size_t bytes) { std::memset(memory, 0xff, bytes); }

// Memory of the exact size, so that AddressSanitizer sees the first byte beyond it.
class Buffer {
 public:
  explicit Buffer(size_t bytes, size_t alignment = 128) {
    if (posix_memalign(&memory_, alignment, std::max<size_t>(bytes, 1)) != 0) std::abort();
    poison(memory_, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }
  void* get() const { return memory_; }

 private:
  void* memory_ = nullptr;
};

enum class State { ready, barrier, warp, finished };

// The body of a warp operation: run once, with the arguments of the lanes that take part.
using Collective = void (*)(void* const lanes[32], unsigned mask);

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;
  uint3 index{};
  unsigned rank = 0;  // the fibre of lowest rank runs first
  State state = State::ready;
  Site site;  // of the barrier or warp operation it waits at
  Collective body = nullptr;
  unsigned mask = 0;
  void* arguments = nullptr;
};

class Block {
 public:
  Block(dim3 size, size_t dynamic_bytes, uint64_t order, std::function<void()> kernel);
  ~Block() { current_ = nullptr; }
  void run();

  static Block& current() { return *current_; }
  void* dynamic() const { return dynamic_.get(); }
  void* shared(const void* key, size_t bytes) {
    auto& buffer = static_[key];
    if (!buffer) buffer = std::make_unique<Buffer>(bytes);
    return buffer->get();
  }
  void barrier(Site site) {
    running_->site = site;
    leave(State::barrier);
  }
  void collective(Site site, unsigned mask, void* arguments, Collective body);
  unsigned thread() const { return static_cast<unsigned>(running_ - fibers_.data()); }

 private:
  static void entry();
  void enter(Fiber& fiber);
  void leave(State state);
  void shuffle();
  void ready(Fiber& fiber) {
    fiber.state = State::ready;
    queue_.push({fiber.rank, static_cast<unsigned>(&fiber - fibers_.data())});
  }
  void release_barrier();

  static inline Block* current_ = nullptr;
  std::function<void()> kernel_;
  uint64_t order_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  using Entry = std::pair<unsigned, unsigned>;  // rank, thread
  std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> queue_;
  Fiber* running_ = nullptr;
  void* scheduler_ = nullptr;
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_bottom_ = nullptr;
  size_t scheduler_size_ = 0;
  Buffer dynamic_;
  std::map<const void*, std::unique_ptr<Buffer>> static_;
};

// Stacks live as long as the program: mapping them takes longer than most blocks run.
inline char* stack_of(unsigned thread) {
  static std::vector<char*> stacks(kMaxThreads, nullptr);
  char*& stack = stacks[thread];
  if (stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    stack = static_cast<char*>(memory);
  }
  EMULATION_ASAN(__asan_unpoison_memory_region(
      stack, kStack));  // the last fibre never returned from its entry
  return stack;
}

inline Block::Block(dim3 size, size_t dynamic_bytes, uint64_t order, std::function<void()> kernel)
    : kernel_(std::move(kernel)),
      order_(order),
      random_(order),
      fibers_(size.x * size.y * size.z),
      dynamic_(dynamic_bytes) {
  current_ = this;
  for (unsigned t = 0; t < fibers_.size(); ++t) {
    Fiber& fiber = fibers_[t];
    fiber.index = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    fiber.stack = stack_of(t);
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    *--top = nullptr;  // where entry's own return address would be, for the stack's alignment
    *--top = reinterpret_cast<void*>(&entry);
    top -= kSavedWords;
    std::memset(top, 0, kSavedWords * sizeof(void*));
    fiber.stack_pointer = top;
  }
  shuffle();
  for (Fiber& fiber : fibers_) ready(fiber);
}

inline void Block::shuffle() {
  std::vector<unsigned> ranks(fibers_.size());
  std::iota(ranks.begin(), ranks.end(), 0u);
  if (order_ == 1) std::reverse(ranks.begin(), ranks.end());
  if (order_ > 1) std::shuffle(ranks.begin(), ranks.end(), random_);
  for (size_t t = 0; t < fibers_.size(); ++t) fibers_[t].rank = ranks[t];
}

inline void Block::entry() {
  Block& block = current();
  EMULATION_ASAN(
      __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom_, &block.scheduler_size_));
  block.kernel_();
  block.leave(State::finished);
}

inline void Block::enter(Fiber& fiber) {
  running_ = &fiber;
  threadIdx = fiber.index;
  EMULATION_ASAN(__sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack, kStack));
  emulation_switch(&scheduler_, fiber.stack_pointer);
  EMULATION_ASAN(__sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr));
}

inline void Block::leave(State state) {
  Fiber& fiber = *running_;
  fiber.state = state;
  EMULATION_ASAN(__sanitizer_start_switch_fiber(
      state == State::finished ? nullptr : &fiber.fake_stack, scheduler_bottom_, scheduler_size_));
  emulation_switch(&fiber.stack_pointer, scheduler_);
  EMULATION_ASAN(
      __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_bottom_, &scheduler_size_));
}

inline void Block::run() {
  for (;;) {
    while (!queue_.empty()) {
      Fiber& next = fibers_[queue_.top().second];
      queue_.pop();
      enter(next);
    }
    const auto finished = std::count_if(fibers_.begin(), fibers_.end(), [](const Fiber& fiber) {
      return fiber.state == State::finished;
    });
    if (finished == static_cast<long>(fibers_.size())) return;
    release_barrier();
  }
}

inline void Block::release_barrier() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : fibers_) {
    const auto thread = static_cast<int>(&fiber - fibers_.data());
    if (fiber.state == State::warp) {
      fail("thread %d waits in the warp operation at %s:%d, mask %08x, for lanes that do not come",
           thread, fiber.site.file, fiber.site.line, fiber.mask);
    }
    if (first == nullptr && fiber.state == State::barrier) first = &fiber;
  }
  for (const Fiber& fiber : fibers_) {
    const auto thread = static_cast<int>(&fiber - fibers_.data());
    if (fiber.state == State::finished) {
      fail("thread %d ended while others wait at the barrier at %s:%d", thread, first->site.file,
           first->site.line);
    }
    if (!(fiber.site == first->site)) {
      fail("divergent barriers: thread %d waits at %s:%d, others at %s:%d", thread, fiber.site.file,
           fiber.site.line, first->site.file, first->site.line);
    }
  }
  shuffle();
  for (Fiber& fiber : fibers_) ready(fiber);
}

inline void Block::collective(Site site, unsigned mask, void* arguments, Collective body) {
  Fiber& own = *running_;
  const unsigned first = thread() & ~31u, lane = thread() & 31u;
  if ((mask >> lane & 1u) == 0) {
    fail("thread %u is not in the mask %08x of its warp operation at %s:%d", thread(), mask,
         site.file, site.line);
  }
  own.site = site;
  own.body = body;
  own.mask = mask;
  own.arguments = arguments;
  own.state = State::warp;
  void* lanes[32] = {};
  for (unsigned other = 0; other < 32; ++other) {
    if ((mask >> other & 1u) == 0) continue;
    if (first + other >= fibers_.size()) {
      fail("mask %08x at %s:%d names lanes beyond the block", mask, site.file, site.line);
    }
    Fiber& fiber = fibers_[first + other];
    if (fiber.state != State::warp) return leave(State::warp);
    if (fiber.mask != mask || fiber.body != body || !(fiber.site == site)) {
      fail("divergent warp operations: %s:%d with mask %08x and %s:%d with mask %08x", site.file,
           site.line, mask, fiber.site.file, fiber.site.line, fiber.mask);
    }
    lanes[other] = fiber.arguments;
  }
  body(lanes, mask);
  for (unsigned other = 0; other < 32; ++other) {
    if (mask >> other & 1u && first + other != thread()) ready(fibers_[first + other]);
  }
  ready(own);
  leave(State::ready);
}

inline void run(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes,
                const std::function<void()>& kernel) {
  constexpr unsigned kMostRows = 65535;
  constexpr size_t kMostShared = 227 * 1024;
  kernel_name = name;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const uint64_t threads = static_cast<uint64_t>(block.x) * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > kMaxThreads || block.z > 64 || grid.x > INT32_MAX ||
      grid.y > kMostRows || grid.z > kMostRows || dynamic_bytes > kMostShared) {
    fail("no GPU launches grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory",
         grid.x, grid.y, grid.z, block.x, block.y, block.z, dynamic_bytes);
  }
  std::vector<uint64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed > 1) std::shuffle(order.begin(), order.end(), std::mt19937_64(seed));
  gridDim = grid;
  blockDim = block;
  for (const uint64_t index : order) {
    blockIdx = {static_cast<unsigned>(index % grid.x),
                static_cast<unsigned>(index / grid.x % grid.y),
                static_cast<unsigned>(index / grid.x / grid.y)};
    Block(block, dynamic_bytes, seed > 1 ? seed + index : seed, kernel).run();
  }
}

}  // namespace emulation
