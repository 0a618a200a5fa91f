// The vector kernels behind bn_act, seen from the host side: plain structs and a table of function pointers.
//
// kernels/*.cpp is compiled once per instruction set and knows nothing of tensors or threads: every kernel works on a
// range of a Plan's items, and the host (bn.h, conv1x1.cpp) spreads them over threads. A plan depends on the shape only,
// so the partial sums, and with them every result, are bitwise the same at any number of threads.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace resnet_fast::cpu {

// How an NCHW-shaped tensor is cut into items of work.
//
// rows layout (channels_last): a row-major [N*H*W, C] matrix. When C is narrow or odd, `repeat` consecutive pixels are
// read as one row of cols = repeat*C "columns", so that vectors stay full; the pixels left over (tail_rows of C
// columns) are one more item. Items are blocks of row_block x col_block.
// planes layout (contiguous): N*C planes of `plane` = H*W values. Items are (chunk, channel), channel fastest, where a
// chunk is batch_block images x plane_block values.
struct Plan {
  bool rows_layout = false;
  int64_t channels = 0;

  int64_t repeat = 1;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t tail_rows = 0;
  int64_t row_block = 0;
  int64_t col_block = 0;
  int64_t row_blocks = 0;
  int64_t col_blocks = 0;

  int64_t batch = 0;
  int64_t plane = 0;
  int64_t batch_block = 0;
  int64_t plane_block = 0;
  int64_t batch_blocks = 0;
  int64_t plane_blocks = 0;

  int64_t chunks = 0;  // rows of the partial sums, [chunks, width]
  int64_t width = 0;   // columns of the partial sums: cols, or channels
  int64_t items = 0;
  int64_t grain = 1;   // items a thread should at least get
};

constexpr int64_t kMaxColBlock = 1024;  // bounds the scratch a kernel keeps on its stack
constexpr int64_t kLanePadding = 64;    // per-column arrays are readable this far past their end

Plan make_plan(int64_t batch, int64_t channels, int64_t plane, bool rows_layout);

// Per-column arrays of the accumulation type (double for double, else float), `width` long plus kLanePadding.
struct ColumnParams {
  const void* mean = nullptr;
  const void* scale = nullptr;  // weight * rstd
  const void* bias = nullptr;
  const void* mean_dz = nullptr;   // training gradient: mean(dz)
  const void* mean_dzx = nullptr;  // training gradient: rstd^2 * mean(dz * (x - mean))
};

struct StatsArgs {
  const void* x = nullptr;
  double* mean = nullptr;  // [chunks, width]
  double* m2 = nullptr;    // [chunks, width]: sum((x - chunk mean)^2)
};

struct ApplyArgs {
  const void* x = nullptr;
  const void* residual = nullptr;  // may be null
  void* y = nullptr;               // may be x
  ColumnParams params;
  ColumnParams residual_params;  // of the residual's own batch norm; null where it has none
  bool relu = false;
};

// Contiguous rows only. Where scale is not null, x is normalised, activated and rounded to its own type first.
struct CentreArgs {
  const void* x = nullptr;
  void* y = nullptr;  // of the accumulation type
  ColumnParams params;
  const void* shift = nullptr;  // as the arrays of params
};

enum class Mask : int { none = 0, from_x = 1, from_y = 2 };

struct BackwardArgs {
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* y = nullptr;  // for Mask::from_y
  void* dz = nullptr;       // masked dy, written when not null
  void* dx = nullptr;       // written when not null
  double* sum_dz = nullptr;   // [chunks, width], reduce only
  double* sum_dzx = nullptr;  // [chunks, width], reduce only: sum(dz * (x - mean))
  ColumnParams params;
  Mask mask = Mask::none;
};

// Max-pooling by windows of 3x3 with stride 2 and padding 1 of one image in channels_last, or of some of its rows.
struct MaxPoolArgs {
  int64_t channels = 0, height = 0, width = 0, pooled_height = 0, pooled_width = 0;
  void* x = nullptr;          // row `first_row` of the pixels
  int64_t first_row = 0;
  void* y = nullptr;          // of the image's pooled pixels
  uint8_t* index = nullptr;   // as y: where in its window the maximum is, 3 times the row plus the column; may be null
};

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

enum DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDTypes = 4 };

struct Kernels {
  const char* name;
  // Per chunk and column: mean and centred sum of squares.
  void (*stats[kDTypes])(const Plan&, const StatsArgs&, int64_t begin, int64_t end);
  // y = act((x - mean) * scale + bias + residual), or + (residual - its mean) * its scale + its bias
  void (*apply[kDTypes])(const Plan&, const ApplyArgs&, int64_t begin, int64_t end);
  // y = act((x - mean) * scale + bias) - shift, or x - shift
  void (*centre[kDTypes])(const Plan&, const CentreArgs&, int64_t begin, int64_t end);
  // Per chunk and column: sum(dz), sum(dz * (x - mean)); on the way dz and, with fixed statistics, dx = scale * dz.
  void (*backward_reduce[kDTypes])(const Plan&, const BackwardArgs&, int64_t begin, int64_t end);
  // dx = scale * (dz - mean_dz - (x - mean) * mean_dzx), batch statistics
  void (*backward_apply_train[kDTypes])(const Plan&, const BackwardArgs&, int64_t begin, int64_t end);
  // dx = scale * dz and dz, fixed statistics, no sums wanted
  void (*backward_apply_eval[kDTypes])(const Plan&, const BackwardArgs&, int64_t begin, int64_t end);
  // x -> y and the index, of y's rows [begin, end): the first maximum, or the last NaN
  void (*max_pool[kDTypes])(const MaxPoolArgs&, int64_t begin, int64_t end);
  // The gradient of y and the index -> x's, of x's rows [begin, end), begin even
  void (*max_unpool[kDTypes])(const MaxPoolArgs&, int64_t begin, int64_t end);
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

// The best table this machine (and ATEN_CPU_CAPABILITY) allows among those compiled in; chosen once.
const Kernels& kernels();

// Whether they are of AVX2 or AVX-512: without, the library's convolutions are faster than ours.
bool has_vectors();

namespace DEFAULT {
const Kernels& table();
}
namespace AVX2 {
const Kernels& table();
}
namespace AVX512 {
const Kernels& table();
}

}  // namespace resnet_fast::cpu
