// Index arithmetic of the implicit-GEMM convolution of conv_bn_act.cu: which byte goes where. Host and device.
//
//     y[pixel, k] = sum over (tap, c) of x[pixel's window at tap, c] * weight[k, tap, c]
//
// is a product of matrices: rows are output pixels (n, p, q), columns output channels, and the sum runs over taps (r, s)
// and input channels in chunks of 8, which are 16 bytes of NHWC activations and of KRSC weights. A block computes
// kPixels x kChannels outputs from tiles of kPixels and kChannels rows of kChunks chunks in shared memory.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "host_device.h"

namespace resnet_fast::cuda {

constexpr int kChunk = 8;   // channels in 16 bytes
constexpr int kChunks = 4;  // a tile's row: 32 channels
constexpr int kStages = 4;  // tiles in flight
constexpr int kWarp = 32;

// ---- what is computed ----

// Offsets are int64; sizes of one dimension, padding included, and the chunks of one sum are below kMostOfOne (`fits`).
constexpr int64_t kMostOfOne = int64_t(1) << 30;

struct ConvGeometry {
  int64_t batch;
  int32_t height, width, channels;              // x: (N, H, W, C)
  int32_t out_height, out_width, out_channels;  // y: (N, P, Q, K)
  int32_t kernel_height, kernel_width;              // weight: (K, R, S, C)
  int32_t stride_height, stride_width;
  int32_t padding_height, padding_width;
  int32_t dilation_height, dilation_width;

  RF_HOST_DEVICE constexpr int64_t pixels() const { return batch * out_height * out_width; }
  RF_HOST_DEVICE constexpr int32_t channel_chunks() const { return channels / kChunk; }
  // Chunks that a sum runs over, and the tiles they fill.
  RF_HOST_DEVICE constexpr int32_t chunks() const { return kernel_height * kernel_width * channel_chunks(); }
  RF_HOST_DEVICE constexpr int32_t steps() const { return (chunks() + kChunks - 1) / kChunks; }
};

constexpr bool fits(int64_t x_rows, int64_t x_cols, int64_t channels, int64_t out_channels, int64_t taps) {
  for (const int64_t size : {x_rows, x_cols, channels, out_channels, taps}) {
    if (size >= kMostOfOne) return false;
  }
  return taps * (channels / kChunk + 1) < kMostOfOne;
}

// Where an output pixel's window starts in x.
struct Window {
  int64_t offset;  // of its first place, which may be outside
  int32_t top;     // may be negative: padding
  int32_t left;
};

RF_HOST_DEVICE constexpr Window window_of(const ConvGeometry& g, int64_t pixel) {
  if (pixel >= g.pixels()) return {0, -static_cast<int32_t>(2 * kMostOfOne - 1), 0};  // all of it outside
  const int64_t row = pixel / g.out_width;
  const int64_t n = row / g.out_height;
  const int32_t top = static_cast<int32_t>(row - n * g.out_height) * g.stride_height - g.padding_height;
  const int32_t left = static_cast<int32_t>(pixel - row * g.out_width) * g.stride_width - g.padding_width;
  return {((n * g.height + top) * g.width + left) * g.channels, top, left};
}

// One chunk of the sum: a tap and 8 channels. Advances by a step's worth at a time, without divisions.
struct Tap {
  int32_t r, s;
  int32_t chunk;  // of the channels

  RF_HOST_DEVICE static constexpr Tap of(const ConvGeometry& g, int32_t index) {
    const int32_t tap = index / g.channel_chunks();
    return {tap / g.kernel_width, tap % g.kernel_width, index - tap * g.channel_chunks()};
  }
  RF_HOST_DEVICE constexpr void advance(const ConvGeometry& g) {
    chunk += kChunks;
    while (chunk >= g.channel_chunks()) {
      chunk -= g.channel_chunks();
      if (++s == g.kernel_width) {
        s = 0;
        ++r;
      }
    }
  }
};

// What a tap adds to any window's place and offset.
struct Reach {
  int64_t offset;
  int32_t row;
  int32_t col;
};

RF_HOST_DEVICE constexpr Reach reach_of(const ConvGeometry& g, const Tap& tap) {
  const int32_t row = tap.r * g.dilation_height;
  const int32_t col = tap.s * g.dilation_width;
  return {(static_cast<int64_t>(row) * g.width + col) * g.channels + tap.chunk * kChunk, row, col};
}

constexpr int64_t kNothing = -1;  // a chunk of zeros

// Offset in x of the chunk that a window sees at a tap; `exists`: whether the sum has it.
RF_HOST_DEVICE constexpr int64_t x_offset(
    const ConvGeometry& g, const Window& window, const Reach& reach, bool exists) {
  const bool inside = static_cast<uint32_t>(window.top + reach.row) < static_cast<uint32_t>(g.height) &&
                      static_cast<uint32_t>(window.left + reach.col) < static_cast<uint32_t>(g.width);
  return exists && inside ? window.offset + reach.offset : kNothing;
}

// ---- a block's tiles in shared memory ----

// Offset, in elements, of a chunk in a tile whose rows are kChunks chunks. Rows are 64 bytes; the exclusive or spreads
// eight rows of one column over all 32 banks, which is how ldmatrix reads and cp.async writes.
RF_HOST_DEVICE constexpr int tile_offset(int row, int chunk) {
  return (row * kChunks + (chunk ^ ((row >> 1) & (kChunks - 1)))) * kChunk;
}

// ---- mma.sync.m16n8k16 and ldmatrix (PTX ISA 9.7.14.5) ----

// The row and chunk of a tile that a lane hands to ldmatrix.x4 for a 16 x 16 operand A at (row, chunk): its four 8 x 8
// matrices are a0 (rows 0-7, k 0-7), a1 (rows 8-15, k 0-7), a2 (rows 0-7, k 8-15), a3 (rows 8-15, k 8-15).
struct TilePlace {
  int row;
  int chunk;
};

RF_HOST_DEVICE constexpr TilePlace pixel_place(int lane, int row, int chunk) {
  return {row + lane % 16, chunk + lane / 16};
}

// The same for two operands B (16 x 8 each, 16 output channels in all), stored a channel a row: b0 (k 0-7) and b1
// (k 8-15) of channels 0-7, then those of channels 8-15.
RF_HOST_DEVICE constexpr TilePlace weight_place(int lane, int row, int chunk) {
  return {row + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2};
}

// Where accumulator `i` of a lane lies in its 16 x 8 tile.
RF_HOST_DEVICE constexpr int accumulator_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
RF_HOST_DEVICE constexpr int accumulator_col(int lane, int i) { return lane % 4 * 2 + i % 2; }

// Sixteen rows further down the exclusive or is the same: fragments lie at constant distances.
constexpr int kSixteenRows = 16 * kChunks * kChunk;
static_assert(tile_offset(16, 0) == kSixteenRows && tile_offset(23, 3) == tile_offset(7, 3) + kSixteenRows);

RF_HOST_DEVICE constexpr int pixel_offset(int lane, int row, int chunk) {
  const TilePlace place = pixel_place(lane, row, chunk);
  return tile_offset(place.row, place.chunk);
}
RF_HOST_DEVICE constexpr int weight_offset(int lane, int row, int chunk) {
  const TilePlace place = weight_place(lane, row, chunk);
  return tile_offset(place.row, place.chunk);
}

// ---- tilings ----

// A block: kPixels x kChannels outputs, by warps that have kWarpPixels x kWarpChannels each.
template <int kPixels_, int kChannels_, int kWarpPixels_, int kWarpChannels_>
struct Tiling {
  static constexpr int kPixels = kPixels_;
  static constexpr int kChannels = kChannels_;
  static constexpr int kWarpPixels = kWarpPixels_;
  static constexpr int kWarpChannels = kWarpChannels_;
  static constexpr int kWarpsAlong = kPixels / kWarpPixels;  // pixels
  static constexpr int kWarps = kWarpsAlong * (kChannels / kWarpChannels);
  static constexpr int kBlock = kWarps * kWarp;
  static constexpr int kRowTiles = kWarpPixels / 16;  // mma tiles of a warp
  static constexpr int kColTiles = kWarpChannels / 8;
  static constexpr int kPixelCopies = kPixels * kChunks / kBlock;  // 16-byte copies of a thread for one step
  static constexpr int kWeightCopies = kChannels * kChunks / kBlock;
  static constexpr int kRowsApart = kBlock / kChunks;  // of a thread's copies
  static constexpr int kStageElements = (kPixels + kChannels) * kChunks * kChunk;
  static constexpr int kPipelineBytes = kStages * kStageElements * 2;
  // Epilogue: a warp turns its accumulators, 16 pixels at a time, into rows of channels. The padding keeps the four rows
  // that half a warp writes at once off each other's banks.
  static constexpr int kStagingRow = kWarpChannels + 8;
  static constexpr int kStagingFloats = 16 * kStagingRow;
  static constexpr int kStagingBytes = kWarps * kStagingFloats * 4;
  static constexpr int kSharedBytes = kPipelineBytes > kStagingBytes ? kPipelineBytes : kStagingBytes;
  static constexpr int kRowChunks = kWarpChannels / kChunk;        // 16-byte stores of one pixel's channels
  static constexpr int kRowsAtOnce = kWarp / kRowChunks;           // pixels that a warp stores at once
  static constexpr int kStores = 16 / kRowsAtOnce;

  static_assert(kPixelCopies * kRowsApart == kPixels && kWeightCopies * kRowsApart == kChannels);
  static_assert(kColTiles % 2 == 0 && kStores * kRowsAtOnce == 16);

  // Blocks are numbered along channels first, so that those of the same pixels run together and share them in L2.
  RF_HOST_DEVICE static constexpr int32_t channel_blocks(const ConvGeometry& g) {
    return (g.out_channels + kChannels - 1) / kChannels;
  }
  RF_HOST_DEVICE static constexpr int64_t blocks(const ConvGeometry& g) {
    return (g.pixels() + kPixels - 1) / kPixels * channel_blocks(g);
  }
  RF_HOST_DEVICE static constexpr int64_t first_pixel(const ConvGeometry& g, int64_t block) {
    return block / channel_blocks(g) * kPixels;
  }
  RF_HOST_DEVICE static constexpr int32_t first_channel(const ConvGeometry& g, int64_t block) {
    return static_cast<int32_t>(block % channel_blocks(g)) * kChannels;
  }
  RF_HOST_DEVICE static constexpr int warp_row(int warp) { return warp % kWarpsAlong * kWarpPixels; }
  RF_HOST_DEVICE static constexpr int warp_col(int warp) { return warp / kWarpsAlong * kWarpChannels; }
};

using WideTiling = Tiling<128, 128, 64, 32>;
using NarrowTiling = Tiling<128, 64, 32, 32>;

constexpr int64_t kFewBlocks = 264;  // two on each of a large GPU's multiprocessors

// Where half of a wide tile would be empty, or wide blocks are too few to fill the GPU.
RF_HOST_DEVICE constexpr bool prefers_narrow(const ConvGeometry& g) {
  const int64_t last = g.out_channels % WideTiling::kChannels;
  return (last > 0 && last <= NarrowTiling::kChannels) || WideTiling::blocks(g) < kFewBlocks;
}

// ---- a thread's part of the copies ----

// Copies the same chunk column of every kRowsApart-th row, step after step.
template <typename Tile>
struct Loader {
  Window windows[Tile::kPixelCopies];
  Tap tap;
  int32_t index;      // chunk of the sum
  int64_t weight;     // offset of the first row's chunk
  int32_t channels;   // left from the first row on
  int row, chunk;

  RF_HOST_DEVICE constexpr Loader(const ConvGeometry& g, int64_t block, int thread)
      : windows{}, tap(Tap::of(g, thread % kChunks)), index(thread % kChunks), weight(0), channels(0),
        row(thread / kChunks), chunk(thread % kChunks) {
    const int32_t channel = Tile::first_channel(g, block) + row;
    weight = (static_cast<int64_t>(channel) * g.chunks() + index) * kChunk;
    channels = g.out_channels - channel;
    RF_UNROLL
    for (int i = 0; i < Tile::kPixelCopies; ++i) {
      windows[i] = window_of(g, Tile::first_pixel(g, block) + row + i * Tile::kRowsApart);
    }
  }

  // copy_x(offset in the stage, offset in x), copy_weight(offset in the stage, offset in weight), kNothing for zeros.
  template <typename CopyX, typename CopyWeight>
  RF_HOST_DEVICE constexpr void step(const ConvGeometry& g, const CopyX& copy_x, const CopyWeight& copy_weight) {
    const bool exists = index < g.chunks();
    const Reach reach = reach_of(g, tap);
    const int64_t apart = static_cast<int64_t>(Tile::kRowsApart) * g.chunks() * kChunk;
    RF_UNROLL
    for (int i = 0; i < Tile::kPixelCopies; ++i) {
      copy_x(tile_offset(row + i * Tile::kRowsApart, chunk), x_offset(g, windows[i], reach, exists));
    }
    RF_UNROLL
    for (int i = 0; i < Tile::kWeightCopies; ++i) {
      const bool wanted = exists && i * Tile::kRowsApart < channels;
      copy_weight(
          tile_offset(Tile::kPixels + row + i * Tile::kRowsApart, chunk), wanted ? weight + i * apart : kNothing);
    }
    tap.advance(g);
    index += kChunks;
    weight += kChunks * kChunk;
  }
};

// ---- a lane's part of the stores ----

// Of 16 pixels by kWarpChannels: rows lane / kRowChunks + i * kRowsAtOnce, always the same 8 channels.
template <typename Tile>
struct Storer {
  int64_t pixel;    // of the warp's first
  int32_t channel;  // of this lane's 8
  int row, col;     // in the staging buffer

  RF_HOST_DEVICE constexpr Storer(const ConvGeometry& g, int64_t block, int warp, int lane)
      : pixel(Tile::first_pixel(g, block) + Tile::warp_row(warp)),
        channel(Tile::first_channel(g, block) + Tile::warp_col(warp) + lane % Tile::kRowChunks * kChunk),
        row(lane / Tile::kRowChunks), col(lane % Tile::kRowChunks * kChunk) {}

  RF_HOST_DEVICE constexpr bool has_channels(const ConvGeometry& g) const { return channel < g.out_channels; }
  RF_HOST_DEVICE constexpr int staging_offset(int i) const {
    return (row + i * Tile::kRowsAtOnce) * Tile::kStagingRow + col;
  }
  // Offset in y of store i of row tile `tile`; kNothing beyond the last pixel.
  RF_HOST_DEVICE constexpr int64_t y_offset(const ConvGeometry& g, int tile, int i) const {
    const int64_t at = pixel + tile * 16 + row + i * Tile::kRowsAtOnce;
    return at < g.pixels() ? at * g.out_channels + channel : kNothing;
  }
};

template <typename Tile>
RF_HOST_DEVICE constexpr int staging_place(int lane, int col_tile, int i) {
  return accumulator_row(lane, i) * Tile::kStagingRow + col_tile * 8 + accumulator_col(lane, i);
}

}  // namespace resnet_fast::cuda
