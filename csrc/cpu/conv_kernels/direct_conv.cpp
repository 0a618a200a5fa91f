// The direct convolution in float32: six pixels by as many outputs as the registers hold, summed up over taps and
// channels, with scale, bias, residual and ReLU on the way to memory. See conv_kernels.h for what is read and written.
#include <array>
#include <type_traits>
#include <utility>

#include "direct_parts.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using namespace direct;

constexpr int64_t kSummed = 128;  // channels that are summed up in one go: long sums set the error
constexpr int kAhead = 8;
constexpr int64_t kFetched = kRun > 1 ? kStep : 0;  // how far ahead outputs are fetched to be written
static_assert(kRows <= kAhead && kAhead <= kLine, "each row's line is fetched within the channels of one");

// Where the channels of each tap of consecutive pixels are: in x or in the padding.
using Places = const float* [kDirectTaps][kRows];

void find_one(const DirectConv& conv, const Pixel& pixel, const float** at) {
  for (int64_t r = 0; r < conv.kernel_rows; ++r) {
    const int64_t row = pixel.top() + r * conv.dilation[0];
    for (int64_t s = 0; s < conv.kernel_columns; ++s, at += kRows) {
      const int64_t column = pixel.left() + s * conv.dilation[1];
      const bool inside = row >= 0 && row < conv.height && column >= 0 && column < conv.width;
      *at = inside ? pixel.x(row, column) : conv.zeros;
    }
  }
}

// Of `count` pixels, which may be none; `pixel` is behind them then.
void find(const DirectConv& conv, Pixel& pixel, int64_t count, Places& places) {
  for (int64_t i = 0; i < count; ++i, pixel.step()) find_one(conv, pixel, &places[0][i]);
}

// f(channels), a constant where it is a usual number: loops with AVX2's long runs then end without being counted. Not of
// fewer rows than kRows, which are the last of many.
template <int rows, typename F>
C10_ALWAYS_INLINE void with_count(int64_t channels, const F& f) {
  if constexpr (kRun > 1 && rows == kRows) {
    if (channels == kSummed) return f(std::integral_constant<int64_t, kSummed>());
    if (channels == kSummed / 2) return f(std::integral_constant<int64_t, kSummed / 2>());
  }
  f(channels);
}

// y of `rows` pixels and kStep outputs. next: pixels to fetch on the way, or null.
template <int rows>
void outputs_of(
    const DirectConv& conv, const Places& x, const Places* next, const float* weight, int64_t pixel, int64_t output) {
  fetch_outputs(conv, pixel, rows, output + kFetched);
  const int64_t taps = conv.kernel_rows * conv.kernel_columns;
  // The next `channels` terms, which are a tap's from `channel` on; kAhead lines of its pixels or the next ones are fetched.
  const auto sum = [&](Vec(&sums)[rows][kWide], int64_t tap, int64_t channel, auto channels) RF_INLINE_LAMBDA {
    const float *from[rows], *ahead[kAhead];
    for (int row = 0; row < rows; ++row) from[row] = x[tap][row] + channel;
    for (int i = 0; i < kAhead; ++i) ahead[i] = (next == nullptr ? x : *next)[tap][i % rows] + channel;
    sum_products<kStep>(
        sums, weight, channels, [from = &from[0]](int row, int64_t term) RF_INLINE_LAMBDA { return from[row][term]; },
        [ahead = &ahead[0]](int64_t term, int i) RF_INLINE_LAMBDA {
          if (kRun == 1 || i < kAhead) fetch_to_read(ahead[i % kAhead] + (term - i));
        });
    weight += channels * kStep;
  };
  Vec sums[rows][kWide];
  if (kRun > 1 && taps == 1 && conv.channels <= kSummed) {  // nothing to add it to
    with_count<rows>(conv.channels, [&](auto channels) RF_INLINE_LAMBDA {
      sum(sums, 0, 0, channels);
      write_outputs<rows>(conv, sums, pixel, output);
    });
    return;
  }
  set_to_zero(sums);
  for (int64_t tap = 0; tap < taps; ++tap) {
    for (int64_t channel = 0; channel < conv.channels; channel += kSummed) {
      with_count<rows>(smaller(kSummed, conv.channels - channel), [&](auto channels) RF_INLINE_LAMBDA {
        Vec own[rows][kWide];
        sum(own, tap, channel, channels);
        for (int row = 0; row < rows; ++row) {  // not each(): the registers do not hold both
          for (int i = 0; i < kWide; ++i) sums[row][i] = sums[row][i] + own[row][i];
        }
      });
    }
  }
  write_outputs<rows>(conv, sums, pixel, output);
}

using OutputsOf = void (*)(const DirectConv&, const Places&, const Places*, const float*, int64_t, int64_t);
template <int... i>
constexpr std::array<OutputsOf, kRows> by_rows(std::integer_sequence<int, i...>) {
  return {&outputs_of<i + 1>...};
}
constexpr auto kByRows = by_rows(std::make_integer_sequence<int, kRows>());  // of pixels, less one

}  // namespace

void direct_conv(const DirectConv& conv, const float* packed, int64_t begin, int64_t end, int64_t first, int64_t last) {
  const int64_t terms = conv.kernel_rows * conv.kernel_columns * conv.channels;
  const auto left = [&](int64_t pixel) { return smaller(kRows, last - pixel); };
  Pixel at(conv, first);
  Places sources[2] = {};  // of these pixels and the next, which may be fewer
  find(conv, at, left(first), sources[0]);
  int here = 0;
  for (int64_t pixel = first; pixel < last; pixel += kRows, here ^= 1) {
    const int64_t count = left(pixel);
    const bool is_last = pixel + kRows >= last;
    if (!is_last) find(conv, at, left(pixel + kRows), sources[here ^ 1]);
    for (int64_t panel = begin; panel < end; ++panel) {
      const float* weight = packed + (panel - begin) * terms * kDirectPanel;
      for (int64_t step = 0; step < kDirectPanel && panel * kDirectPanel + step < conv.outputs; step += kStep) {
        const Places* next = panel + 1 == end && step == 0 && !is_last ? &sources[here ^ 1] : nullptr;
        kByRows[count - 1](conv, sources[here], next, weight + step * terms, pixel, panel * kDirectPanel + step);
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
