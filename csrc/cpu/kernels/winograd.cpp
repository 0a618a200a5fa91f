// Winograd's F(4x4, 3x3): the three passes over a slab of tiles. See kernels.h for what they read and write.
//
// A tile of 6x6 pixels gives 4x4 outputs: y = A' [(G w G') . (B' x B)] A, with the points 0, +-5/8, +-3/2 and infinity.
// In float32 their error is half that of the usual 0, +-1, +-2 (benchmarks/NOTES.md), and all of B and A is exact. G
// is in ../winograd.cpp, which packs the weights.
#include <array>
#include <utility>

#include "../winograd_points.h"
#include "blocks.h"
#include "kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using L = Lanes<float>;
using Vec = L::Vec;

constexpr int kIn = kWinogradIn, kOut = kWinogradOut;
// Sums that the registers hold: of kRows tiles by kWide vectors of outputs.
constexpr int kWide = Vec::size() >= 16 ? 4 : 2, kRows = kWinogradRows;
constexpr int64_t kLine = 64 / sizeof(float);
static_assert(kWinogradPanel % (kWide * Vec::size()) == 0 && kWinogradPanel % kWinogradBlock == 0);

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

// One dimension of A' m A.
C10_ALWAYS_INLINE void transform_output(const Vec* m, int64_t step, Vec* out, int64_t out_step) {
  constexpr float p = kPointP, q = kPointQ, p2 = p * p, q2 = q * q;
  const Vec even_p = m[step] + m[2 * step], odd_p = m[step] - m[2 * step];
  const Vec even_q = m[3 * step] + m[4 * step], odd_q = m[3 * step] - m[4 * step];
  out[0] = m[0] + (even_p + even_q);
  out[out_step] = fma(q, odd_q, Vec(p) * odd_p);
  out[2 * out_step] = fma(q2, even_q, Vec(p2) * even_p);
  out[3 * out_step] = fma(q2 * q, odd_q, fma(p2 * p, odd_p, m[5 * step]));
}

// Of a channel in [block of channels][tile][channels of a block].
C10_ALWAYS_INLINE int64_t block_offset(int64_t channel, int64_t block, int64_t tiles) {
  return channel / block * tiles * block + channel % block;
}

// Where a tile lies: its first output, and how many of its 4 x 4 are in the image.
struct Place {
  int64_t image, row, column, rows, columns;
};

C10_ALWAYS_INLINE Place place_of(const WinogradConv& conv, int64_t tile) {
  const int64_t tiles = conv.tile_rows * conv.tile_columns, in_image = tile % tiles;
  const int64_t row = in_image / conv.tile_columns * kOut, column = in_image % conv.tile_columns * kOut;
  return {tile / tiles, row, column, smaller(kOut, conv.height - row), smaller(kOut, conv.width - column)};
}

// products[rows][kWide vectors] (+)= transformed[rows][channels] * weight[channels][kWide vectors of a panel]; on the
// way as many lines from `next` on are fetched.
template <int rows>
void multiply(
    const float* transformed, const float* weight, float* products, int64_t channels, bool first, const float* next) {
  Vec sums[rows][kWide];
  for (auto& row : sums) {
    for (auto& sum : row) sum = Vec(0);
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    fetch_to_read(next + channel * kLine);
    Vec w[kWide];
    for (int i = 0; i < kWide; ++i) w[i] = Vec::loadu(weight + channel * kWinogradPanel + i * Vec::size());
    for (int row = 0; row < rows; ++row) {
      const Vec value(transformed[row * kWinogradBlock + channel]);
      for (int i = 0; i < kWide; ++i) sums[row][i] = at::vec::fmadd(value, w[i], sums[row][i]);
    }
  }
  for (int row = 0; row < rows; ++row) {
    for (int i = 0; i < kWide; ++i) {
      float* product = products + row * kWinogradPanel + i * Vec::size();
      (first ? sums[row][i] : Vec::loadu(product) + sums[row][i]).store(product);
    }
  }
}

using Multiply = void (*)(const float*, const float*, float*, int64_t, bool, const float*);

template <int... rows>
constexpr std::array<Multiply, sizeof...(rows)> multiply_table(std::integer_sequence<int, rows...>) {
  return {&multiply<rows + 1>...};
}

// By the number of rows, less one.
constexpr auto kMultiply = multiply_table(std::make_integer_sequence<int, kRows>());

}  // namespace

void winograd_input(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of(conv, slab.first + tile);
    const float* pixels[kIn][kIn];
    for (int64_t i = 0; i < kIn; ++i) {
      for (int64_t j = 0; j < kIn; ++j) {
        const int64_t row = place.row + i - 1, column = place.column + j - 1;
        const bool padding = row < 0 || row >= conv.height || column < 0 || column >= conv.width;
        const int64_t pixel = (place.image * conv.height + row) * conv.width + column;
        pixels[i][j] = padding ? conv.zeros : conv.x + pixel * conv.channels;
      }
    }
    float* out = slab.transformed + tile * kWinogradBlock;
    for_each_vector<L::size>(conv.channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
      float* to = out + block_offset(channel, kWinogradBlock, slab.tiles);
      Vec x[kIn][kIn], half[kIn][kIn];
      for (int j = 0; j < kIn; ++j) {
        for (int i = 0; i < kIn; ++i) x[i][j] = L::load(pixels[i][j] + channel, span).v[0];
        transform_input(&x[0][j], kIn, &half[0][j], kIn);
      }
      for (int i = 0; i < kIn; ++i) {
        Vec row[kIn];
        transform_input(half[i], 1, row, 1);
        for (int j = 0; j < kIn; ++j) row[j].store(to + (i * kIn + j) * slab.transformed_step);
      }
    });
  }
}

void winograd_product(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  const int64_t panels = conv.panels;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t element = item / panels, panel = item % panels;
    const float* weight = conv.weight + item * conv.channels * kWinogradPanel;
    const float* transformed = slab.transformed + element * slab.transformed_step;
    float* products = slab.products + element * slab.products_step + panel * slab.tiles * kWinogradPanel;
    for (int64_t channel = 0; channel < conv.channels; channel += conv.summed) {
      const int64_t channels = smaller(conv.summed, conv.channels - channel);
      const float* block = transformed + block_offset(channel, kWinogradBlock, slab.tiles);
      for (int64_t output = 0; output < kWinogradPanel; output += kWide * Vec::size()) {
        const float* next = weight + (channel + channels) * kWinogradPanel;
        for (int64_t tile = 0; tile < slab.tiles; tile += kRows, next += channels * kLine) {
          kMultiply[smaller(kRows, slab.tiles - tile) - 1](
              block + tile * kWinogradBlock, weight + channel * kWinogradPanel + output,
              products + tile * kWinogradPanel + output, channels, channel == 0, next);
        }
      }
    }
  }
}

bool winograd_output(const WinogradConv& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  Vec zero_if_finite(0);
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place place = place_of(conv, slab.first + tile);
    const int64_t pixel = (place.image * conv.height + place.row) * conv.width + place.column;
    const float* products = slab.products + tile * kWinogradPanel;
    for_each_vector<L::size>(conv.outputs, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
      const float* from = products + block_offset(channel, kWinogradPanel, slab.tiles);
      Vec half[kOut][kIn];
      for (int j = 0; j < kIn; ++j) {
        Vec column[kIn];
        for (int i = 0; i < kIn; ++i) column[i] = Vec::loadu(from + (i * kIn + j) * slab.products_step);
        transform_output(column, 1, &half[0][j], kIn);
      }
      const L bias = L::load(conv.bias + channel, span);
      for (int i = 0; i < kOut; ++i) {
        Vec row[kOut];
        transform_output(half[i], 1, row, 1);
        for (int j = 0; j < kOut; ++j) {
          zero_if_finite = fma(0, row[j], zero_if_finite);
          if (i >= place.rows || j >= place.columns) continue;
          const int64_t offset = (pixel + i * conv.width + j) * conv.outputs + channel;
          L out = L{{row[j]}} + bias;
          if (conv.residual != nullptr) out = out + L::load(conv.residual + offset, span);
          if (conv.relu) out = relu(out);
          out.store(conv.y + offset, span);
        }
      }
    });
  }
  float lanes[Vec::size()];
  zero_if_finite.store(lanes);
  for (const float lane : lanes) {
    if (!(lane == 0)) return false;
  }
  return true;
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
