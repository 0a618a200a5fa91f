// The direct convolution of few channels, as of an image: rows are copied with their padding, where a row of the kernel's
// taps lies one behind the other. See conv_kernels.h for what is read and written.
#include <array>
#include <cstring>
#include <utility>

#include "direct_parts.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using namespace direct;

void zero(float* at, int64_t count) { std::memset(at, 0, count * sizeof(float)); }

// The rows of x that the rows [first, last) of y are made of, one behind the other.
void copy_rows(const DirectConv& conv, int64_t image, int64_t first, int64_t last, float* to) {
  const int64_t values = direct_image_row(conv), row_step = conv.width * conv.channels;
  const int64_t before = smaller(conv.padding[1] * conv.channels, values);
  const int64_t inside = smaller(row_step, values - before), behind = values - before - inside;
  const int64_t top = first * conv.stride[0] - conv.padding[0];
  const int64_t rows = (last - 1 - first) * conv.stride[0] + conv.kernel_rows;
  for (int64_t row = top; row < top + rows; ++row, to += values) {
    if (row < 0 || row >= conv.height) {
      zero(to, values);
      continue;
    }
    zero(to, before);
    std::memcpy(to + before, conv.x + (image * conv.height + row) * row_step, inside * sizeof(float));
    zero(to + before + inside, behind);
  }
}

// y of `rows` pixels and kStep outputs. window: what the first of them is made of, in the copied rows.
template <int rows>
void of_windows(
    const DirectConv& conv, const float* window, int64_t row_step, const float* weight, int64_t pixel, int64_t output) {
  const int64_t pixel_step = conv.stride[1] * conv.channels, run = conv.kernel_columns * conv.channels;
  Vec sums[rows][kWide];
  set_to_zero(sums);
  fetch_outputs(conv, pixel, rows, output);
  for (int64_t r = 0; r < conv.kernel_rows; ++r) {
    add_products<kStep>(
        sums, weight, run, [=](int row, int64_t term) RF_INLINE_LAMBDA { return window[row * pixel_step + term]; },
        [](int64_t, int) RF_INLINE_LAMBDA {});
    window += row_step;
    weight += run * kStep;
  }
  write_outputs<rows>(conv, sums, pixel, output);
}

using OfWindows = void (*)(const DirectConv&, const float*, int64_t, const float*, int64_t, int64_t);
template <int... i>
constexpr std::array<OfWindows, kRows> windows_by_rows(std::integer_sequence<int, i...>) {
  return {&of_windows<i + 1>...};
}
constexpr auto kOfWindows = windows_by_rows(std::make_integer_sequence<int, kRows>());  // of pixels, less one

}  // namespace

void direct_conv_image(
    const DirectConv& conv, const float* packed, int64_t image, int64_t first, int64_t last, int64_t pixel, float* rows) {
  copy_rows(conv, image, first, last, rows);
  const int64_t terms = conv.kernel_rows * conv.kernel_columns * conv.channels, row_step = direct_image_row(conv);
  const int64_t tiles = div_up(conv.out_width, kRows);  // about as large as each other
  for (int64_t row = first; row < last; ++row, pixel += conv.out_width, rows += conv.stride[0] * row_step) {
    for (int64_t output = 0; output < conv.outputs; output += kStep) {
      for (int64_t left = tiles, column = 0; left > 0; --left) {
        const int64_t count = div_up(conv.out_width - column, left);
        const float* window = rows + column * conv.stride[1] * conv.channels;
        kOfWindows[count - 1](conv, window, row_step, packed + output * terms, pixel + column, output);
        column += count;
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
