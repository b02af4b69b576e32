#include "cpu/conv2d_tiles.h"

#include "cpu/conv2d_tiles_stage.h"
#include "cpu/conv2d_tiles_weight.h"

// Sums of dz and dz * (x - mean), by lane in float until they join the double ones.
class TileSums {
 public:
  TileSums(int64_t channels, double* dz, double* dz_x)
      : channels_(channels),
        lanes_(cpu::vector_size_of(channels)),
        dz_(dz),
        dz_x_(dz_x),
        buffer_(2 * lanes_) {
    std::fill_n(dz, channels, 0.0);
    std::fill_n(dz_x, channels, 0.0);
  }

  float* dz() { return buffer_.data(); }
  float* dz_x() { return buffer_.data() + lanes_; }

  // `pixels` more are in the sums.
  void add(int64_t pixels) {
    constexpr int64_t kMost = 512;
    pending_ += pixels;
    if (pending_ >= kMost) flush();
  }
  void flush() {
    for (int64_t lane = 0; lane < lanes_; ++lane) {
      const int64_t c = cpu::channel_of(lane, channels_);
      if (c >= channels_) continue;
      dz_[c] += dz()[lane];
      dz_x_[c] += dz_x()[lane];
    }
    std::fill(buffer_.begin(), buffer_.end(), 0.0f);
    pending_ = 0;
  }

 private:
  int64_t channels_, lanes_;
  double *dz_, *dz_x_;
  LineVector<float> buffer_;
  int64_t pending_ = 0;
};

// Writes tiles of the input's gradient: adds grad_activation, applies the ReLU's mask, and takes
// the sums of that. Where ADD, it is scaled and added to skip, and only their sum is written: what
// the sums of dz add to the gradient of the input is not known yet and not in it. The sum is float:
// rounded ones would lose of each layer's share a part whose mean is not zero.
template <bool NARROW, bool ADD>
struct BackwardEpilogue {
  TileActivation activation;
  const BFloat16* grad_activation;  // null where nothing is to be added
  BFloat16* grad;                   // where not ADD; may be null
  const float* skip;
  const BFloat16* narrow_skip;  // in its place, where not null
  float* total;                 // may be skip
  TileSums* sums;

  PREACT_INLINE Bits result(const float* from, const TileOutput& out, int64_t i, bool two) const {
    Floats a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    if constexpr (NARROW) {
      if (grad_activation) {
        NarrowPair pair{a, b};
        pair.add(load_pixels<true>(grad_activation, out, i, two));
        a = pair.first;
        b = pair.second;
      }
      return joined(a, b);
    }
    if (grad_activation) {
      const Bits added = load_pixels<false>(grad_activation, out, i, two);
      a += even(added);
      b += odd(added);
    }
    return rounded_pair(a, b);
  }

  PREACT_INLINE void operator()(const float* from, const TileOutput& out,
                                Ahead::Lines& lines) const {
    constexpr int64_t kPixels = NARROW ? 2 : 1;
    const auto values = activation.get(out.lane);
    LaneValues dz{}, dz_x{};
    const Floats zero = _mm512_setzero_ps();
    for (int64_t p = 0; p < out.pixels; p += kPixels) {
      lines.fetch();
      const int64_t i = out.offset + p * out.stride;
      const bool two = p + 1 < out.pixels;
      const Bits x = load_pixels<NARROW>(activation.map, out, i, two);
      const Bits bits = result(from + p * (NARROW ? 16 : 32), out, i, two);
      const Floats centred_even = even(x) - values.mean.even;
      const Floats centred_odd = odd(x) - values.mean.odd;
      // Not (z <= 0): a NaN passes, as where_active lets it.
      __mmask16 evens = _mm512_cmp_ps_mask(
          _mm512_fmadd_ps(centred_even, values.scale.even, values.shift.even), zero, _CMP_NLE_UQ);
      __mmask16 odds = _mm512_cmp_ps_mask(
          _mm512_fmadd_ps(centred_odd, values.scale.odd, values.shift.odd), zero, _CMP_NLE_UQ);
      if (NARROW && !two) {
        evens &= 0xff;
        odds &= 0xff;
      }
      const Floats e = _mm512_maskz_mov_ps(evens, even(bits));
      const Floats o = _mm512_maskz_mov_ps(odds, odd(bits));
      if constexpr (ADD) {
        LaneValues sum = narrow_skip ? values_of(load_pixels<NARROW>(narrow_skip, out, i, two))
                                     : load_floats<NARROW>(skip, out, i, two);
        // The pixel's next 32 channels, which no prefetcher expects: pixels stand far apart.
        __builtin_prefetch(total + i + 32, 1, 2);
        __builtin_prefetch(total + i + 48, 1, 2);
        sum.even = _mm512_fmadd_ps(values.scale.even, e, sum.even);
        sum.odd = _mm512_fmadd_ps(values.scale.odd, o, sum.odd);
        store_floats<NARROW>(total, out, i, two, sum);
      } else {
        const Bits masked =
            _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(e), 16), _mm512_castps_si512(o));
        if (grad) store_pixels<NARROW>(grad, out, i, two, masked);
      }
      dz.even += e;
      dz.odd += o;
      dz_x.even = _mm512_fmadd_ps(e, centred_even, dz_x.even);
      dz_x.odd = _mm512_fmadd_ps(o, centred_odd, dz_x.odd);
    }
    add_lanes(sums->dz() + out.lane, dz);
    add_lanes(sums->dz_x() + out.lane, dz_x);
  }
};

// Writes tiles of the input's gradient as they are.
template <bool NARROW>
struct PlainEpilogue {
  BFloat16* map;

  PREACT_INLINE void operator()(const float* from, const TileOutput& out,
                                Ahead::Lines& lines) const {
    constexpr int64_t kPixels = NARROW ? 2 : 1;
    for (int64_t p = 0; p < out.pixels; p += kPixels) {
      lines.fetch();
      const float* const sums = from + p * (NARROW ? 16 : 32);
      const Floats a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + 16);
      store_pixels<NARROW>(map, out, out.offset + p * out.stride, p + 1 < out.pixels,
                           NARROW ? joined(a, b) : rounded_pair(a, b));
    }
  }
};

// Where a thread keeps what it staged of a block; zeros, which stay wherever nothing is staged.
struct BackwardBuffers {
  BFloat16 *grad, *pairs, *grad_pairs, *grad_above, *recomputed;
  char* planes;

  explicit BackwardBuffers(const cpu::TileBackward& task) {
    const Conv2dShape& s = task.blocks.shape;
    const cpu::PairedPixels& p = task.paired;
    const int64_t in = cpu::padded(s.in_channels), out = cpu::padded(s.out_channels);
    const int64_t grad_size = up(cpu::staged_size(task.staged_grad));
    const int64_t grad_pairs_size = p.steps * 32 * out;
    const int64_t pairs_size = p.phases() * in * p.pairs * 2;
    const int64_t planes_size = p.phases() * in * p.plane_bytes / 2;
    grad = elements(cpu::Slot::grad_output, grad_size + grad_pairs_size);
    grad_pairs = grad + grad_size;
    pairs = elements(cpu::Slot::input, pairs_size + planes_size);
    planes = reinterpret_cast<char*>(pairs + pairs_size);
    std::memset(static_cast<void*>(grad), 0, (grad_size + grad_pairs_size) * sizeof(BFloat16));
    std::memset(static_cast<void*>(pairs), 0, pairs_size * sizeof(BFloat16));
    grad_above = recomputed = nullptr;
    if (task.above) {
      const int64_t above_size = up(cpu::staged_size(task.above->staged_grad));
      grad_above = elements(cpu::Slot::grad_above, above_size);
      std::memset(static_cast<void*>(grad_above), 0, above_size * sizeof(BFloat16));
      recomputed = elements(cpu::Slot::recomputed, up(s.out_h * s.out_w * s.out_channels));
    }
  }

 private:
  static int64_t up(int64_t elements) { return (elements + 31) / 32 * 32; }
  static BFloat16* elements(cpu::Slot slot, int64_t size) {
    return reinterpret_cast<BFloat16*>(cpu::scratch(slot, size / 2));
  }
};

template <typename G>
TilePending<G> pending_source(const G* grad, const BFloat16* input,
                              const LineVector<float>& coefficients) {
  const float* const rows = coefficients.data();
  const auto lanes = static_cast<int64_t>(coefficients.size()) / 4;
  return {grad, input, rows, rows + lanes, rows + 2 * lanes, rows + 3 * lanes};
}

// The gradient of the input of the convolution above, without its mask, [pixels][channels].
template <bool NARROW>
void compute_above(const cpu::TileBackward& task, const BackwardBuffers& buffers, int64_t block,
                   int64_t columns, Ahead& ahead) {
  const Conv2dShape& s = task.blocks.shape;
  const cpu::TileAbove& above = *task.above;
  const int64_t channels = above.staged_grad.channels;
  const int64_t at = block * s.out_h * s.out_w * channels;
  stage_tiles(pending_source(above.grad_output + at, above.pending_input + at, above.coefficients),
              s.out_h, columns, s.out_w, channels, above.staged_grad, buffers.grad_above);
  tile_map<NARROW>(above.gather, columns, 1, buffers.grad_above, above.staged_grad, above.weights,
                   s.out_channels, s.out_w, s.out_channels, 0,
                   PlainEpilogue<NARROW>{buffers.recomputed}, ahead);
}

// The gradient of the result of one block, as the tiles read it.
inline void stage_gradient(const cpu::TileBackward& task, const BackwardBuffers& buffers,
                           int64_t block, int64_t columns, Ahead& ahead) {
  const Conv2dShape& s = task.blocks.shape;
  const int64_t offset = block * s.out_h * s.out_w * task.output_stride;
  const auto write = [&](const auto& source) {
    stage_tiles(source, s.out_h, columns, s.out_w, task.output_stride, task.staged_grad,
                buffers.grad);
  };
  const BFloat16* const grad = task.grad_output ? task.grad_output + offset : nullptr;
  if (!task.pending_input) {
    write(TileCopy{grad});
    return;
  }
  const BFloat16* const input = task.pending_input + offset;
  if (task.wide_grad) {
    write(pending_source(task.wide_grad + offset, input, task.coefficients));
    return;
  }
  const auto pending = pending_source(grad, input, task.coefficients);
  if (!task.pending_skip) {
    write(pending);
    return;
  }
  const BFloat16* const skip = task.pending_skip + offset;
  BFloat16* const completed = task.completed + offset;
  if (!task.above) {
    write(TileCompleted<false>{pending, skip, completed, nullptr});
    return;
  }
  (cpu::is_narrow(s.out_channels) ? &compute_above<true>
                                  : &compute_above<false>)(task, buffers, block, columns, ahead);
  auto computed = pending;
  computed.dz = buffers.recomputed;
  write(TileCompleted<true>{computed, skip, completed, task.above->shift.data()});
}

// Groups of tiles that a block's maps take.
template <bool NARROW>
int64_t block_work(const cpu::TileBackward& task, int64_t in_columns, int64_t out_columns) {
  const Conv2dShape& s = task.blocks.shape;
  int64_t work = 0;
  for (const TileGather& phase : task.phases) {
    const int64_t columns = s.stride_w == 1 ? in_columns : phase.gather.columns;
    work += tile_work<NARROW>(phase, columns, s.in_channels);
  }
  if (!task.above) return work;
  return work + (cpu::is_narrow(s.out_channels)
                     ? &tile_work<true>
                     : &tile_work<false>)(task.above->gather, out_columns, s.out_channels);
}

template <bool NARROW, bool ADD>
void backward_blocks(const cpu::TileBackward& task, const BackwardBuffers& buffers, int64_t begin,
                     int64_t end, TileSums& sums, float* grad_weight) {
  const Conv2dShape& s = task.blocks.shape;
  const cpu::PairedPixels& paired = task.paired;
  const Staged& layout = task.staged_grad;
  const int64_t out = cpu::padded(s.out_channels);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t in_columns = task.blocks.columns(block, s.in_w);
    const int64_t out_columns = task.blocks.columns(block, s.out_w);
    const int64_t offset = block * s.in_h * s.in_w * task.input_stride;
    Ahead ahead = block_after(task, block);
    ahead.spread(block_work<NARROW>(task, in_columns, out_columns));
    stage_gradient(task, buffers, block, out_columns, ahead);
    const TileActivation activation{task.norm.mean.data(), task.norm.scale.data(),
                                    task.norm.shift.data(), task.input};
    // Before the epilogue, which finds the input in the cache then. What the last block leaves of
    // another's is multiplied by zeros, which an infinity would not allow.
    if (in_columns < s.in_w) {
      std::memset(static_cast<void*>(buffers.pairs), 0,
                  paired.phases() * cpu::padded(s.in_channels) * paired.pairs * 4);
    }
    TileActivation source = activation;
    source.map += offset;
    stage_pairs(source,
                {s.in_h, in_columns, s.in_channels, task.input_stride, s.in_w * task.input_stride,
                 task.staged.top, task.staged.left, s.stride_w},
                paired, paired.pairs, buffers.pairs);
    const BackwardEpilogue<NARROW, ADD> epilogue{
        activation,     task.grad_activation, task.grad_z, task.wide_skip,
        task.grad_skip, task.grad_input,      &sums};
    for (size_t i = 0; i < task.phases.size(); ++i) {
      const TileGather& phase = task.phases[i];
      // Only whole blocks have more than one phase.
      const int64_t columns = s.stride_w == 1 ? in_columns : phase.gather.columns;
      tile_map<NARROW>(phase, columns, 1, buffers.grad, layout, task.weights[i], s.in_channels,
                       s.in_w, task.input_stride, offset, epilogue, ahead);
    }
    sums.add(s.in_h * in_columns);

    if (out_columns < s.out_w) {  // what the last block left must not count
      std::memset(static_cast<void*>(buffers.grad_pairs), 0,
                  paired.steps * 32 * out * sizeof(BFloat16));
    }
    const BFloat16* const origin = buffers.grad + (layout.top * layout.columns + layout.left) * out;
    stage_pairs(TileCopy{origin},
                {s.out_h, out_columns, s.out_channels, out, layout.columns * out, 0, 0, 1}, paired,
                paired.steps * 16, buffers.grad_pairs);
    if (cpu::turns_gradient(s)) {
      turned_weight_gradient(s, paired, buffers.pairs, buffers.planes, buffers.grad_pairs,
                             block == begin, grad_weight);
    } else {
      weight_gradient(s, paired, task.staged, buffers.pairs, buffers.planes, buffers.grad_pairs,
                      block == begin, grad_weight);
    }
  }
  sums.flush();
}

// A thread's chunks: gradients of the input, masked, with their sums in sum_dz and sum_dz_x
// [chunks][C], either written or scaled and added to grad_skip, and of the weight, as weight_sums
// says, in grad_weight [chunks].
inline void batch_norm_relu_conv2d_backward_tiles(const cpu::TileBackward& task,
                                                  const cpu::BlockChunks& chunks, cpu::Turns turns,
                                                  double* sum_dz, double* sum_dz_x,
                                                  float* grad_weight) {
  int64_t chunk = turns.next();
  if (chunk < 0) return;
  const Conv2dShape& s = task.blocks.shape;
  const BackwardBuffers buffers(task);
  const bool narrow = cpu::is_narrow(s.in_channels);
  const auto run = task.grad_input
                       ? (narrow ? &backward_blocks<true, true> : &backward_blocks<false, true>)
                       : (narrow ? &backward_blocks<true, false> : &backward_blocks<false, false>);
  for (; chunk >= 0; chunk = turns.next()) {
    TileSums sums(s.in_channels, sum_dz + chunk * s.in_channels, sum_dz_x + chunk * s.in_channels);
    run(task, buffers, chunks.begin(chunk), chunks.end(chunk), sums,
        grad_weight + chunk * cpu::weight_sums(s));
  }
  end_tiles();
}
