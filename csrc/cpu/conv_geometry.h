// Where a convolution's products find their pixels: tables for the kernels of amx/train.h. They depend on shapes only.
//
// The convolution and its input gradient are one thing here: output (S i + a) sums up, over the taps of its residue
// a, source (step (i + shift) + residue + base). For the convolution S is 1 and step its stride; for the gradient the
// other way round. Images, or rows of one, are worked through chunk by chunk, each packed once as
// [residues][row][column][image][channels], so that a tap is an offset and padding is zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace resnet_fast::cpu {

struct AxisTap {
  int64_t kernel, residue, shift;  // position in the kernel; index into residues; positions
};

struct Axis {
  int64_t source_size, step, base;
  std::vector<int64_t> residues;
  int64_t positions, max_shift;
  int64_t out_size, out_step;
  std::vector<std::vector<AxisTap>> classes;  // by residue of the output
};

struct AxisGeometry {
  int64_t size, out_size, kernel, stride, padding, dilation;
};

Axis forward_axis(const AxisGeometry& g);
Axis gradient_axis(const AxisGeometry& g);

struct Chunk {
  int64_t image, images, row, rows;
};

// Both axes, and how a chunk is packed.
struct Grid {
  int64_t images;
  Axis down, right;

  // Columns of a packed row. The padding on its right may be that on the left of the next.
  int64_t pitch() const;
  bool is_column() const;  // of pixels, each its own output
  int64_t classes() const { return down.out_step * right.out_step; }
  // Bytes are those of a position.
  std::vector<Chunk> chunks(int64_t position_bytes, int64_t budget, bool fill_tiles) const;

  int64_t positions(const Chunk& chunk) const;       // of the outputs, first residue
  int64_t source_positions(const Chunk& chunk) const;
  std::vector<int32_t> source(const Chunk& chunk) const;                // pixel of every source position, -1: zeros
  std::vector<int32_t> output(const Chunk& chunk, int64_t number) const;  // of every position, for one class
  std::vector<int32_t> taps(const Chunk& chunk, int64_t number) const;  // offsets
  std::vector<int32_t> kernel_taps(int64_t number) const;               // r * columns + s
  int64_t kernel_columns;

  struct Tiles {
    std::vector<int32_t> first, pixel;  // of a tile; of its 16 rows
  };
  Tiles tiles(const Chunk& chunk, int64_t number) const;
};

}  // namespace resnet_fast::cpu
