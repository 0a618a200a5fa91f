// The gradient of a 3x3 kernel by Winograd's F(2x2, 3x3) in bfloat16's dot products: dw = G' [sum (A dy A') . (B' x B)] G,
// summed up over tiles of 2x2 gradients and the 4x4 pixels of x that they see. A product takes two tiles at once, whose
// values lie side by side. Transforms are float32, what is multiplied is rounded to bfloat16, sums are float32.
#include "amx.h"
#include "dots.h"
#include "vectors.h"
#include "winograd_transforms.h"

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kIn = kWinogradIn, kOut = kWinogradOut, kTaps = kWinogradTaps;
constexpr int64_t kRows = 8;  // of sums in registers, by 32 columns

// side x side pixels of one tensor that a tile sees; zeros where there is none.
template <int64_t side>
struct Pixels {
  const uint16_t* at[side * side];

  Pixels(const WinogradGradientArgs& args, const uint16_t* image, int64_t channels, int64_t tile, int64_t before) {
    const int64_t columns = (args.width + kOut - 1) / kOut, tiles = (args.height + kOut - 1) / kOut * columns;
    const int64_t number = tile / tiles, in_image = tile % tiles;
    const int64_t row = in_image / columns * kOut - before, column = in_image % columns * kOut - before;
    for (int64_t i = 0; i < side; ++i) {
      for (int64_t j = 0; j < side; ++j) {
        const int64_t r = row + i, c = column + j;
        const bool inside = tile < args.tiles && r >= 0 && r < args.height && c >= 0 && c < args.width;
        at[i * side + j] = inside ? image + ((number * args.height + r) * args.width + c) * channels : args.zeros;
      }
    }
  }

  void load(int64_t channel, __m512* out) const {
    for (int64_t i = 0; i < side * side; ++i) out[i] = load_half(at[i] + channel);
  }
};

// 16 channels of a tile at the 16 points, a value in every lower half.
template <WinogradTransform transform, int64_t side>
inline void values_of(const Pixels<side>& pixels, int64_t channel, __m512i* values) {
  __m512 in[side * side], points[kWinogradPoints];
  pixels.load(channel, in);
  transform_square<transform, side, kIn>(in, points);
#pragma GCC unroll 16
  for (int64_t point = 0; point < kWinogradPoints; ++point) values[point] = _mm512_cvtepu16_epi32(narrow(points[point]));
}

// Those of two tiles side by side: [point] of vectors `step` apart.
template <WinogradTransform transform, int64_t side>
inline void transform_pair(
    const Pixels<side>& first, const Pixels<side>& second, int64_t channel, uint16_t* to, int64_t step) {
  __m512i low[kWinogradPoints], high[kWinogradPoints];
  values_of<transform>(first, channel, low);
  values_of<transform>(second, channel, high);
#pragma GCC unroll 16
  for (int64_t point = 0; point < kWinogradPoints; ++point) {
    _mm512_storeu_si512(to + point * step, _mm512_or_si512(low[point], _mm512_slli_epi32(high[point], 16)));
  }
}

}  // namespace

void winograd_gradient_transform(const WinogradGradientArgs& args, int64_t first, int64_t begin, int64_t end) {
  constexpr int64_t kPair = 2 * kVector;
  const int64_t point = args.pairs * kPair;
  for (int64_t pair = begin; pair < end; ++pair) {
    const int64_t tile = first + 2 * pair;
    const Pixels<kIn> x0(args, args.x, args.channels, tile, 1), x1(args, args.x, args.channels, tile + 1, 1);
    for (int64_t channel = 0; channel < args.channels; channel += 16) {
      uint16_t* to = args.x_values + channel / kVector * kWinogradPoints * point + pair * kPair + channel % kVector * 2;
      transform_pair<transform_input>(x0, x1, channel, to, point);
    }
    const Pixels<kOut> dy0(args, args.dy, args.outputs, tile, 0), dy1(args, args.dy, args.outputs, tile + 1, 0);
    for (int64_t channel = 0; channel < args.outputs; channel += 16) {
      uint16_t* to = args.dy_values + channel / kVector * kWinogradPoints * point + pair * kPair + channel % kVector * 2;
      transform_pair<transform_output_gradient>(dy0, dy1, channel, to, point);
    }
  }
}

void winograd_gradient_multiply(const WinogradGradientArgs& args, int64_t pairs, bool restart, int64_t begin, int64_t end) {
  constexpr int64_t kPair = 2 * kVector;
  const int64_t blocks = args.channels / kVector, output_blocks = args.outputs / kVector;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t block = item % blocks, output_block = item / blocks % output_blocks;
    const int64_t point = item / blocks / output_blocks;
    const uint16_t* x = args.x_values + (block * kWinogradPoints + point) * args.pairs * kPair;
    const uint16_t* dy = args.dy_values + (output_block * kWinogradPoints + point) * args.pairs * kPair;
    float* sums = args.sums + item * kBlockValues;
    for (int64_t row = 0; row < kVector; row += kRows) {
      __m512 sum[kRows][2];
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        const float* before = sums + (row + i) * kVector;
        sum[i][0] = restart ? _mm512_setzero_ps() : _mm512_loadu_ps(before);
        sum[i][1] = restart ? _mm512_setzero_ps() : _mm512_loadu_ps(before + 16);
      }
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const uint16_t* low = x + pair * kPair;
        multiply_rows(sum, low, low + kVector, [&](int64_t i) { return dy + pair * kPair + 2 * (row + i); });
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < kRows; ++i) {
        _mm512_storeu_ps(sums + (row + i) * kVector, sum[i][0]);
        _mm512_storeu_ps(sums + (row + i) * kVector + 16, sum[i][1]);
      }
    }
  }
}

bool winograd_gradient_finish(const WinogradGradientArgs& args, int64_t begin, int64_t end) {
  const int64_t blocks = args.channels / kVector, point_step = args.outputs * args.channels;
  __m512 rest = _mm512_setzero_ps();  // NaN where a value is not finite
  for (int64_t output = begin; output < end; ++output) {
    for (int64_t channel = 0; channel < args.channels; channel += 16) {
      const int64_t item = output / kVector * blocks + channel / kVector;
      const float* from = args.sums + item * kBlockValues + output % kVector * kVector + channel % kVector;
      __m512 m[kWinogradPoints], w[kTaps * kTaps];
      for (int64_t point = 0; point < kWinogradPoints; ++point) m[point] = _mm512_loadu_ps(from + point * point_step);
      transform_square<transform_weight_gradient, kIn, kTaps>(m, w);
      uint16_t* to = args.dweight + output * args.output_step + channel * args.channel_step;
      for (int64_t tap = 0; tap < kTaps * kTaps; ++tap) {
        rest = _mm512_add_ps(rest, _mm512_sub_ps(w[tap], w[tap]));
        if (args.channel_step == 1) {
          store_half(to + tap * args.tap_step, narrow(w[tap]));
          continue;
        }
        uint16_t lanes[16];
        store_half(lanes, narrow(w[tap]));
        for (int64_t lane = 0; lane < 16; ++lane) to[lane * args.channel_step + tap * args.tap_step] = lanes[lane];
      }
    }
  }
  return _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q) == 0;
}

}  // namespace resnet_fast::cpu::amx
