// The two shapes that every batch norm kernel has: map (elementwise with per-channel parameters) and reduce (per-channel
// sums in two stages). What an element does is in the Op (bn_ops.h); what a thread owns is here, for launch.h's grids.
//
// Partial results are merged in a fixed order without atomics. All offsets are int64.
#pragma once

#include <type_traits>

#include "bn_ops.h"
#include "launch.h"

namespace resnet_fast::cuda {

struct Thread {
  int64_t block_x, block_y, block_z;
  int64_t x, y;
  int64_t block_size_x, block_size_y;
  int64_t grid_y, grid_z;

  RF_HOST_DEVICE int64_t index() const { return y * block_size_x + x; }
};

// The channels of V neighbouring columns.
template <int V, typename Op>
RF_HOST_DEVICE void column_channels(const Op& op, const Matrix& m, int64_t col, typename Op::Channel* channel) {
  int64_t c = col % m.channels;
  RF_UNROLL
  for (int v = 0; v < V; ++v) {
    channel[v] = op.channel(c);
    c = c + 1 == m.channels ? 0 : c + 1;
  }
}

// f(std::integral_constant<int, width>, offset) for the part of an aligned slot of V elements that is in [first, end).
template <int V, typename F>
RF_HOST_DEVICE void take_slot(int64_t slot, int64_t first, int64_t end, const F& f) {
  if (slot >= first && slot + V <= end) {
    f(std::integral_constant<int, V>{}, slot);
    return;
  }
  const int64_t stop = slot + V < end ? slot + V : end;
  for (int64_t at = slot < first ? first : slot; at < stop; ++at) f(std::integral_constant<int, 1>{}, at);
}

// A thread owns V neighbouring columns, or a slot of V elements, of every grid_y * block_size_y-th row from its own.
template <int V, bool kChannelsLast, typename Op>
RF_HOST_DEVICE void map_thread(const Op& op, const Matrix& m, const Thread& t) {
  const int64_t slot = t.block_x * t.block_size_x + t.x;
  const int64_t first_row = t.block_y * t.block_size_y + t.y;
  const int64_t row_step = t.grid_y * t.block_size_y;
  if constexpr (kChannelsLast) {
    const int64_t col = slot * V;
    if (col >= m.cols) return;
    typename Op::Channel channel[V];
    column_channels<V>(op, m, col, channel);
    for (int64_t row = first_row; row < m.rows; row += row_step) {
      op.template map<V, true>(m.begin + row * m.cols + col, channel);
    }
  } else {
    for (int64_t row = first_row; row < m.rows; row += row_step) {
      const int64_t first = row * m.cols;
      const int64_t at = (first & ~int64_t(V - 1)) + slot * V;
      if (at >= first + m.cols) continue;
      const typename Op::Channel channel = op.channel(row % m.channels);
      take_slot<V>(at, first, first + m.cols, [&](auto width, int64_t offset) {
        op.template map<width(), false>(offset, &channel);
      });
    }
  }
}

// channels_last: a block owns block_size_x * V columns and every grid_y-th group of block_size_y rows.
// contiguous: a block owns channel block_x, every grid_y-th group of block_size_y images and every grid_z-th group of
// block_size_x slots.
template <int V, bool kChannelsLast, typename Op>
RF_HOST_DEVICE void reduce_thread(const Op& op, const Matrix& m, const Thread& t, typename Op::Running* running) {
  const int64_t first_row = t.block_y * t.block_size_y + t.y;
  const int64_t row_step = t.grid_y * t.block_size_y;
  if constexpr (kChannelsLast) {
    const int64_t col = (t.block_x * t.block_size_x + t.x) * V;
    if (col >= m.cols) return;
    typename Op::Channel channel[V];
    column_channels<V>(op, m, col, channel);
    for (int64_t row = first_row; row < m.rows; row += row_step) {
      op.template reduce<V, true>(m.begin + row * m.cols + col, channel, running);
    }
  } else {
    const typename Op::Channel channel = op.channel(t.block_x);
    const int64_t slot_step = t.grid_z * t.block_size_x * V;
    for (int64_t image = first_row; image * m.channels < m.rows; image += row_step) {
      const int64_t first = (image * m.channels + t.block_x) * m.cols;
      const int64_t end = first + m.cols;
      int64_t at = (first & ~int64_t(V - 1)) + (t.block_z * t.block_size_x + t.x) * V;
      for (; at < end; at += slot_step) {
        take_slot<V>(at, first, end, [&](auto width, int64_t offset) {
          op.template reduce<width(), false>(offset, &channel, running);
        });
      }
    }
  }
}

// One step of merging a block's states pairwise: `lanes` of them lie `stride` apart, and lane < half takes in another.
template <int kStates, typename State>
RF_HOST_DEVICE void merge_step(State* states, int64_t index, int64_t lane, int64_t half, int64_t stride) {
  if (lane >= half) return;
  RF_UNROLL
  for (int v = 0; v < kStates; ++v) states[index + v].merge(states[index + v + half * stride]);
}

// What a block writes when its states are merged: partials[chunk, channel].
template <int V, bool kChannelsLast, typename State>
RF_HOST_DEVICE void write_partials(const State* states, const Matrix& m, const Thread& t, State* partials) {
  const int64_t chunk = t.block_z * t.grid_y + t.block_y;
  if constexpr (kChannelsLast) {
    const int64_t col = (t.block_x * t.block_size_x + t.x) * V;
    if (t.y != 0 || col >= m.cols) return;
    RF_UNROLL
    for (int v = 0; v < V; ++v) partials[chunk * m.cols + col + v] = states[t.x * V + v];
  } else {
    if (t.index() == 0) partials[chunk * m.channels + t.block_x] = states[0];
  }
}

// Lane `lane` of a channel merges chunks lane, lane + kMergeLanes, ... in that order.
template <typename State>
RF_HOST_DEVICE typename State::Wide merge_thread(
    const State* partials, int64_t chunks, int64_t channels, int64_t channel, int64_t lane) {
  typename State::Wide state = {};
  if (channel >= channels) return state;
  for (int64_t chunk = lane; chunk < chunks; chunk += kMergeLanes) {
    state.merge(partials[chunk * channels + channel].wide());
  }
  return state;
}

}  // namespace resnet_fast::cuda
