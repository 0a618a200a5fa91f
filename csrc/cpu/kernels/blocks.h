// Walks a Plan's items and hands vectors to an op: the loops that all kernels share.
//
// An op says what happens to one vector:
//   Params at(int64_t column)         parameters of the vector's columns (rows layout)
//   Params splat(int64_t channel)     parameters of one channel, broadcast (planes layout)
//   void map(int64_t offset, const Params&, span)                 element-wise kernels
//   void reduce(int64_t offset, const Params&, Sums&, span)       reductions
//   void fetch(int64_t offset)        prefetch what map or reduce will touch there; offset may lie past the end
#pragma once

#include <initializer_list>

#include "../kernels.h"
#include "lanes.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

#define RF_INLINE_LAMBDA __attribute__((always_inline))

// A rows x cols piece of the row-major matrix; `column` indexes parameters, `partial` the partial sums.
struct RowsBlock {
  int64_t offset, stride, rows, cols, column, partial;
};

// Pieces of one channel's planes: `planes` of them, `stride` apart, `size` values each.
struct PlanesBlock {
  int64_t offset, stride, planes, size, channel, partial;
};

C10_ALWAYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

C10_ALWAYS_INLINE RowsBlock rows_block(const Plan& p, int64_t item) {
  const int64_t row_block = item / p.col_blocks;
  if (row_block == p.row_blocks) {
    return {p.rows * p.cols, p.channels, p.tail_rows, p.channels, 0, p.row_blocks * p.width};
  }
  const int64_t row = row_block * p.row_block;
  const int64_t col = (item % p.col_blocks) * p.col_block;
  return {row * p.cols + col, p.cols, smaller(p.row_block, p.rows - row), smaller(p.col_block, p.cols - col), col,
          row_block * p.width + col};
}

C10_ALWAYS_INLINE PlanesBlock planes_block(const Plan& p, int64_t item) {
  const int64_t chunk = item / p.channels;
  const int64_t channel = item % p.channels;
  const int64_t image = (chunk / p.plane_blocks) * p.batch_block;
  const int64_t pixel = (chunk % p.plane_blocks) * p.plane_block;
  return {(image * p.channels + channel) * p.plane + pixel, p.channels * p.plane,
          smaller(p.batch_block, p.batch - image), smaller(p.plane_block, p.plane - pixel), channel, item};
}

C10_ALWAYS_INLINE void fetch_to_read(const void* p) { __builtin_prefetch(p, 0); }
C10_ALWAYS_INLINE void fetch_to_write(const void* p) { __builtin_prefetch(p, 1); }

// f(col, span) along a row, one vector of columns at a time.
template <int64_t step, typename F>
C10_ALWAYS_INLINE void for_each_vector(int64_t cols, const F& f) {
  int64_t col = 0;
  for (; col + step <= cols; col += step) f(col, Full{});
  if (col < cols) f(col, Part{cols - col});
}

// How many elements ahead to fetch: whole rows, and about the bytes that arrive within the memory's latency.
template <typename scalar_t>
C10_ALWAYS_INLINE int64_t fetch_ahead(const RowsBlock& block) {
  const int64_t rows = static_cast<int64_t>(4096 / sizeof(scalar_t)) / block.cols;
  return block.stride * (rows > 1 ? rows : 1);
}

// Row after row, in the order of the memory: taking several rows side by side would save loads of the parameters, but
// halves the bandwidth.
template <typename scalar_t, typename Op>
void map_rows(const RowsBlock& block, const Op& op) {
  const int64_t ahead = fetch_ahead<scalar_t>(block);
  for (int64_t row = 0; row < block.rows; ++row) {
    const int64_t offset = block.offset + row * block.stride;
    for_each_vector<Lanes<scalar_t>::size>(block.cols, [&](int64_t col, auto span) RF_INLINE_LAMBDA {
      op.fetch(offset + col + ahead);
      op.map(offset + col, op.at(block.column + col), span);
    });
  }
}

template <typename scalar_t, typename Op>
void map_planes(const PlanesBlock& block, const Op& op) {
  constexpr int64_t step = Lanes<scalar_t>::size;
  const auto params = op.splat(block.channel);
  for (int64_t plane = 0; plane < block.planes; ++plane) {
    const int64_t offset = block.offset + plane * block.stride;
    int64_t i = 0;
    for (; i + step <= block.size; i += step) op.map(offset + i, params, Full{});
    if (i < block.size) op.map(offset + i, params, Part{block.size - i});
  }
}

// Items from the last to the first: the pass before this one ended there, so that much is still in the cache.
template <typename scalar_t, typename Op>
void map_items(const Plan& plan, const Op& op, int64_t begin, int64_t end) {
  for (int64_t item = end - 1; item >= begin; --item) {
    if (plan.rows_layout) {
      map_rows<scalar_t>(rows_block(plan, item), op);
    } else {
      map_planes<scalar_t>(planes_block(plan, item), op);
    }
  }
}

constexpr int64_t kScratch = kMaxColBlock + kLanePadding;  // per-column arrays on the stack

// Two sums at once, which is what both reductions need.
template <typename scalar_t>
struct Sums {
  Lanes<scalar_t> first = Lanes<scalar_t>::fill(0);
  Lanes<scalar_t> second = Lanes<scalar_t>::fill(0);

  C10_ALWAYS_INLINE void add(const Sums& other) {
    first = first + other.first;
    second = second + other.second;
  }
};

// Adds one row to per-column sums.
template <typename scalar_t, typename Op>
C10_ALWAYS_INLINE void reduce_row(
    int64_t offset, int64_t ahead, const RowsBlock& block, const Op& op, acc_type<scalar_t>* first,
    acc_type<scalar_t>* second) {
  using L = Lanes<scalar_t>;
  for_each_vector<L::size>(block.cols, [&](int64_t col, auto span) RF_INLINE_LAMBDA {
    op.fetch(offset + col + ahead);
    Sums<scalar_t> sums{L::load_acc(first + col), L::load_acc(second + col)};
    op.reduce(offset + col, op.at(block.column + col), sums, span);
    sums.first.store_acc(first + col);
    sums.second.store_acc(second + col);
  });
}

// Per-column sums of a block into first and second (kScratch long). Every kRun rows start new sums, to keep the chain
// of roundings short.
template <typename scalar_t, typename Op>
void reduce_rows(const RowsBlock& block, const Op& op, acc_type<scalar_t>* first, acc_type<scalar_t>* second) {
  using L = Lanes<scalar_t>;
  constexpr int64_t kRun = 32;
  const int64_t ahead = fetch_ahead<scalar_t>(block);
  alignas(64) acc_type<scalar_t> run_first[kScratch];
  alignas(64) acc_type<scalar_t> run_second[kScratch];
  for (int64_t col = 0; col < block.cols; col += L::size) {
    for (auto* sums : {first, second, run_first, run_second}) L::fill(0).store_acc(sums + col);
  }
  for (int64_t row = 0; row < block.rows;) {
    const int64_t run_end = smaller(block.rows, row + kRun);
    for (; row < run_end; ++row) {
      reduce_row<scalar_t>(block.offset + row * block.stride, ahead, block, op, run_first, run_second);
    }
    for (int64_t col = 0; col < block.cols; col += L::size) {
      (L::load_acc(first + col) + L::load_acc(run_first + col)).store_acc(first + col);
      (L::load_acc(second + col) + L::load_acc(run_second + col)).store_acc(second + col);
      L::fill(0).store_acc(run_first + col);
      L::fill(0).store_acc(run_second + col);
    }
  }
}

// The two sums over one channel's block: four running sums, each restarted every kRun vectors to keep the chain of
// roundings short, folded per plane into double.
template <typename scalar_t, typename Op>
void reduce_planes(const PlanesBlock& block, const Op& op, double& first, double& second) {
  constexpr int64_t step = Lanes<scalar_t>::size;
  constexpr int64_t kRun = 16;
  const auto params = op.splat(block.channel);
  first = 0;
  second = 0;
  for (int64_t plane = 0; plane < block.planes; ++plane) {
    const int64_t offset = block.offset + plane * block.stride;
    Sums<scalar_t> sums[4];
    int64_t i = 0;
    while (i + 4 * step <= block.size) {
      const int64_t run_end = smaller(block.size, i + 4 * kRun * step);
      Sums<scalar_t> run[4];
      for (; i + 4 * step <= run_end; i += 4 * step) {
        for (int j = 0; j < 4; ++j) op.reduce(offset + i + j * step, params, run[j], Full{});
      }
      for (int j = 0; j < 4; ++j) sums[j].add(run[j]);
    }
    for (; i + step <= block.size; i += step) op.reduce(offset + i, params, sums[0], Full{});
    if (i < block.size) op.reduce(offset + i, params, sums[1], Part{block.size - i});
    sums[0].add(sums[1]);
    sums[2].add(sums[3]);
    sums[0].add(sums[2]);
    acc_type<scalar_t> lanes[2][step];
    sums[0].first.store_acc(lanes[0]);
    sums[0].second.store_acc(lanes[1]);
    for (int64_t lane = 0; lane < step; ++lane) {
      first += lanes[0][lane];
      second += lanes[1][lane];
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
