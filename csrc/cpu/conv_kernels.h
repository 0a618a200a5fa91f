// The convolutions in float32, seen from the host side, as kernels.h has the vector kernels behind bn_act: Winograd's, which
// winograd.cpp and winograd_gradient.cpp spread over threads, and the direct ones of direct_conv.cpp and direct_image.cpp.
//
// conv_kernels/*.cpp is compiled for AVX2 and for AVX-512: without these the library's convolutions are faster than ours.
#pragma once

#include "kernels.h"

namespace resnet_fast::cpu {

// What a 3x3 convolution with padding 1 and its weight's gradient have in common, in float32; tensors are channels_last.
struct WinogradShape {
  const float* x = nullptr;
  const float* zeros = nullptr;  // a pixel of padding
  int64_t channels = 0, outputs = 0, height = 0, width = 0;
  int64_t tile_rows = 0, tile_columns = 0;  // of an image
  int64_t panels = 0;                       // of 64 output channels
  ColumnParams norm;  // of the batch norm and ReLU that are pending on x, whose padding has neither; null where none are
};

// A weight's steps, as [outputs][channels][9].
struct WinogradSteps {
  int64_t output_step = 0, channel_step = 0, tap_step = 0;
};

// A convolution by Winograd's F(4x4, 3x3): tiles are of 4x4 outputs. See winograd.h.
struct WinogradConv : WinogradShape {
  const float* weight = nullptr;  // as WinogradWeight::packed
  const float* bias = nullptr;
  const float* residual = nullptr;  // may be null
  float* y = nullptr;
  bool relu = false;
  int64_t summed = 0;      // channels that are summed up in one go
  bool continues = false;  // the products that there are, with more channels
  // [chunk of tiles][3][outputs]: of y about a value of its own, which is the first row, the sum and the sum of squares; null
  // where not wanted. Whole chunks are what winograd_output is called for.
  float* moments = nullptr;
  int64_t chunk = 1;
};

// Its weight as the model has it, and packed.
struct WinogradWeight : WinogradSteps {
  const float* weight = nullptr;
  const float* scale = nullptr;  // of the outputs; may be null
  float* packed = nullptr;  // [36][panel of 64 outputs][64 or 16 of them, as registers hold][channels][of these]
  int64_t outputs = 0, channels = 0, panels = 0;
};

// The gradient of its weight, by F(4x2): 4x2 pixels of dy and 6x4 of x make a tile. See winograd_gradient.h.
struct WinogradGradient : WinogradShape, WinogradSteps {
  const float* dy = nullptr;
  float* sums = nullptr;  // as packed, 24 of them
  float* dweight = nullptr;
};

// Consecutive tiles of a WinogradConv, transformed: [36][block of 32 channels][tile][32], and their products, which lie like
// the packed weight's channels: [36][panel][64 or 16 outputs][tile][of these]. The steps are those between the 36. Of a
// WinogradGradient there are 24, and the products are the tiles of dy, transformed.
struct WinogradSlab {
  int64_t first = 0, tiles = 0;
  float* transformed = nullptr;
  int64_t transformed_step = 0;
  float* products = nullptr;
  int64_t products_step = 0;
};

// A dense convolution in float32; tensors are channels_last. See direct_conv.h.
struct DirectConv {
  const float* x = nullptr;
  const float* zeros = nullptr;  // a pixel of padding
  const float* scale = nullptr;  // of the outputs; may be null
  const float* bias = nullptr;
  const float* residual = nullptr;  // may be null, or y
  float* y = nullptr;
  bool relu = false;
  int64_t channels = 0, outputs = 0;
  int64_t height = 0, width = 0, out_height = 0, out_width = 0;
  int64_t kernel_rows = 1, kernel_columns = 1;
  int64_t stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
};

// Values that a row of y reads of a row of x, with padding. Inlined, so that it has the instruction set of its caller.
C10_ALWAYS_INLINE int64_t direct_image_row(const DirectConv& conv) {
  return ((conv.out_width - 1) * conv.stride[1] + conv.kernel_columns) * conv.channels;
}

// Its weight as the model has it, [outputs][terms], and packed. Terms are taps by channels, in either order.
struct DirectWeight {
  const float* weight = nullptr;
  float* packed = nullptr;  // [panel of 64 outputs][64 or 16 of them, as registers hold][tap][channel][of these]
  int64_t outputs = 0, channels = 0, taps = 0;
  bool channels_last = false;  // whether a tap's channels lie together
};

struct ConvKernels {
  // x -> slab.transformed, of the slab's tiles [begin, end)
  void (*winograd_input)(const WinogradConv&, const WinogradSlab&, int64_t begin, int64_t end);
  // slab.transformed -> slab.products, of the panels [begin, end) of weights, for all of the slab's tiles
  void (*winograd_product)(const WinogradConv&, const WinogradSlab&, int64_t begin, int64_t end);
  // slab.products -> y, of the slab's tiles [begin, end); whether all that was convolved is finite
  bool (*winograd_output)(const WinogradConv&, const WinogradSlab&, int64_t begin, int64_t end);
  // weight -> packed, of the channels [begin, end)
  void (*winograd_pack)(const WinogradWeight&, int64_t begin, int64_t end);
  // x and dy -> slab.transformed and slab.products, of the slab's tiles [begin, end)
  void (*winograd_gradient_input)(const WinogradGradient&, const WinogradSlab&, int64_t begin, int64_t end);
  // slab.transformed and slab.products -> sums, set by the first slab, else added to: of 32 channels by 64 outputs each
  // [begin, end) of 24 times panels times blocks of channels
  void (*winograd_gradient_product)(const WinogradGradient&, const WinogradSlab&, int64_t begin, int64_t end);
  // sums -> dweight, of the channels [begin, end); whether all of it is finite
  bool (*winograd_gradient_output)(const WinogradGradient&, int64_t begin, int64_t end);
  // x -> y, of the panels of 64 outputs [begin, end), whose weights start at `packed`, and pixels [first, last)
  void (*direct_conv)(const DirectConv&, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last);
  // The same for weights beyond the second cache level; null in AVX-512, where it was not measured. copies: room for
  // kDirectCopied pixels of x, with their terms rounded up to kDirectChunk
  void (*direct_conv_copied)(
      const DirectConv&, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last, float* copies);
  // The same of few channels without dilation: rows [first, last) of an image of y, which begin with its `pixel`. rows: room
  // for what these rows read of x, (last - 1 - first) * stride + kernel_rows of direct_image_row() values
  void (*direct_conv_image)(
      const DirectConv&, const float* packed, int64_t image, int64_t first, int64_t last, int64_t pixel, float* rows);
  // weight -> packed, of the panels [begin, end), the first at `packed`
  void (*direct_pack)(const DirectWeight&, int64_t begin, int64_t end);
};

// Whether there are any: whether kernels() is of AVX2 or AVX-512.
bool has_vectors();

// Those of the instruction set of kernels(). Raises where there are none.
const ConvKernels& conv_kernels();

namespace AVX2 {
const ConvKernels& conv_table();
}
namespace AVX512 {
const ConvKernels& conv_table();
}

}  // namespace resnet_fast::cpu
