// The gradient of a 3x3 kernel by Winograd: the two passes over a slab of tiles and the last. See conv_kernels.h for what they
// read and write.
//
// A tile of 4x2 gradients and the 6x4 pixels of x that they see: dw = G' [sum (A dy A2') . (B' x B2)] G2, by rows with the
// points of winograd.cpp, by columns with 0, +-1 and infinity. With the former both ways the error is twice as large, and
// too large (benchmarks/NOTES.md).
#include <algorithm>

#include "conv_kernels.h"
#include "winograd_parts.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

using namespace winograd;

namespace {

constexpr int kWideIn = kWinogradWideIn, kWideOut = kWinogradWideOut;  // columns of a tile, of x and of dy

// One dimension of B' x B, by columns.
C10_ALWAYS_INLINE void transform_columns(const Vec* x, Vec* out) {
  out[0] = x[2] - x[0];
  out[1] = x[1] + x[2];
  out[2] = x[2] - x[1];
  out[3] = x[3] - x[1];
}

// One dimension of A dy A', by rows: four values, `step` apart.
C10_ALWAYS_INLINE void transform_dy(const Vec* dy, int64_t step, Vec* out, int64_t out_step) {
  constexpr float p = kPointP, q = kPointQ, p2 = p * p, q2 = q * q;
  const Vec y0 = dy[0], y1 = dy[step], y2 = dy[2 * step], y3 = dy[3 * step];
  const Vec even_p = fma(p2, y2, y0), odd_p = fma(p2, y3, y1);
  const Vec even_q = fma(q2, y2, y0), odd_q = fma(q2, y3, y1);
  out[0] = y0;
  out[out_step] = fma(p, odd_p, even_p);
  out[2 * out_step] = fma(-p, odd_p, even_p);
  out[3 * out_step] = fma(q, odd_q, even_q);
  out[4 * out_step] = fma(-q, odd_q, even_q);
  out[5 * out_step] = y3;
}

// The same by columns: two values.
C10_ALWAYS_INLINE void transform_dy_columns(const Vec* dy, Vec* out) {
  out[0] = dy[0];
  out[1] = dy[0] + dy[1];
  out[2] = dy[0] - dy[1];
  out[3] = dy[1];
}

// One dimension of G' m G, by rows: six values, `step` apart.
C10_ALWAYS_INLINE void transform_sums(const Vec* m, int64_t step, Vec* out, int64_t out_step) {
  const Vec even_p = Vec(kOverP) * (m[step] + m[2 * step]), odd_p = Vec(kOverP) * (m[step] - m[2 * step]);
  const Vec even_q = Vec(kOverQ) * (m[3 * step] + m[4 * step]), odd_q = Vec(kOverQ) * (m[3 * step] - m[4 * step]);
  out[0] = fma(kOver0, m[0], even_p + even_q);
  out[out_step] = fma(kP, odd_p, Vec(kQ) * odd_q);
  out[2 * out_step] = fma(kP * kP, even_p, fma(kQ * kQ, even_q, m[5 * step]));
}

// The same by columns: four values.
C10_ALWAYS_INLINE void transform_sums_columns(const Vec* m, Vec* out) {
  const Vec even = Vec(0.5f) * (m[1] + m[2]);
  out[0] = even - m[0];
  out[1] = Vec(0.5f) * (m[1] - m[2]);
  out[2] = even + m[3];
}

// By the number of rows, which are channels here, less one.
constexpr auto kByChannels = multiply_table<1, kWinogradBlock>(std::make_integer_sequence<int, kRows>());

template <bool normed>
C10_ALWAYS_INLINE void transform_x(
    const WinogradGradient& conv, const Place& place, float* out, const WinogradSlab& slab) {
  const float* pixels[kIn][kWideIn];
  find_pixels(conv, place, pixels);
  for_each_vector<L::size>(conv.channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
    float* to = out + block_offset(channel, kWinogradBlock, slab.tiles);
    const Pixel<normed> pixel(conv, channel);
    Vec half[kIn][kWideIn];
    for (int j = 0; j < kWideIn; ++j) {
      Vec column[kIn];
      for (int i = 0; i < kIn; ++i) column[i] = pixel.load(pixels[i][j], channel, span);
      transform_input(column, 1, &half[0][j], kWideIn);
    }
    for (int i = 0; i < kIn; ++i) {
      Vec row[kWideIn];
      transform_columns(half[i], row);
      for (int j = 0; j < kWideIn; ++j) row[j].store(to + (i * kWideIn + j) * slab.transformed_step);
    }
  });
}

C10_ALWAYS_INLINE void transform_dy(
    const WinogradGradient& conv, const Place& place, float* out, const WinogradSlab& slab) {
  const float* dy = conv.dy + ((place.image * conv.height + place.row) * conv.width + place.column) * conv.outputs;
  for_each_vector<L::size>(conv.outputs, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
    float* to = out + block_offset(channel, kStep, slab.tiles);
    Vec half[kIn][kWideOut];
    for (int j = 0; j < kWideOut; ++j) {
      Vec column[kOut];
      for (int i = 0; i < kOut; ++i) {
        const bool inside = i < place.rows && j < place.columns;
        column[i] = inside ? L::load(dy + (i * conv.width + j) * conv.outputs + channel, span).v[0] : Vec(0);
      }
      transform_dy(column, 1, &half[0][j], kWideOut);
    }
    for (int i = 0; i < kIn; ++i) {
      Vec row[kWideIn];
      transform_dy_columns(half[i], row);
      for (int j = 0; j < kWideIn; ++j) row[j].store(to + (i * kWideIn + j) * slab.products_step);
    }
  });
}

}  // namespace

void winograd_gradient_input(const WinogradGradient& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  with_norm(conv, [&](auto normed) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const Place place = place_of<kOut, kWideOut>(conv, slab.first + tile);
      transform_x<decltype(normed)::value>(conv, place, slab.transformed + tile * kWinogradBlock, slab);
      transform_dy(conv, place, slab.products + tile * kStep, slab);
    }
  });
}

void winograd_gradient_product(const WinogradGradient& conv, const WinogradSlab& slab, int64_t begin, int64_t end) {
  constexpr int64_t kSum = kWinogradBlock;  // tiles that are summed up in one go
  constexpr int64_t kFinishedTiles = kFinished > kSum ? kFinished : kSum;
  const int64_t blocks = (conv.channels + kWinogradBlock - 1) / kWinogradBlock;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item % blocks, panel = item / blocks % conv.panels, element = item / blocks / conv.panels;
    const int64_t first = block * kWinogradBlock, channels = smaller(kWinogradBlock, conv.channels - first);
    const float* transformed = slab.transformed + element * slab.transformed_step + first * slab.tiles;
    const float* dy = slab.products + element * slab.products_step + panel * slab.tiles * kWinogradPanel;
    alignas(64) float sums[kWinogradBlock * kWinogradPanel];  // of the slab, so that a slab is one term of the whole
    for (int64_t tile = 0; tile < slab.tiles; tile += kFinishedTiles) {
      const int64_t tiles = smaller(kFinishedTiles, slab.tiles - tile);
      const Terms terms = {tiles, kSum, kSum * kWinogradBlock, tile == 0};
      for (int64_t output = 0; output < kWinogradPanel; output += kStep) {
        const float* from = dy + output * slab.tiles + tile * kStep;
        for (int64_t channel = 0; channel < channels; channel += kRows) {
          kByChannels[smaller(kRows, channels - channel) - 1](
              transformed + tile * kWinogradBlock + channel, from, sums + output * channels + channel * kStep, terms,
              fetched_by(channel / kRows, from, tiles));
        }
      }
    }
    float* whole = conv.sums + (element * conv.panels + panel) * conv.channels * kWinogradPanel + first * kStep;
    for (int64_t output = 0; output < kWinogradPanel; output += kStep) {
      const float* own = sums + output * channels;
      float* to = whole + output * conv.channels;
      for (int64_t i = 0; i < channels * kStep; i += Vec::size()) {
        const Vec value = Vec::loadu(own + i);
        (slab.first == 0 ? value : Vec::loadu(to + i) + value).store(to + i);
      }
    }
  }
}

bool winograd_gradient_output(const WinogradGradient& conv, int64_t begin, int64_t end) {
  constexpr int64_t kGroup = 16, kAll = kTaps * kTaps;  // channels that are written together
  const int64_t element_step = conv.panels * conv.channels * kWinogradPanel;
  const bool taps_together = conv.tap_step == 1;
  Vec zero_if_finite(0);
  for (int64_t output = 0; output < conv.outputs; output += Vec::size()) {
    const int64_t lanes = smaller(Vec::size(), conv.outputs - output);
    const float* sums = conv.sums + block_offset(output, kStep, conv.channels);
    for (int64_t channel = begin; channel < end; channel += kGroup) {
      const int64_t group = smaller(kGroup, end - channel);
      // Turned here: outputs lie so far apart in memory that few of their lines would stay in the first level cache.
      float turned[Vec::size()][kGroup * kAll];
      for (int64_t c = 0; c < group; ++c) {
        const float* from = sums + (channel + c) * kStep;
        Vec half[kTaps][kWideIn];
        for (int j = 0; j < kWideIn; ++j) {
          Vec column[kIn];
          for (int i = 0; i < kIn; ++i) column[i] = Vec::loadu(from + (i * kWideIn + j) * element_step);
          transform_sums(column, 1, &half[0][j], kWideIn);
        }
        for (int i = 0; i < kTaps; ++i) {
          Vec row[kTaps];
          transform_sums_columns(half[i], row);
          for (int j = 0; j < kTaps; ++j) {
            float values[Vec::size()];
            zero_if_finite = fma(0, row[j], zero_if_finite);
            row[j].store(values);
            const int64_t tap = i * kTaps + j, place = taps_together ? c * kAll + tap : tap * group + c;
            for (int64_t lane = 0; lane < lanes; ++lane) turned[lane][place] = values[lane];
          }
        }
      }
      const int64_t runs = taps_together ? 1 : kAll, length = group * kAll / runs;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* to = conv.dweight + (output + lane) * conv.output_step + channel * conv.channel_step;
        for (int64_t run = 0; run < runs; ++run) {
          std::copy_n(turned[lane] + run * length, length, to + run * conv.tap_step);
        }
      }
    }
  }
  return is_zero(zero_if_finite);
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
