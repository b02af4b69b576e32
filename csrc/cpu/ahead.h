// What the next block will read and write, fetched line by line among the work on this one: the
// processor's prefetchers only follow what is being read, and a block ends before they are up to
// speed. A line among every few multiplications costs nothing, as many at once cost what they take
// to come. Included by kernels, per instruction set.

class Ahead {
 public:
  // `pixels` of `channels` elements each, `stride` elements apart; null is nothing.
  template <typename T>
  void add(const T* map, int64_t pixels, int64_t channels, int64_t stride) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t bytes = pixels * channels * kSize;
    if (!map || bytes_ + bytes > most_) return;
    const char* const from = reinterpret_cast<const char*>(map);
    const Run run = stride == channels ? Run{from, 1, 0, bytes}
                                       : Run{from, pixels, stride * kSize, channels * kSize};
    bytes_ += bytes;
    lines_ += run.rows * ((run.length + kLine - 1) / kLine);
    runs_[count_++] = run;
  }

  // All of it is to be fetched among `work` to come, in the unit of take.
  void spread(int64_t work) {
    rate_ = work > 0 ? lines_ * kOne / work : 0;
    if (count_ > 0) begin(runs_[0]);
  }

  // Lines whose turn it is, `each` of them at a time.
  struct Lines {
    const char *at, *end;
    int64_t each;

    PREACT_INLINE void fetch() {
      for (int64_t left = each; left > 0 && at < end; --left, at += kLine) {
        __builtin_prefetch(at, 0, 2);
      }
    }
  };

  // Those of `work` more, for as many as `turns` fetches.
  PREACT_INLINE Lines take(int64_t work, int64_t turns) {
    due_ += work * rate_;
    const char* const at = at_;
    if (due_ < kOne || at == end_) return {at, at, 0};
    const char* const end = std::min(at + due_ / kOne * kLine, end_);
    const int64_t taken = (end - at + kLine - 1) / kLine;
    due_ -= taken * kOne;
    at_ = end;
    if (at_ == end_) next();
    return {at, end, std::max<int64_t>(taken / turns, 1)};
  }

  // What is left of `lines` and everything else that is due.
  PREACT_INLINE void fetch(Lines lines) {
    for (; lines.at < lines.end; lines = take(0, 1)) {
      lines.each = most_;
      lines.fetch();
    }
  }

 private:
  static constexpr int64_t kLine = 64, kOne = 1 << 16;

  struct Run {
    const char* from;
    int64_t rows, pitch, length;  // in bytes
  };

  void begin(const Run& run) {
    at_ = run.from;
    end_ = run.from + run.length;
  }
  __attribute__((noinline)) void next() {
    Run& run = runs_[first_];
    if (--run.rows > 0) {
      run.from += run.pitch;
      begin(run);
    } else if (++first_ < count_) {
      begin(runs_[first_]);
    }
  }

  Run runs_[8];
  int count_ = 0, first_ = 0;
  // More would push what this block works on out of the second-level cache.
  const int64_t most_ = cpu::caches().second / 2;
  int64_t bytes_ = 0, lines_ = 0, rate_ = 0, due_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

// What the block after this one of a backward will read and write.
template <typename Task>
Ahead block_after(const Task& task, int64_t block) {
  const Conv2dShape& s = task.blocks.shape;
  Ahead ahead;
  if (block + 1 == s.batch) return ahead;
  const int64_t in = s.in_h * s.in_w, out = s.out_h * s.out_w;
  const auto add = [&](const auto* map, int64_t pixels, int64_t channels, int64_t stride) {
    ahead.add(map ? map + (block + 1) * pixels * stride : nullptr, pixels, channels, stride);
  };
  add(task.input, in, s.in_channels, task.input_stride);
  add(task.grad_output, out, s.out_channels, task.output_stride);
  add(task.wide_grad, out, s.out_channels, task.output_stride);
  add(task.pending_input, out, s.out_channels, task.output_stride);
  add(task.pending_skip, out, s.out_channels, task.output_stride);
  if (task.above) {
    const int64_t channels = task.above->staged_grad.channels;
    add(task.above->grad_output, out, channels, channels);
    add(task.above->pending_input, out, channels, channels);
  }
  add(task.grad_activation, in, s.in_channels, task.input_stride);
  add(task.grad_skip, in, s.in_channels, task.input_stride);
  add(task.wide_skip, in, s.in_channels, task.input_stride);
  add(task.grad_z, in, s.in_channels, task.input_stride);
  return ahead;
}
