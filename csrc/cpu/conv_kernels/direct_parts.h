// What the two ways of the direct convolution share: pixels of y, where they read x, and their writing.
#pragma once

#include "../direct_sizes.h"
#include "conv_kernels.h"
#include "products.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace direct {

using namespace products;
using L = Lanes<float>;

constexpr int kRows = kDirectRows;
static_assert(kDirectPanel % kStep == 0);

// Rounded up; integers.h has the same, but what is inline there has no instruction set of its own.
constexpr int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A pixel of y, and where it reads x.
class Pixel {
 public:
  Pixel(const DirectConv& conv, int64_t pixel)
      : conv_(conv),
        image_(pixel / conv.out_width / conv.out_height),
        row_(pixel / conv.out_width % conv.out_height),
        column_(pixel % conv.out_width) {}

  int64_t top() const { return row_ * conv_.stride[0] - conv_.padding[0]; }
  int64_t left() const { return column_ * conv_.stride[1] - conv_.padding[1]; }
  const float* x(int64_t row, int64_t column) const {
    return conv_.x + ((image_ * conv_.height + row) * conv_.width + column) * conv_.channels;
  }
  void step() {
    if (++column_ < conv_.out_width) return;
    column_ = 0;
    if (++row_ < conv_.out_height) return;
    row_ = 0;
    ++image_;
  }

 private:
  const DirectConv& conv_;
  int64_t image_, row_, column_;
};

// Fetches what write_outputs() writes and adds to.
C10_ALWAYS_INLINE void fetch_outputs(const DirectConv& conv, int64_t pixel, int64_t count, int64_t output) {
  for (int64_t row = 0; row < count; ++row) {
    const int64_t offset = (pixel + row) * conv.outputs + output;
    for (int64_t i = 0; i < kStep; i += kLine) {
      fetch_to_write(conv.y + offset + i);
      if (conv.residual != nullptr) fetch_to_read(conv.residual + offset + i);
    }
  }
}

// y of `rows` pixels and kStep outputs, from their sums.
template <int rows>
C10_ALWAYS_INLINE void write_outputs(
    const DirectConv& conv, const Vec (&sums)[rows][kWide], int64_t pixel, int64_t output) {
  // Of one vector of outputs.
  const auto write = [&](auto i, int64_t column, auto span) RF_INLINE_LAMBDA {
    const L scale = conv.scale == nullptr ? L::fill(1) : L::load(conv.scale + column, span);
    const L bias = L::load(conv.bias + column, span);
    int64_t offset = pixel * conv.outputs + column;
    each<rows>([&](auto row) RF_INLINE_LAMBDA {
      L out = fmadd(L{{sums[row][i]}}, scale, bias);
      if (conv.residual != nullptr) out = out + L::load(conv.residual + offset, span);
      if (conv.relu) out = relu(out);
      out.store(conv.y + offset, span);
      offset += conv.outputs;
    });
  };
  each<kWide>([&](auto i) RF_INLINE_LAMBDA {
    const int64_t column = output + i * Vec::size(), left = conv.outputs - column;
    if (left >= Vec::size()) {
      write(i, column, Full{});
    } else if (left > 0) {
      write(i, column, Part{left});
    }
  });
}

}  // namespace direct

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
