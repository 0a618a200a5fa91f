// Convolutions and pooling on blocked bfloat16 activations, by AMX tile products or AVX-512, seen from the host side.
//
// The .cpp files here are compiled for AMX and know nothing of tensors or threads; they may run only where usable() is
// true; conv_dots() and what touches no tile, with one plane, also where dots_usable() is. A vector of activations is
// 32 channels, 64 bytes: a row of a tile. A buffer holds [block of 32 channels] [plane] [pixel] [row] of them, so that a
// tile of 16 consecutive rows is 1 KiB without gaps, which loads as fast from the second cache level as from the first.
// With one plane a value is a bfloat16. With three it is a float32, the exact sum of its planes: high = bf16(v), middle =
// bf16(v - high), low = v - high - middle (Henry et al. 2019, arXiv:1904.06376).
#pragma once

#include <cstdint>

namespace resnet_fast::cpu::amx {

constexpr int64_t kVector = 32;          // channels in a vector
constexpr int64_t kPairs = 16;           // of channels in a vector: what a product takes at a time
constexpr int64_t kTileRows = 16;        // vectors in a tile
constexpr int64_t kBlockValues = 1024;   // weights of 32 input by 32 output channels, one plane
constexpr int64_t kScratchFloats = 4096;  // that a thread lends to conv(), 64-byte aligned

// Whether this CPU has AMX with bfloat16 and the system lets this process use it, which the first call asks it for.
// False as well where PyTorch was told to use less than AVX-512 (ATEN_CPU_CAPABILITY).
bool usable();

// Whether this CPU has bfloat16's dot products in AVX-512, and PyTorch was not told to use less.
bool dots_usable();

// "AMX", for reports; something else where the tests have replaced it.
const char* name();

// Around all calls of conv() in a thread.
void configure_tiles();
void release_tiles();

// Where 16 rows are read, and where the first is written, each a step behind the one before, in values from the image's
// first pixel. Bit i of `rows`: row i is written.
struct Tile {
  int64_t x, y;
  uint32_t rows;
};

// The same of one row, for conv_dots(). Bit i of `beside`: of its tap i nothing but halo, which is zero, is read.
struct Pixel {
  int32_t x, y;
  uint32_t beside;
};
constexpr int64_t kMostBeside = 32;  // taps

struct ConvArgs {
  int planes;
  const uint16_t* x;
  int64_t x_row, x_plane, x_block;  // steps in values
  int64_t blocks;                   // of input channels that an output block sums up
  int64_t outputs_per_group;        // blocks of output channels that share their input blocks
  const int64_t* offsets;           // from Tile::x to what each step multiplies: for every block all taps
  int64_t steps;                    // taps * blocks
  int64_t taps;                     // of conv_dots(): of a block, or 1 where the pixels know nothing of what is beside
  int64_t pairs;                    // of conv_dots(): of channels in a vector, without those whose weights are all zero
  int64_t chunk;                    // steps that are summed up in one go
  const uint16_t* weight;           // [output block][step][plane][2][16][16][2]
  const float* scale;               // null for 1
  const float* bias;
  const uint16_t* residual;         // strided as y, or null
  uint16_t* y;
  int64_t y_plane, y_block;
  int64_t y_row, y_gap;             // of conv(): from a row that is written to the next, and from one that is not
  bool relu;                        // keeps NaN
  bool pixels_first;                // pixels stay in the first cache level while weights pass, else the other way round
};

// y = act(scale * conv(x) + bias + residual) for the tiles [0, tiles) and the output blocks [begin, end).
void conv(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch);

// The same by dot products, where dots_usable(), of one plane.
void conv_dots(const ConvArgs& args, const Pixel* pixel, int64_t pixels, int64_t begin, int64_t end);

// A 3x3 convolution of one plane, with stride 1 and padding 1, by Winograd's F(2x2, 3x3), where dots_usable(). A tile is
// 2x2 pixels of output, seen from 4x4 of input; a strip is tiles side by side. `values` holds what is multiplied:
// [block of input channels][16][tile][32].
constexpr int64_t kWinogradPoints = 16;
struct WinogradStrip {
  int64_t x, tiles;  // x: of the first tile's first pixel, in the halo
};
struct WinogradTile {
  int32_t y, rows, columns;  // of its outputs, those in the image
};
struct WinogradArgs {
  const uint16_t* x;
  int64_t x_pixel, x_row, x_block;  // steps in values
  int64_t blocks, tiles;            // tiles: that `values` has room for
  const uint16_t* weight;           // [output block][16][block][2][16][16][2], G w G'
  const float* scale;               // null for 1
  const float* bias;
  const uint16_t* residual;         // strided as y, or null
  uint16_t* y;
  int64_t y_pixel, y_row, y_block;
  bool relu;                        // keeps NaN
};
void winograd_transform(const WinogradArgs& args, const WinogradStrip* strip, int64_t strips, uint16_t* values);
// For the output blocks [begin, end). Sets `infinite` of a tile of which not every value is finite, before ReLU: the
// transforms spread NaN and Inf over all of it.
void winograd_multiply(
    const WinogradArgs& args, const uint16_t* values, const WinogradTile* tile, int64_t tiles, int64_t begin, int64_t end,
    bool* infinite, float* scratch);

// The gradient of its weight, by the same: a slab of tiles after the other. Channels and outputs are multiples of 32.
struct WinogradGradientArgs {
  const uint16_t *x, *dy;  // channels_last
  const uint16_t* zeros;   // as many as there are channels or outputs
  int64_t channels, outputs, height, width;
  int64_t tiles;           // of all images
  int64_t pairs;           // of tiles, that the values of a slab have room for
  uint16_t *x_values, *dy_values;  // [block of 32 channels or outputs][16][pair][32][2]
  float* sums;                     // [16][output block][block][32 outputs][32 channels]
  uint16_t* dweight;
  int64_t output_step, channel_step, tap_step;
};
// For pairs [begin, end) of a slab whose first tile is `first`.
void winograd_gradient_transform(const WinogradGradientArgs& args, int64_t first, int64_t begin, int64_t end);
// For sums [begin, end) of 32x32, added to what they were unless they begin anew.
void winograd_gradient_multiply(const WinogradGradientArgs& args, int64_t pairs, bool restart, int64_t begin, int64_t end);
// For outputs [begin, end). Returns whether all are finite.
bool winograd_gradient_finish(const WinogradGradientArgs& args, int64_t begin, int64_t end);

// An image of at most 4 channels as pixels one behind another: rows of `width` of them, `pitch` values apart. Nothing is
// written behind a row, where another thread may have written the next.
constexpr int64_t kImageChannels = 4;
struct ImageArgs {
  int planes;
  const void* x;
  bool float32;  // else bfloat16
  int64_t channels, height, width;
  int64_t channel_step, row_step, pixel_step;
  uint16_t* y;
  int64_t y_plane, y_pitch;
};
void pack_image(const ImageArgs& args);

// 3x3, stride 2, padding 1 of activations that are not negative, with a halo of zeros; one block of one image.
struct MaxPoolArgs {
  int planes;
  const uint16_t* x;
  uint16_t* y;
  int64_t x_plane, x_pitch, x_pixel;
  int64_t y_plane, y_pitch, y_pixel;
  int64_t height, width;  // of y
};
void max_pool(const MaxPoolArgs& args);

// The mean over height x width pixels of one row of one block.
struct AveragePoolArgs {
  int planes;
  const uint16_t* x;
  uint16_t* y;
  int64_t x_plane, x_pitch, x_pixel, y_plane;
  int64_t height, width;
};
void average_pool(const AveragePoolArgs& args);

// Between blocked rows and rows of `channels` contiguous values of a tensor.
struct RowsArgs {
  int planes;
  bool float32;
  int64_t channels, rows;
  const uint16_t* blocked;
  int64_t plane, block, row;
  void* tensor;
  int64_t tensor_row;
};
// Returns false where values of three planes are not finite: they may be NaN for what would have been an infinity.
bool unpack_rows(const RowsArgs& args);
struct PackRowsArgs {
  int planes;
  bool float32;
  int64_t channels, rows;
  const void* tensor;
  int64_t tensor_row;
  uint16_t* blocked;
  int64_t plane, block, row;
};
void pack_rows(const PackRowsArgs& args);

// A block of 32 output channels of a convolution's weights as conv() takes them, its scale and bias. Steps in values.
struct WeightArgs {
  int planes;
  const void* weight;
  bool float32;  // else bfloat16
  int64_t output_step, channel_step, row_step, column_step;
  int64_t channels, rows, columns;  // of an output channel. Less than 32 channels are those of one of the block's groups
  uint16_t* packed;                 // [channels / 32][rows][columns][planes][2][16][16][2]
};
void pack_weights(const WeightArgs& args);
// The same of a 3x3 of one plane as winograd_multiply() takes it: [16][channels / 32][2][16][16][2].
void pack_winograd_weights(const WeightArgs& args);

// scale = weight / sqrt(var + eps), bias = norm_bias - mean * scale; weight and norm_bias may be null.
struct NormArgs {
  const float *weight, *norm_bias, *mean, *var;
  float eps;
  int64_t channels;
  float *scale, *bias;
};
void fold_norm(const NormArgs& args);

bool all_finite(const uint16_t* values, int64_t count);

}  // namespace resnet_fast::cpu::amx
