// What the kernels of a Winograd convolution and of its weight's gradient share.
#pragma once

#include <array>
#include <utility>

#include "../kernels/normalize.h"
#include "../winograd_points.h"
#include "conv_kernels.h"
#include "products.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace winograd {

using namespace products;
using L = Lanes<float>;

constexpr int kIn = kWinogradIn, kOut = kWinogradOut, kTaps = 3;
constexpr int kRows = kWinogradRows;
static_assert(kWinogradPanel % kStep == 0 && kWinogradPanel % kWinogradBlock == 0);

// What the rows of G are divided by: the product of a point's distances to the others.
constexpr double kP = kPointP, kQ = kPointQ;
constexpr float kOver0 = 1 / (kP * kP * kQ * kQ);
constexpr float kOverP = 1 / (2 * kP * kP * (kP * kP - kQ * kQ)), kOverQ = 1 / (2 * kQ * kQ * (kQ * kQ - kP * kP));

C10_ALWAYS_INLINE Vec fma(float a, const Vec& b, const Vec& c) { return at::vec::fmadd(Vec(a), b, c); }

// One dimension of B' x B.
C10_ALWAYS_INLINE void transform_input(const Vec* x, int64_t step, Vec* out, int64_t out_step) {
  constexpr float p = kPointP, q = kPointQ, p2 = p * p, q2 = q * q;
  const Vec x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
  const Vec even_p = fma(-q2, x2, x4), odd_p = fma(-q2, x1, x3);
  const Vec even_q = fma(-p2, x2, x4), odd_q = fma(-p2, x1, x3);
  out[0] = fma(p2 * q2, x[0], fma(-(p2 + q2), x2, x4));
  out[out_step] = fma(p, odd_p, even_p);
  out[2 * out_step] = fma(-p, odd_p, even_p);
  out[3 * out_step] = fma(q, odd_q, even_q);
  out[4 * out_step] = fma(-q, odd_q, even_q);
  out[5 * out_step] = fma(p2 * q2, x1, fma(-(p2 + q2), x3, x[5 * step]));
}

// Of a channel in [block of channels][tile][channels of a block].
C10_ALWAYS_INLINE int64_t block_offset(int64_t channel, int64_t block, int64_t tiles) {
  return channel / block * tiles * block + channel % block;
}

// Where a tile lies: its first output, and how many of its rows x columns are in the image.
struct Place {
  int64_t image, row, column, rows, columns;
};

template <int rows, int columns>
C10_ALWAYS_INLINE Place place_of(const WinogradShape& conv, int64_t tile) {
  const int64_t tiles = conv.tile_rows * conv.tile_columns, in_image = tile % tiles;
  const int64_t row = in_image / conv.tile_columns * rows, column = in_image % conv.tile_columns * columns;
  return {tile / tiles, row, column, smaller(rows, conv.height - row), smaller(columns, conv.width - column)};
}

// The pixels of x that a tile sees.
template <int rows, int columns>
C10_ALWAYS_INLINE void find_pixels(
    const WinogradShape& conv, const Place& place, const float* (&pixels)[rows][columns]) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const int64_t row = place.row + i - 1, column = place.column + j - 1;
      const bool padding = row < 0 || row >= conv.height || column < 0 || column >= conv.width;
      const int64_t pixel = (place.image * conv.height + row) * conv.width + column;
      pixels[i][j] = padding ? conv.zeros : conv.x + pixel * conv.channels;
    }
  }
}

// What a pixel that find_pixels found is, with the batch norm and ReLU that are pending on it.
template <bool normed>
class Pixel {
 public:
  C10_ALWAYS_INLINE Pixel(const WinogradShape& conv, int64_t channel) : zeros_(conv.zeros) {
    if constexpr (normed) {
      mean_ = L::load_acc(static_cast<const float*>(conv.norm.mean) + channel);
      scale_ = L::load_acc(static_cast<const float*>(conv.norm.scale) + channel);
      bias_ = L::load_acc(static_cast<const float*>(conv.norm.bias) + channel);
    }
  }

  template <typename Span>
  C10_ALWAYS_INLINE Vec load(const float* pixel, int64_t channel, Span span) const {
    const L x = L::load(pixel + channel, span);
    if constexpr (normed) return pixel == zeros_ ? Vec(0) : relu(normalize(x, mean_, scale_, bias_)).v[0];
    return x.v[0];
  }

 private:
  const float* zeros_;
  L mean_, scale_, bias_;
};

// f(whether a norm is pending), known at compile time.
template <typename F>
C10_ALWAYS_INLINE void with_norm(const WinogradShape& conv, const F& f) {
  conv.norm.mean == nullptr ? f(std::false_type{}) : f(std::true_type{});
}

// Whether all lanes are zero, which 0 * x is where x is finite.
C10_ALWAYS_INLINE bool is_zero(const Vec& x) {
  float lanes[Vec::size()];
  x.store(lanes);
  for (const float lane : lanes) {
    if (!(lane == 0)) return false;
  }
  return true;
}

// Terms whose sums a call of multiply() finishes. AVX-512's registers hold so many columns that their weights stay in the first
// cache level only for what is summed up in one go.
constexpr int64_t kFinished = kRun > 1 ? 256 : 1;

constexpr int kTermsALine = kWinogradPanel / kStep;  // of b, for a line of what lies behind it to be fetched

// What the `number`th of the calls by the same b[terms][kStep] fetches of the terms behind it; b, which is there already, where
// the calls before have fetched them all.
C10_ALWAYS_INLINE const float* fetched_by(int64_t number, const float* b, int64_t terms) {
  const int64_t part = number * (terms / kTermsALine) * kLine, all = terms * kStep;
  return part < all ? b + all + part : b;
}

// The terms of a product: `summed` of them at a time.
struct Terms {
  int64_t count, summed;
  int64_t block_step;  // between blocks of kWinogradBlock values of a
  bool first;          // sums are set, else added to
};

// sums[rows][kStep] (+)= a[rows][terms] * b[terms][kStep]. On the way lines from `next` on are fetched.
template <int rows, int64_t row_step, int64_t term_step>
void multiply(const float* a, const float* b, float* sums, const Terms& terms, const float* next) {
  bool first = terms.first;
  const auto add = [&](const float* from, auto count) RF_INLINE_LAMBDA {
    Vec own[rows][kWide];
    sum_products<kStep>(
        own, b, count, [from](int row, int64_t term) RF_INLINE_LAMBDA { return from[row * row_step + term * term_step]; },
        [next](int64_t term, int i) RF_INLINE_LAMBDA { fetch_a_line<kTermsALine>(next, term, i); });
    for (int row = 0; row < rows; ++row) {
      for (int i = 0; i < kWide; ++i) {
        float* sum = sums + row * kStep + i * Vec::size();
        (first ? own[row][i] : Vec::loadu(sum) + own[row][i]).store(sum);
      }
    }
    b += count * kStep;
    next += count / kTermsALine * kLine;
    first = false;
  };
  if (terms.summed == kWinogradBlock) {  // the usual: a constant
    int64_t left = terms.count;
    for (; left >= kWinogradBlock; left -= kWinogradBlock, a += terms.block_step) {
      add(a, std::integral_constant<int64_t, kWinogradBlock>());
    }
    if (left > 0) add(a, left);
    return;
  }
  for (int64_t term = 0; term < terms.count; term += terms.summed) {
    const float* from = a + term / kWinogradBlock * terms.block_step + term % kWinogradBlock * term_step;
    add(from, smaller(terms.summed, terms.count - term));
  }
}

using Multiply = void (*)(const float*, const float*, float*, const Terms&, const float*);

template <int64_t row_step, int64_t term_step, int... rows>
constexpr std::array<Multiply, sizeof...(rows)> multiply_table(std::integer_sequence<int, rows...>) {
  return {&multiply<rows + 1, row_step, term_step>...};
}

}  // namespace winograd

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
