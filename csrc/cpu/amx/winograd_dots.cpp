// 3x3 convolutions by Winograd's F(2x2, 3x3) in bfloat16's dot products: 16 products where the convolution has 36.
// Transforms are float32, what is multiplied is rounded to bfloat16, sums are float32.
//
// A tile's 16 values of 32 channels lie together, one vector each, tile behind tile; eight tiles by 32 output channels are
// multiplied in registers at a time, as conv_dots() does with pixels.
#include "amx.h"
#include "dots.h"
#include "vectors.h"
#include "winograd_transforms.h"

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kSide = kWinogradIn, kPoints = kWinogradPoints, kTiles = 8;
static_assert(kPoints == kSide * kSide && kPoints * kTiles * kVector <= kScratchFloats);

// 16 channels of a strip's tiles, from left to right: two tiles share two of their columns.
void transform_strip(const WinogradArgs& args, const uint16_t* x, int64_t tiles, uint16_t* values) {
  const int64_t point = args.tiles * kVector;
  __m512 column[kSide][kSide];  // transformed down the rows: [column][row]
  const auto load_column = [&](int64_t number, __m512* to) {
    __m512 pixels[kSide];
#pragma GCC unroll 4
    for (int64_t row = 0; row < kSide; ++row) pixels[row] = load_half(x + row * args.x_row + number * args.x_pixel);
    transform_input(pixels, 1, to, 1);
  };
  load_column(0, column[0]);
  load_column(1, column[1]);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    load_column(2 * tile + 2, column[2]);
    load_column(2 * tile + 3, column[3]);
#pragma GCC unroll 4
    for (int64_t row = 0; row < kSide; ++row) {
      __m512 out[kSide];
      transform_input(&column[0][row], kSide, out, 1);
#pragma GCC unroll 4
      for (int64_t i = 0; i < kSide; ++i) store_half(values + (kSide * row + i) * point + tile * kVector, narrow(out[i]));
    }
#pragma GCC unroll 4
    for (int64_t row = 0; row < kSide; ++row) {
      column[0][row] = column[2][row];
      column[1][row] = column[3][row];
    }
  }
}

// sums[point][8 tiles][32] of an output block and the first `tiles`; with every step, `lines` of `ahead` are fetched.
template <int tiles>
void multiply(const WinogradArgs& args, const uint16_t* values, const uint16_t* weight, const uint16_t* ahead,
              int64_t lines, float* sums) {
  const int64_t point_step = args.tiles * kVector;
  for (int64_t point = 0; point < kPoints; ++point) {
    __m512 sum[tiles][2];
#pragma GCC unroll 8
    for (auto& both : sum) both[0] = both[1] = _mm512_setzero_ps();
    for (int64_t block = 0; block < args.blocks; ++block, weight += kBlockValues) {
      const uint16_t* at = values + (block * kPoints + point) * point_step;
      const uint16_t* next = block + 1 < args.blocks ? at + kPoints * point_step : values + (point + 1) * point_step;
#pragma GCC unroll 8
      for (int64_t i = 0; i < tiles; ++i) _mm_prefetch(reinterpret_cast<const char*>(next + i * kVector), _MM_HINT_T0);
      for (int64_t n = 0; n < lines; ++n, ahead += kVector) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
#pragma GCC unroll 4
      for (int64_t pair = 0; pair < kPairs; ++pair) {
        const uint16_t* low = weight + pair * kVector;
        multiply_rows(sum, low, low + kBlockValues / 2, [&](int64_t i) { return at + i * kVector + 2 * pair; });
      }
    }
#pragma GCC unroll 8
    for (int64_t i = 0; i < tiles; ++i) {
      _mm512_store_ps(sums + (point * kTiles + i) * kVector, sum[i][0]);
      _mm512_store_ps(sums + (point * kTiles + i) * kVector + 16, sum[i][1]);
    }
  }
}

using Multiply = void (*)(const WinogradArgs&, const uint16_t*, const uint16_t*, const uint16_t*, int64_t, float*);
constexpr Multiply kMultiply[kTiles] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>,
                                        multiply<5>, multiply<6>, multiply<7>, multiply<8>};

// y of one tile and output block. Returns whether all that a ReLU has not seen yet is finite.
bool finish(const WinogradArgs& args, const float* sums, int64_t block, const WinogradTile& tile) {
  __m512 outputs[2][4];
#pragma GCC unroll 2
  for (int64_t half = 0; half < 2; ++half) {
    __m512 m[kPoints];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kPoints; ++i) m[i] = _mm512_load_ps(sums + i * kTiles * kVector + 16 * half);
    transform_square<transform_output, kSide, kWinogradOut>(m, outputs[half]);
  }
  const int64_t first = block * kVector;
  const auto ends = [&](int64_t half, int64_t i) {
    const float* bias = args.bias + first + 16 * half;
    if (args.scale == nullptr) return _mm512_add_ps(outputs[half][i], _mm512_loadu_ps(bias));
    return _mm512_fmadd_ps(outputs[half][i], _mm512_loadu_ps(args.scale + first + 16 * half), _mm512_loadu_ps(bias));
  };
  __m512 rest = _mm512_setzero_ps();  // NaN where a value is not finite
#pragma GCC unroll 4
  for (int64_t i = 0; i < 4; ++i) {
    if (i / 2 >= tile.rows || i % 2 >= tile.columns) continue;
    const int64_t at = tile.y + i / 2 * args.y_row + i % 2 * args.y_pixel + block * args.y_block;
    __m512 low = ends(0, i), high = ends(1, i);
    if (args.residual != nullptr) {
      low = _mm512_add_ps(low, load_half(args.residual + at));
      high = _mm512_add_ps(high, load_half(args.residual + at + 16));
    }
    rest = _mm512_add_ps(rest, _mm512_add_ps(_mm512_sub_ps(low, low), _mm512_sub_ps(high, high)));
    if (args.relu) low = relu(low), high = relu(high);
    _mm512_storeu_si512(args.y + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  return _mm512_cmp_ps_mask(rest, rest, _CMP_UNORD_Q) == 0;
}

}  // namespace

void winograd_transform(const WinogradArgs& args, const WinogradStrip* strip, int64_t strips, uint16_t* values) {
  for (int64_t block = 0; block < args.blocks; ++block) {
    uint16_t* to = values + block * kPoints * args.tiles * kVector;
    for (int64_t i = 0; i < strips; to += strip[i++].tiles * kVector) {
      const uint16_t* x = args.x + strip[i].x + block * args.x_block;
      transform_strip(args, x, strip[i].tiles, to);
      transform_strip(args, x + 16, strip[i].tiles, to + 16);
    }
  }
}

void winograd_multiply(
    const WinogradArgs& args, const uint16_t* values, const WinogradTile* tile, int64_t tiles, int64_t begin, int64_t end,
    bool* infinite, float* scratch) {
  const int64_t block_values = kPoints * args.blocks * kBlockValues, groups = (tiles + kTiles - 1) / kTiles;
  const int64_t lines = (kBlockValues / kVector + groups - 1) / groups;
  const int64_t even = tiles / groups, larger = tiles % groups;  // so many tiles a group, and one more in some
  for (int64_t block = begin; block < end; ++block) {
    const uint16_t* weight = args.weight + block * block_values;
    int64_t first = 0;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t count = even + (group < larger);
      const uint16_t* ahead = weight + block_values + group * lines * kPoints * args.blocks * kVector;
      kMultiply[count - 1](args, values + first * kVector, weight, ahead, block + 1 < end ? lines : 0, scratch);
      for (int64_t i = 0; i < count; ++i) {
        if (!finish(args, scratch + i * kVector, block, tile[first + i])) infinite[first + i] = true;
      }
      first += count;
    }
  }
}

}  // namespace resnet_fast::cpu::amx
