// The direct convolution in float32: six pixels by as many outputs as the registers hold, summed up over taps and
// channels, with scale, bias, residual and ReLU on the way to memory. See kernels.h for what is read and written.
#include <cstring>

#include "../direct_sizes.h"
#include "kernels.h"
#include "products.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using namespace products;
using L = Lanes<float>;

constexpr int kRows = kDirectRows;
constexpr int64_t kStep = kWide * Vec::size();  // outputs whose sums the registers hold for each pixel
constexpr int64_t kSummed = 128;  // channels that are summed up in one go: long sums set the error
constexpr int kAhead = 8;
static_assert(kDirectPanel % kStep == 0);
static_assert(kRows <= kAhead && kAhead <= kLine, "each row's line is fetched within the channels of one");

// Where the channels of each tap of kRows pixels of y are: in x or in the padding.
using Sources = const float* [kDirectTaps][kRows];

// Consecutive pixels of y.
class Walk {
 public:
  Walk(const DirectConv& conv, int64_t pixel) : conv_(conv) {
    column_ = pixel % conv.out_width;
    row_ = pixel / conv.out_width % conv.out_height;
    image_ = pixel / conv.out_width / conv.out_height;
  }

  // Of the next `count` pixels, which may be none.
  void find(int64_t count, Sources& sources) {
    for (int64_t i = 0; i < count; ++i) {
      find_one(&sources[0][i]);
      step();
    }
  }

 private:
  void find_one(const float** at) const {
    const int64_t top = row_ * conv_.stride[0] - conv_.padding[0], left = column_ * conv_.stride[1] - conv_.padding[1];
    for (int64_t r = 0; r < conv_.kernel_rows; ++r) {
      const int64_t row = top + r * conv_.dilation[0];
      for (int64_t s = 0; s < conv_.kernel_columns; ++s, at += kRows) {
        const int64_t column = left + s * conv_.dilation[1];
        const bool inside = row >= 0 && row < conv_.height && column >= 0 && column < conv_.width;
        const int64_t source = (image_ * conv_.height + row) * conv_.width + column;
        *at = inside ? conv_.x + source * conv_.channels : conv_.zeros;
      }
    }
  }
  void step() {
    if (++column_ < conv_.out_width) return;
    column_ = 0;
    if (++row_ < conv_.out_height) return;
    row_ = 0;
    ++image_;
  }

  const DirectConv& conv_;
  int64_t image_, row_, column_;
};

// sums += what `channels` of a tap give `rows` pixels and kStep outputs. ahead: kAhead pixels, whose lines are fetched.
template <int rows>
C10_ALWAYS_INLINE void add_products(
    Vec (&sums)[rows][kWide], const float* const* from, const float* const* ahead, const float* weight, int64_t channels) {
  Vec own[rows][kWide];
  sum_products<kStep>(
      own, weight, channels, [from](int row, int64_t channel) RF_INLINE_LAMBDA { return from[row][channel]; },
      [ahead](int64_t channel, int i) RF_INLINE_LAMBDA {
        if (kRun == 1 || i < kAhead) fetch_to_read(ahead[i % kAhead] + (channel - i));
      });
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < kWide; ++i) sums[row][i] = sums[row][i] + own[row][i];
  }
}

// y of `rows` pixels and kStep outputs. next: pixels to fetch on the way, or null.
template <int rows>
void outputs_of(
    const DirectConv& conv, const Sources& x, const Sources* next, const float* weight, int64_t pixel, int64_t output) {
  Vec sums[rows][kWide];
  for (auto& row : sums) {
    for (auto& sum : row) sum = Vec(0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t offset = (pixel + row) * conv.outputs + output;
    for (int64_t i = 0; i < kStep; i += kLine) {
      fetch_to_write(conv.y + offset + i);
      if (conv.residual != nullptr) fetch_to_read(conv.residual + offset + i);
    }
  }
  const int64_t taps = conv.kernel_rows * conv.kernel_columns;
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t channel = 0; channel < conv.channels; channel += kSummed) {
      const int64_t channels = smaller(kSummed, conv.channels - channel);
      const float *from[rows], *ahead[kAhead];
      for (int row = 0; row < rows; ++row) from[row] = x[tap][row] + channel;
      for (int i = 0; i < kAhead; ++i) ahead[i] = (next == nullptr ? x : *next)[tap][i % rows] + channel;
      add_products<rows>(sums, from, ahead, weight, channels);
      weight += channels * kStep;
    }
  }
  // Of one vector of outputs.
  const auto write = [&](int i, int64_t column, auto span) RF_INLINE_LAMBDA {
    const L scale = conv.scale == nullptr ? L::fill(1) : L::load(conv.scale + column, span);
    const L bias = L::load(conv.bias + column, span);
    int64_t offset = pixel * conv.outputs + column;
    for (int row = 0; row < rows; ++row, offset += conv.outputs) {
      L out = fmadd(L{{sums[row][i]}}, scale, bias);
      if (conv.residual != nullptr) out = out + L::load(conv.residual + offset, span);
      if (conv.relu) out = relu(out);
      out.store(conv.y + offset, span);
    }
  };
  for (int i = 0; i < kWide; ++i) {
    const int64_t column = output + i * Vec::size(), left = conv.outputs - column;
    if (left >= Vec::size()) {
      write(i, column, Full{});
    } else if (left > 0) {
      write(i, column, Part{left});
    }
  }
}

using OutputsOf = void (*)(const DirectConv&, const Sources&, const Sources*, const float*, int64_t, int64_t);
// By the number of pixels, less one.
constexpr OutputsOf kByRows[kRows] = {&outputs_of<1>, &outputs_of<2>, &outputs_of<3>,
                                      &outputs_of<4>, &outputs_of<5>, &outputs_of<6>};

}  // namespace

void direct_conv(const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t terms = conv.kernel_rows * conv.kernel_columns * conv.channels;
  const auto left = [&](int64_t pixel) { return smaller(kRows, last - pixel); };
  Walk walk(conv, first);
  Sources sources[2] = {};  // of these pixels and the next, which may be fewer
  walk.find(left(first), sources[0]);
  int here = 0;
  for (int64_t pixel = first; pixel < last; pixel += kRows, here ^= 1) {
    const int64_t count = left(pixel);
    const bool is_last = pixel + kRows >= last;
    if (!is_last) walk.find(left(pixel + kRows), sources[here ^ 1]);
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* weight = packed + (panel - begin) * terms * kDirectPanel;
      for (int64_t at = 0; at < kDirectPanel && panel * kDirectPanel + at < conv.outputs; at += kStep) {
        const Sources* next = panel + 1 == end && at == 0 && !is_last ? &sources[here ^ 1] : nullptr;
        kByRows[count - 1](conv, sources[here], next, weight + at * terms, pixel, panel * kDirectPanel + at);
      }
    }
  }
}

namespace {

constexpr int64_t kSquare = 16;  // outputs and terms that are transposed at once

// The terms [term, term + kSquare) of kSquare outputs, as [term][output].
void transpose(const DirectWeight& w, int64_t output, int64_t term, float* to) {
  const int64_t terms = w.taps * w.channels;
  const float* from = w.weight + output * terms + term;
  if (output + kSquare <= w.outputs && term + kSquare <= terms) {
    at::vec::transpose_mxn<float, kSquare, kSquare>(from, terms, to, kSquare);
    return;
  }
  for (int64_t i = 0; i < kSquare; ++i) {  // beyond the outputs, zeros, whose products are not stored
    for (int64_t j = 0; j < kSquare; ++j) {
      to[j * kSquare + i] = output + i < w.outputs && term + j < terms ? from[i * terms + j] : 0;
    }
  }
}

}  // namespace

void direct_pack(const DirectWeight& w, int64_t begin, int64_t end) {
  const int64_t terms = w.taps * w.channels;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* packed = w.packed + (panel - begin) * terms * kDirectPanel;
    for (int64_t at = 0; at < kDirectPanel; at += kSquare) {
      const int64_t output = panel * kDirectPanel + at;
      float* to = packed + at / kStep * kStep * terms + at % kStep;
      for (int64_t term = 0; term < terms; term += kSquare) {
        float square[kSquare * kSquare];
        const int64_t count = smaller(kSquare, terms - term);
        transpose(w, output, term, square);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t number = term + j;
          const int64_t place = w.channels_last ? number : number % w.taps * w.channels + number / w.taps;
          std::memcpy(to + place * kStep, square + j * kSquare, kSquare * sizeof(float));
        }
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
