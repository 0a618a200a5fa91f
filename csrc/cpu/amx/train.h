// Convolutions of a training step by AMX tile products, seen from the host side: csrc/cpu/conv_train.cpp.
//
// As amx.h's, they know nothing of tensors or threads and may run only where usable() is true. Activations are
// channels_last; C and K are multiples of 32.
//
// A product takes its operands packed: a value as `planes` bfloat16 numbers whose sum it is. One plane for bfloat16.
// Three for float32, exact: high = bf16(v), middle = bf16(v - high), low = v - high - middle; the six products of
// planes i and j with i + j <= 2, summed up in float32, are as good as float32's own (Henry et al. 2019,
// arXiv:1904.06376). That holds for finite values, so packing returns the largest magnitude it has seen.
#pragma once

#include <cstdint>

#include "amx.h"

namespace resnet_fast::cpu::amx::train {

constexpr int64_t kBlock = kVector;  // channels, or pixels summed over, of one step of a product

// Pixels of a tensor: floats or bfloat16s, and the batch norm and ReLU that are pending on them.
struct Pixels {
  const void* data;
  int64_t channels;
  const int32_t* table;  // of a position, the pixel that it holds; -1 is a pixel of zeros
  int64_t positions;
  const float* mean;  // null: no norm. act(v) = relu((v - mean) * scale + bias), rounded
  const float* scale;
  const float* bias;
};

// Values' bits without the sign; >= kNotFinite: some value has no exact planes, or is not finite.
constexpr uint32_t kNotFinite = 0x7f7f8000;

// [block of 32 channels][plane][position][32]; `block`: values from one block to the next.
uint32_t pack_pixels(int planes, const Pixels& from, uint16_t* to, int64_t block);

// Channels [begin, end): [16 channels][plane][position][16 channels][2], a position and the one 16 further on side by
// side. compact: only the first 16 positions of each 32. from.positions is a multiple of 32.
uint32_t pack_pairs(int planes, const Pixels& from, int64_t begin, int64_t end, bool compact, uint16_t* to);

// Channels [begin, end): [16 channels][32 positions][plane][16][16][2], as `pack_pairs` but transposed.
uint32_t pack_transposed(int planes, const Pixels& from, int64_t begin, int64_t end, uint16_t* to);

// One output block of a weight of (K, taps, C) values for a product over the taps named.
// forward: sums over C, [C / 32][tap][plane][2][16][16][2]. Else sums over K, to C: [K / 32][tap]...
struct WeightArgs {
  const void* data;
  int64_t out_channels, channels, taps;
  const int32_t* tap;
  int64_t n_taps;
  bool transposed;
};
uint32_t pack_weight(int planes, const WeightArgs& args, int64_t output, uint16_t* to);

// Sums over columns of y, as moments around `shift`.
struct Moments {
  float shift[kBlock];
  double sums[kBlock], squares[kBlock];
  int64_t rows;
};

struct ConvArgs {
  const uint16_t* x;     // pack_pixels', or of one plane the pixels themselves
  int64_t x_row, x_plane;  // steps in values
  const int64_t* offsets;  // from a tile's first position to what each step multiplies: for every block all taps
  int64_t steps;           // none: y is zero, or what is added
  const uint16_t* weight;  // pack_weight's, one output block after another
  int64_t outputs;         // blocks of output channels
  const int32_t* tile;     // first positions of the tiles of 16
  const int32_t* pixel;    // of the tiles' rows: output pixels, -1 for none
  int64_t tiles;
  void* y;               // from the first output block; bfloat16 for one plane, else float32
  const void* add;       // as y, or null
  int64_t y_channels;
  bool stream;           // y, 64-byte aligned, past the caches
  Moments* moments;      // of every output block, or null
};

// y = conv(x) + add for the tiles' pixels. Tiles are the outer loop, so that y is written pixel by pixel.
void conv(int planes, const ConvArgs& args);

struct WgradArgs {
  const uint16_t* dy;  // pack_transposed's, of 32 output channels
  const uint16_t* x;   // pack_pairs'
  int64_t positions;   // of dy, a multiple of 32
  int64_t x_positions; // of x
  const int32_t* taps;
  int64_t n_taps;
  bool compact;
  float* dweight;      // [tap][32 output channels][32]
  bool add;            // to dweight
};
void wgrad_block(int planes, const WgradArgs& args);

// (32, taps, C) of a weight's gradient from groups of [C / 32][tap][32][32], `step` apart, added up in order.
struct MergeArgs {
  const float* from;
  int64_t groups, step, channels, taps;
  void* to;  // bfloat16 for one plane, else float32
};
void merge_gradients(int planes, const MergeArgs& args);

}  // namespace resnet_fast::cpu::amx::train
