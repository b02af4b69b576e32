// How the streaming kernels go over a feature map: blocks, threads, and slots of 16 bytes.
//
// A block owns a chunk of one group of channels, and a thread strides through that chunk from slot
// to slot. A slot is 16 bytes of memory on a 16-byte boundary, some of whose elements may belong to
// somebody else. Where a map is channels_last, a group is a few neighbouring slots of a row, and
// a thread keeps its channels. Otherwise a group is one channel, and its slots are those that cover
// its planes. No division is left in the loop, so that every offset has 64 bits at no cost.
#pragma once

#include <cstdint>

#include "common/feature_map.h"
#include "cuda/element.cuh"
#include "cuda/target.cuh"

namespace preact::cuda {

constexpr int kThreads = 256;
constexpr int kMostColumns = 32;

// Of a kernel over maps of one shape and layout.
struct Geometry {
  int64_t batch, channels, spatial;
  int64_t groups;       // of channels
  int64_t slots;        // of a group: rows, or slots of a channel's planes
  int64_t chunk;        // slots of a chunk
  int64_t chunks;       // of a group
  int64_t plane_slots;  // of a plane
  int columns;          // threads along a row
  int phase;            // elements between a 16-byte boundary and the maps' beginnings
  bool vector;          // slots that are all ours move in one access

  unsigned blocks() const { return static_cast<unsigned>(groups * chunks); }
};

// Elements by which the maps lie beyond a 16-byte boundary; -1 where they differ.
template <typename T, typename... Pointers>
int common_phase(const Pointers*... maps) {
  int phase = -2;
  for (const void* map : {static_cast<const void*>(maps)...}) {
    if (map == nullptr) continue;
    const auto own = static_cast<int>(reinterpret_cast<uintptr_t>(map) / sizeof(T) % kVector<T>);
    phase = phase == -2 || phase == own ? own : -1;
    if (phase == -1) return -1;
  }
  return phase;
}

// The split depends on shape and alignment alone, so a result is the same on every device.
// `most_blocks` bounds what a second stage has to join.
template <typename T, typename... Pointers>
Geometry geometry(const FeatureMap& map, const Pointers*... maps) {
  constexpr int64_t kVectorSize = kVector<T>, kSlotsPerThread = 8, kMostBlocks = 2048;
  const int phase = common_phase<T>(maps...);
  Geometry g{};
  g.batch = map.batch;
  g.channels = map.channels;
  g.spatial = map.spatial;
  int64_t least;  // slots that occupy every thread once
  if (map.channels_last) {
    const int64_t width = ceil_div(map.channels, kVectorSize);
    g.columns = 1;
    while (g.columns < width && g.columns < kMostColumns) g.columns *= 2;
    g.groups = ceil_div(width, g.columns);
    g.slots = map.count();
    g.vector = phase == 0 && map.channels % kVectorSize == 0;
    least = kThreads / g.columns;
  } else {
    g.columns = 1;
    g.groups = map.channels;
    g.vector = phase >= 0;
    g.phase = phase > 0 ? phase : 0;
    const bool even = g.phase == 0 && map.spatial % kVectorSize == 0;
    g.plane_slots =
        even ? map.spatial / kVectorSize : ceil_div(map.spatial + kVectorSize - 1, kVectorSize);
    g.slots = map.batch * g.plane_slots;
    least = kThreads;
  }
  const int64_t wanted =
      std::clamp<int64_t>(g.slots * g.groups / (least * kSlotsPerThread), 1, kMostBlocks);
  const int64_t chunks = std::clamp<int64_t>(ceil_div(wanted, g.groups), 1,
                                             std::max<int64_t>(ceil_div(g.slots, least), 1));
  g.chunk = std::max<int64_t>(ceil_div(g.slots, chunks), 1);
  g.chunks = ceil_div(g.slots, g.chunk);
  return g;
}

// Elements [first, last) of the kVector that begin at `offset`; last may be negative.
template <typename T>
struct Slot {
  int64_t offset;
  int first, last;

  __device__ bool holds(int e) const { return e >= first && e < last; }
  __device__ bool full() const { return first == 0 && last == kVector<T>; }
};

template <typename T>
__device__ inline void load_slot(T (&values)[kVector<T>], const T* map, const Slot<T>& slot,
                                 bool vector) {
  if (vector && slot.full()) {
    load_vector(values, map + slot.offset);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      values[e] = slot.holds(e) ? map[slot.offset + e] : from_accumulate<T>(0);
    }
  }
}

template <typename T>
__device__ inline void store_slot(T* map, const T (&values)[kVector<T>], const Slot<T>& slot,
                                  bool vector) {
  if (vector && slot.full()) {
    store_vector(map + slot.offset, values);
  } else {
#pragma unroll
    for (int e = 0; e < kVector<T>; ++e) {
      if (slot.holds(e)) map[slot.offset + e] = values[e];
    }
  }
}

// The slots of one thread. kLanes channels of its own: those of a slot, or the group's only one.
template <typename T, bool kChannelsLast>
class Walk {
 public:
  static constexpr int kSize = kVector<T>;
  static constexpr int kLanes = kChannelsLast ? kSize : 1;

  __device__ explicit Walk(const Geometry& g)
      : geometry_(g), group_(blockIdx.x % g.groups), chunk_(blockIdx.x / g.groups) {
    begin_ = chunk_ * g.chunk;
    end_ = begin_ + g.chunk < g.slots ? begin_ + g.chunk : g.slots;
    if constexpr (kChannelsLast) {
      column_ = static_cast<int>(threadIdx.x) % g.columns;
      step_ = kThreads / g.columns;
      index_ = begin_ + static_cast<int>(threadIdx.x) / g.columns;
      const int64_t left = g.channels - first_channel() - column_ * kSize;
      lanes_ = static_cast<int>(left < kSize ? left : kSize);
    } else {
      step_ = kThreads;
      index_ = begin_ + threadIdx.x;
      image_ = index_ / g.plane_slots;
      slot_ = index_ % g.plane_slots;
      image_step_ = kThreads / g.plane_slots;
      slot_step_ = kThreads % g.plane_slots;
    }
  }

  __device__ bool more() const { return index_ < end_; }

  // The thread's next slot, an empty one past the end.
  __device__ Slot<T> next() {
    Slot<T> slot{0, 0, 0};
    if (!more()) return slot;
    if constexpr (kChannelsLast) {
      slot = row(index_);
    } else {
      slot = in_plane(image_, slot_);
      image_ += image_step_;
      slot_ += slot_step_;
      if (slot_ >= geometry_.plane_slots) {
        slot_ -= geometry_.plane_slots;
        ++image_;
      }
    }
    index_ += step_;
    return slot;
  }

  // The thread's channels in row `index`.
  __device__ Slot<T> row(int64_t index) const {
    return {index * geometry_.channels + first_channel() + column_ * kSize, 0, lanes_};
  }

  // Offset of one element among those of the slot counted `index` in the group, or next to them.
  __device__ int64_t element(int64_t index) const {
    const int64_t image = index / geometry_.plane_slots, slot = index % geometry_.plane_slots;
    const Slot<T> own = in_plane(image, slot);
    const int64_t last = plane_of(image) + geometry_.spatial - 1, at = own.offset + own.first;
    return at > last ? last : at;
  }

  // Elements of the group's channel in the slots before `index`.
  __device__ int64_t elements_before(int64_t index) const {
    if constexpr (kChannelsLast) return index;
    const int64_t image = index / geometry_.plane_slots, slot = index % geometry_.plane_slots;
    int64_t inside = slot * kSize - phase_of(plane_of(image));
    inside = inside < 0 ? 0 : inside < geometry_.spatial ? inside : geometry_.spatial;
    return image * geometry_.spatial + inside;
  }

  __device__ int64_t begin() const { return begin_; }
  __device__ int64_t end() const { return end_; }
  __device__ int64_t chunk() const { return chunk_; }
  __device__ int column() const { return kChannelsLast ? column_ : 0; }
  // Of the block: its first channel, and those from there on, as far as a table of them goes.
  __device__ int64_t first_channel() const {
    return kChannelsLast ? group_ * geometry_.columns * kSize : group_;
  }
  __device__ int table_size() const {
    if constexpr (!kChannelsLast) return 1;
    const int64_t left = geometry_.channels - first_channel();
    const int width = geometry_.columns * kSize;
    return left < width ? static_cast<int>(left) : width;
  }

 private:
  __device__ int64_t plane_of(int64_t image) const {
    return (image * geometry_.channels + group_) * geometry_.spatial;
  }
  __device__ int phase_of(int64_t plane) const {
    return static_cast<int>((geometry_.phase + plane) & (kSize - 1));
  }
  __device__ Slot<T> in_plane(int64_t image, int64_t slot) const {
    const int64_t plane = plane_of(image), start = slot * kSize - phase_of(plane);
    const int64_t left = geometry_.spatial - start;
    return {plane + start, static_cast<int>(start < 0 ? -start : 0),
            static_cast<int>(left < kSize ? left : kSize)};
  }

  const Geometry& geometry_;
  int64_t group_, chunk_, begin_, end_, index_;
  int step_;
  int column_ = 0, lanes_ = 0;
  int64_t image_ = 0, slot_ = 0, image_step_ = 0, slot_step_ = 0;
};

// Calls op.load(slot, loaded) for kBatch slots before it calls op.use(slot, loaded) for them, so
// that many loads are under way at once.
template <int kBatch, typename Walk, typename Op>
__device__ void sweep(Walk& walk, Op& op) {
  while (walk.more()) {
    decltype(walk.next()) slots[kBatch];
    typename Op::Loaded loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) slots[b] = walk.next();
#pragma unroll
    for (int b = 0; b < kBatch; ++b) op.load(slots[b], loaded[b]);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) op.use(slots[b], loaded[b]);
  }
}

}  // namespace preact::cuda
