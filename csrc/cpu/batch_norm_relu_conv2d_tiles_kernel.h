#include "cpu/conv2d_tiles.h"

#include "cpu/conv2d_tiles_stage.h"

// Mean and m2 of a chunk's results, taken while tiles are written: sums of x - shift by lane, with
// the mean so far as the shift (that of the first tile, which is written twice, to begin with).
class TileMoments {
 public:
  TileMoments(int64_t channels, double* mean, double* m2)
      : channels_(channels),
        mean_(mean),
        m2_(m2),
        lanes_(cpu::vector_size_of(channels)),
        buffer_(3 * lanes_),
        started_(lanes_ / 32) {
    std::fill_n(mean, channels, 0.0);
    std::fill_n(m2, channels, 0.0);
  }

  float* shift() { return buffer_.data(); }
  float* sum() { return buffer_.data() + lanes_; }
  float* square() { return buffer_.data() + 2 * lanes_; }

  // Whether the group of `lane` has no shift yet; the sums of `pixels` give one.
  bool starts(int64_t lane) const { return !started_[lane / 32]; }
  void start(int64_t lane, int64_t pixels) {
    started_[lane / 32] = true;
    for (int64_t i = lane; i < lane + 32; ++i) {
      shift()[i] = total(sum(), i) / static_cast<float>(pixels);
    }
    std::fill_n(sum() + lane, 32, 0.0f);
    std::fill_n(square() + lane, 32, 0.0f);
  }

  // `pixels` more are in the sums.
  void add(int64_t pixels) {
    constexpr int64_t kMost = 512;
    pending_ += pixels;
    if (pending_ >= kMost) merge();
  }
  void merge() {
    if (pending_ == 0) return;
    const auto added = static_cast<double>(pending_);
    const MomentsMerge join(count_, added);
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t c = cpu::channel_of(lane, channels_);
      if (c >= channels_ || (narrow() && lane % 16 >= 8)) continue;
      const double of_sum = total(sum(), lane), offset = of_sum / added;
      join(mean_[c], m2_[c], shift()[lane] + offset, total(square(), lane) - of_sum * offset);
      shift()[lane] = static_cast<float>(mean_[c]);
      if (narrow()) shift()[lane + 8] = shift()[lane];
    }
    std::fill_n(sum(), 2 * lanes_, 0.0f);
    count_ += added;
    pending_ = 0;
  }

 private:
  bool narrow() const { return cpu::is_narrow(channels_); }
  // Two lanes hold a narrow map's channel.
  float total(const float* sums, int64_t lane) const {
    return narrow() ? sums[lane % 8 + lane / 16 * 16] + sums[lane % 8 + lane / 16 * 16 + 8]
                    : sums[lane];
  }

  int64_t channels_;
  double *mean_, *m2_;
  int64_t lanes_;
  LineVector<float> buffer_;
  std::vector<bool> started_;
  int64_t pending_ = 0;
  double count_ = 0;
};

// Writes tiles of results, conv_bias and residual added, and takes their statistics.
template <bool NARROW>
struct ForwardEpilogue {
  const float* bias;         // by lane, but of a narrow map in order; or null
  const BFloat16* residual;  // like output, or null
  BFloat16* output;
  TileMoments* moments;

  PREACT_INLINE Bits result(const float* sums, const TileOutput& out, int64_t i, bool two) const {
    Floats a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + 16);
    if constexpr (NARROW) {
      if (bias) {
        a += _mm512_loadu_ps(bias);
        b += _mm512_loadu_ps(bias);
      }
      if (residual) {
        NarrowPair pair{a, b};
        pair.add(load_pixels<true>(residual, out, i, two));
        a = pair.first;
        b = pair.second;
      }
      return joined(a, b);
    }
    if (bias) {
      a += _mm512_loadu_ps(bias + out.lane);
      b += _mm512_loadu_ps(bias + out.lane + 16);
    }
    if (residual) {
      const Bits added = load_pixels<false>(residual, out, i, two);
      a += even(added);
      b += odd(added);
    }
    return rounded_pair(a, b);
  }

  PREACT_INLINE void operator()(const float* sums, const TileOutput& out,
                                Ahead::Lines& lines) const {
    if (moments->starts(out.lane)) {
      write(sums, out, lines);
      moments->start(out.lane, out.pixels);
    }
    write(sums, out, lines);
  }

  PREACT_INLINE void write(const float* sums, const TileOutput& out, Ahead::Lines& lines) const {
    constexpr int64_t kPixels = NARROW ? 2 : 1;
    const LaneValues shift = lane_values(moments->shift(), out.lane);
    LaneValues sum{}, square{};
    for (int64_t p = 0; p < out.pixels; p += kPixels) {
      lines.fetch();
      const int64_t i = out.offset + p * out.stride;
      const bool two = p + 1 < out.pixels;
      const Bits bits = result(sums + p * (NARROW ? 16 : 32), out, i, two);
      store_pixels<NARROW>(output, out, i, two, bits);
      Floats e = even(bits) - shift.even, o = odd(bits) - shift.odd;
      if (NARROW && !two) {
        e = _mm512_maskz_mov_ps(0xff, e);
        o = _mm512_maskz_mov_ps(0xff, o);
      }
      sum.even += e;
      sum.odd += o;
      square.even = _mm512_fmadd_ps(e, e, square.even);
      square.odd = _mm512_fmadd_ps(o, o, square.odd);
    }
    add_lanes(moments->sum() + out.lane, sum);
    add_lanes(moments->square() + out.lane, square);
  }
};

template <bool NARROW>
void forward_blocks(const cpu::TileForward& task, BFloat16* staged, int64_t begin, int64_t end,
                    TileMoments& moments) {
  const Conv2dShape& s = task.blocks.shape;
  const int64_t row = task.staged.columns * cpu::padded(s.in_channels);  // of the staged map
  const auto input_from = [&](int64_t first) {
    return task.input + first * s.in_w * task.input_stride;
  };
  cpu::TileGather gather = task.gather;
  const ForwardEpilogue<NARROW> epilogue{task.bias.empty() ? nullptr : task.bias.data(),
                                         task.residual, task.output, &moments};
  for (int64_t block = begin; block < end; ++block) {
    const int64_t columns = task.blocks.columns(block, s.out_w);
    const int64_t rows = task.blocks.rows(block);
    const int64_t offset = task.blocks.first_row(block) * s.out_w * task.output_stride;
    const cpu::BlockRows in = task.blocks.input_rows(block, task.staged);
    cpu::Staged placed = task.staged;
    placed.top = in.staged;
    if (task.blocks.bands > 1) {  // at the edge of its image a band has no input for some rows
      const int64_t end = in.staged + in.count;
      std::fill_n(staged, in.staged * row, BFloat16{});
      std::fill_n(staged + end * row, (task.staged.rows - end) * row, BFloat16{});
    }
    const TileActivation source{task.norm.mean.data(), task.norm.scale.data(),
                                task.norm.shift.data(), input_from(in.first)};
    stage_tiles(source, in.count, task.blocks.columns(block, s.in_w), s.in_w, task.input_stride,
                placed, staged);
    gather.gather.rows = rows;
    Ahead ahead;
    if (block + 1 < s.batch) {
      const cpu::BlockRows after = task.blocks.input_rows(block + 1, task.staged);
      const int64_t out = task.blocks.rows(block + 1) * s.out_w;
      const int64_t next = offset + rows * s.out_w * task.output_stride;
      ahead.add(input_from(after.first), after.count * s.in_w, s.in_channels, task.input_stride);
      ahead.add(task.residual ? task.residual + next : nullptr, out, s.out_channels,
                task.output_stride);
      ahead.add(task.output + next, out, s.out_channels, task.output_stride);
    }
    ahead.spread(tile_work<NARROW>(gather, columns, s.out_channels));
    tile_map<NARROW>(gather, columns, s.stride_w, staged, task.staged, task.weights, s.out_channels,
                     s.out_w, task.output_stride, offset, epilogue, ahead);
    moments.add(rows * columns);
  }
  moments.merge();
}

// A thread's chunks: normalised into the staged map, convolved, and the statistics of each result
// taken on the way, into mean and m2 [chunks][O].
inline void batch_norm_relu_conv2d_tiles(const cpu::TileForward& task,
                                         const cpu::BlockChunks& chunks, cpu::Turns turns,
                                         double* mean, double* m2) {
  int64_t chunk = turns.next();
  if (chunk < 0) return;
  const Conv2dShape& s = task.blocks.shape;
  const int64_t size = cpu::staged_size(task.staged);
  auto* const staged = reinterpret_cast<BFloat16*>(cpu::scratch(cpu::Slot::input, size / 2));
  // Zeros stay wherever nothing is staged.
  std::memset(static_cast<void*>(staged), 0, size * sizeof(BFloat16));
  const auto run = cpu::is_narrow(s.out_channels) ? &forward_blocks<true> : &forward_blocks<false>;
  for (; chunk >= 0; chunk = turns.next()) {
    const int64_t first = chunk * s.out_channels;
    TileMoments moments(s.out_channels, mean + first, m2 + first);
    run(task, staged, chunks.begin(chunk), chunks.end(chunk), moments);
  }
  end_tiles();
}
