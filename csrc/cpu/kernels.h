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
};

// The best table this machine (and ATEN_CPU_CAPABILITY) allows among those compiled in; chosen once.
const Kernels& kernels();

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
