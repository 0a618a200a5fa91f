// Walks a Plan's items and hands vectors to an op: the loops that all kernels share.
//
// An op says what happens to one vector:
//   Params at(int64_t column)         parameters of the vector's columns (rows layout)
//   Params splat(int64_t channel)     parameters of one channel, broadcast (planes layout)
//   void map(int64_t offset, const Params&, span)                 element-wise kernels
//   void reduce(int64_t offset, const Params&, Sums&, span)       reductions
#pragma once

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
  return {(image * p.channels + channel) * p.plane + pixel, p.channels * p.plane, smaller(p.batch_block, p.batch - image),
          smaller(p.plane_block, p.plane - pixel), channel, item};
}

template <int n>
using Rows = std::integral_constant<int, n>;

// f(row, Rows<group or 1>, col, span) over a block: `group` rows at a time, one vector of columns at a time.
template <int group, int64_t step, typename F>
C10_ALWAYS_INLINE void for_each_tile(int64_t rows, int64_t cols, const F& f) {
  int64_t row = 0;
  for (; row + group <= rows; row += group) {
    int64_t col = 0;
    for (; col + step <= cols; col += step) f(row, Rows<group>{}, col, Full{});
    if (col < cols) f(row, Rows<group>{}, col, Part{cols - col});
  }
  for (; row < rows; ++row) {
    int64_t col = 0;
    for (; col + step <= cols; col += step) f(row, Rows<1>{}, col, Full{});
    if (col < cols) f(row, Rows<1>{}, col, Part{cols - col});
  }
}

template <typename scalar_t, typename Op>
void map_rows(const RowsBlock& block, const Op& op) {
  for_each_tile<4, Lanes<scalar_t>::size>(
      block.rows, block.cols, [&](int64_t row, auto rows, int64_t col, auto span) RF_INLINE_LAMBDA {
        const auto params = op.at(block.column + col);
        const int64_t offset = block.offset + row * block.stride + col;
        for (int i = 0; i < decltype(rows)::value; ++i) op.map(offset + i * block.stride, params, span);
      });
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

// Per-column sums of a block into first and second (kMaxColBlock + kLanePadding long). Groups of rows are summed in
// registers and only then added to the arrays, for speed and for a shorter chain of roundings.
template <typename scalar_t, typename Op>
void reduce_rows(const RowsBlock& block, const Op& op, acc_type<scalar_t>* first, acc_type<scalar_t>* second) {
  constexpr int64_t step = Lanes<scalar_t>::size;
  for (int64_t col = 0; col < block.cols; col += step) {
    Lanes<scalar_t>::fill(0).store_acc(first + col);
    Lanes<scalar_t>::fill(0).store_acc(second + col);
  }
  for_each_tile<8, step>(block.rows, block.cols, [&](int64_t row, auto rows, int64_t col, auto span) RF_INLINE_LAMBDA {
    const auto params = op.at(block.column + col);
    const int64_t offset = block.offset + row * block.stride + col;
    Sums<scalar_t> sums[2];
    for (int i = 0; i < decltype(rows)::value; ++i) op.reduce(offset + i * block.stride, params, sums[i % 2], span);
    sums[0].add(sums[1]);
    (Lanes<scalar_t>::load_acc(first + col) + sums[0].first).store_acc(first + col);
    (Lanes<scalar_t>::load_acc(second + col) + sums[0].second).store_acc(second + col);
  });
}

// The two sums over one channel's block: four running sums in float, each restarted every kRun vectors to keep the chain
// of roundings short, folded per plane into double.
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
