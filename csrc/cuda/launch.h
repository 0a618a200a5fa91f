// Launch geometry of the batch norm kernels: which thread owns what, for any shape. Host arithmetic, no CUDA.
//
// A tensor is seen as a row-major matrix. channels_last is [N*H*W, C], a channel a column; where C is no multiple of the
// V elements of a 16-byte access, `group` rows are taken as one, so that rows are whole accesses, and the rows left over
// go through scalar kernels. contiguous is [N*C, H*W], a channel a row, which starts and ends anywhere: threads own
// aligned slots of V elements, and take those that a row does not fill one by one.
//
// Grids depend on the shape only, which is half of why results are bitwise reproducible.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>

namespace resnet_fast::cuda {

constexpr int kThreads = 256;
constexpr int kMergeChannels = 32;  // merge_kernel: channels a block owns
constexpr int kMergeLanes = 16;     // and threads a channel
constexpr int64_t kMaxGridX = 2147483647;
constexpr int64_t kMaxGridYZ = 65535;
constexpr int64_t kMapBlocks = 2048;     // enough to fill a large GPU: from there on threads take more rows each
constexpr int64_t kReduceBlocks = 1024;  // about enough to fill one twice
constexpr int64_t kMapRows = 8;          // the most rows that a map's thread takes before the grid grows
constexpr int64_t kReduceSteps = 16;     // the fewest accesses that a reduction's thread sums up

constexpr int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

struct Image {
  int64_t batch;
  int64_t channels;
  int64_t plane;  // height * width
  bool channels_last;

  constexpr int64_t count() const { return batch * plane; }  // values a channel
};

struct Matrix {
  int64_t rows;
  int64_t cols;
  int64_t channels;
  bool channels_last;  // column j is of channel j % channels; else row i of channel i % channels
  int64_t begin;       // the first element's offset in the tensor
};

// What goes through accesses of V elements, and the rows left over (none: rows = 0).
struct Split {
  Matrix main;
  Matrix rest;
};

constexpr Split split(const Image& image, int64_t vector) {
  if (!image.channels_last) {
    return {{image.batch * image.channels, image.plane, image.channels, false, 0}, {0, 1, image.channels, false, 0}};
  }
  const int64_t group = vector / std::gcd(image.channels, vector);
  const int64_t rows = image.count() / group;
  const int64_t cols = image.channels * group;
  return {
      {rows, cols, image.channels, true, 0}, {image.count() % group, image.channels, image.channels, true, rows * cols}};
}

struct Size3 {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

// Slots of V elements that a row touches, at most.
constexpr int64_t slots_of(const Matrix& m, int64_t vector) {
  return m.cols % vector == 0 ? m.cols / vector : (m.cols + 2 * vector - 2) / vector;
}

// Threads along slots (a power of two, just wide enough), the rest of the block along rows.
constexpr Size3 block_shape(int64_t slots) {
  int64_t x = 1;
  while (x < kThreads && x < slots) x *= 2;
  return {x, kThreads / x, 1};
}

// x: slots; y: rows, in strides of the grid.
constexpr Size3 map_grid(const Matrix& m, int64_t slots, const Size3& block) {
  const int64_t x = ceil_div(slots, block.x);
  const int64_t each_row = ceil_div(m.rows, block.y);
  const int64_t wanted = std::max(ceil_div(each_row, kMapRows), std::min(each_row, ceil_div(kMapBlocks, x)));
  return {x, std::min(wanted, kMaxGridYZ), 1};
}

// channels_last: x: slots, y: rows. contiguous: x: channels, y: images, z: slots of a row.
constexpr Size3 reduce_grid(const Matrix& m, int64_t slots, const Size3& block) {
  if (m.channels_last) {
    const int64_t x = ceil_div(slots, block.x);
    return {x, std::min(ceil_div(m.rows, block.y * kReduceSteps), ceil_div(kReduceBlocks, x)), 1};
  }
  const int64_t blocks_a_channel = ceil_div(kReduceBlocks, m.channels);
  const int64_t y = std::min(ceil_div(m.rows / m.channels, block.y), blocks_a_channel);
  const int64_t z = std::min(ceil_div(slots, block.x * kReduceSteps), ceil_div(blocks_a_channel, y));
  return {m.channels, y, z};
}

// Partial results that a reduction leaves for every channel: a block's, and of grouped rows one a row of the group.
constexpr int64_t chunks_of(const Matrix& m, const Size3& grid) {
  return grid.y * grid.z * (m.channels_last ? m.cols / m.channels : 1);
}

constexpr int64_t reduce_chunks(const Matrix& m, int64_t vector) {
  if (m.rows == 0) return 0;
  const int64_t slots = slots_of(m, vector);
  return chunks_of(m, reduce_grid(m, slots, block_shape(slots)));
}

// Of the whole tensor, in accesses of `vector` elements.
constexpr int64_t reduce_chunks(const Image& image, int64_t vector) {
  const Split parts = split(image, vector);
  return reduce_chunks(parts.main, vector) + reduce_chunks(parts.rest, 1);
}

}  // namespace resnet_fast::cuda
