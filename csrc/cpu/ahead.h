// What the next block will read and write, fetched bit by bit while this one is computed: the
// processor's prefetchers only follow what is being read, and a block ends before they are up to
// speed. Included by kernels, per instruction set.

class Ahead {
 public:
  // `pixels` of `channels` elements each, `stride` elements apart; null is nothing.
  template <typename T>
  void read(const T* from, int64_t pixels, int64_t channels, int64_t stride) {
    if (from) add(reinterpret_cast<const char*>(from), pixels, channels, stride, sizeof(T), false);
  }
  template <typename T>
  void write(const T* to, int64_t pixels, int64_t channels, int64_t stride) {
    if (to) add(reinterpret_cast<const char*>(to), pixels, channels, stride, sizeof(T), true);
  }

  // Part `part` of `parts`.
  PREACT_INLINE void fetch(int64_t part, int64_t parts) const {
    for (int i = 0; i < count_; ++i) {
      const Stream& s = streams_[i];
      const int64_t end = s.rows * (part + 1) / parts;
      for (int64_t row = s.rows * part / parts; row < end; ++row) {
        for (int64_t k = 0; k < s.length; k += kLine) {
          if (s.write) {
            __builtin_prefetch(s.from + row * s.pitch + k, 1, 2);
          } else {
            __builtin_prefetch(s.from + row * s.pitch + k, 0, 2);
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  // More would push what this block works on out of a second-level cache.
  static constexpr int64_t kMostBytes = 256 * 1024;

  struct Stream {
    const char* from;
    int64_t rows, pitch, length;  // in bytes
    bool write;
  };

  void add(const char* from, int64_t pixels, int64_t channels, int64_t stride, int64_t size,
           bool write) {
    const int64_t bytes = pixels * channels * size;
    if (bytes_ + bytes > kMostBytes) return;
    bytes_ += bytes;
    streams_[count_++] = stride == channels
                             ? Stream{from, (bytes + kLine - 1) / kLine, kLine, kLine, write}
                             : Stream{from, pixels, stride * size, channels * size, write};
  }

  Stream streams_[6];
  int count_ = 0;
  int64_t bytes_ = 0;
};
