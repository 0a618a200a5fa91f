// conv() of amx.h for CPUs that have bfloat16's dot products in AVX-512 and no tiles: eight pixels by 32 channels of
// output in registers, summed up over input channels and taps, with bias and residual from the start, or a scale and both
// at the end, and ReLU before they are stored. Taps that read nothing but halo take no time. What comes from memory is
// fetched ahead: an output block's weights while the one before it passes by all pixels, else a 1x1's next pixels.
#include "amx.h"
#include "dots.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kPixels = 8;  // 16 sums: the products' latency is hidden, and a pair of weights serves 16 products
constexpr int64_t kGroups = 128;  // of pixels that pass by weights, or weights by them

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// y of the first `count` of eight pixels and an output block. next: pixels to fetch, or null; ahead: weights to fetch, so
// many lines with every step. scaled: the sums are multiplied by a scale. whole: all pairs of a vector have weights.
template <bool scaled, bool whole>
void unit(
    const ConvArgs& args, const Pixel* pixel, int64_t count, int64_t block, const Pixel* next, const uint16_t* ahead,
    int64_t lines) {
  const uint16_t* x = args.x + block / args.outputs_per_group * args.blocks * args.x_block;
  const uint16_t* weight = args.weight + block * args.steps * kBlockValues;
  const float* bias = args.bias + block * kVector;
  const __m512 bias0 = _mm512_loadu_ps(bias), bias1 = _mm512_loadu_ps(bias + 16);
  const auto add_residual = [&](__m512(&sum)[2], const Pixel& to) {
    if (args.residual == nullptr) return;
    const uint16_t* r = args.residual + to.y + block * args.y_block;
    sum[0] = _mm512_add_ps(sum[0], load_half(r));
    sum[1] = _mm512_add_ps(sum[1], load_half(r + 16));
  };
  int64_t row[kPixels];
  uint32_t beside = ~0u;
  __m512 sum[kPixels][2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kPixels; ++i) {
    row[i] = pixel[i].x;
    beside &= pixel[i].beside;
    sum[i][0] = scaled ? _mm512_setzero_ps() : bias0;
    sum[i][1] = scaled ? _mm512_setzero_ps() : bias1;
    if constexpr (!scaled) add_residual(sum[i], pixel[i]);
  }
  int64_t tap = 0;
  for (int64_t step = 0; step < args.steps; ++step, weight += kBlockValues) {
    const bool skip = beside >> tap & 1;
    if (++tap == args.taps) tap = 0;
    if (skip) continue;
    const uint16_t* at = x + args.offsets[step];
    if (next != nullptr) {
#pragma GCC unroll 8
      for (int64_t i = 0; i < kPixels; ++i) _mm_prefetch(reinterpret_cast<const char*>(at + next[i].x), _MM_HINT_T0);
    }
    for (int64_t n = 0; n < lines; ++n, ahead += kVector) _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
    const int64_t pairs = whole ? kPairs : args.pairs;
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const uint16_t* low = weight + pair * kVector;
      multiply_rows(sum, low, low + kBlockValues / 2, [&](int64_t i) { return at + row[i] + 2 * pair; });
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kPixels; ++i) {
    if (i >= count) break;
    if constexpr (scaled) {
      const float* scale = args.scale + block * kVector;
      sum[i][0] = _mm512_fmadd_ps(sum[i][0], _mm512_loadu_ps(scale), bias0);
      sum[i][1] = _mm512_fmadd_ps(sum[i][1], _mm512_loadu_ps(scale + 16), bias1);
      add_residual(sum[i], pixel[i]);
    }
    const __m512 a = args.relu ? relu(sum[i][0]) : sum[i][0], b = args.relu ? relu(sum[i][1]) : sum[i][1];
    uint16_t* y = args.y + pixel[i].y + block * args.y_block;
    _mm512_storeu_si512(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
  }
}

template <bool scaled, bool whole>
void run(const ConvArgs& args, const Pixel* pixel, int64_t pixels, int64_t begin, int64_t end) {
  const bool pointwise = args.steps == args.blocks;
  const int64_t values = args.steps * kBlockValues;
  Pixel last[kPixels];  // of the pixels, filled up
  for (int64_t i = 0; i < kPixels; ++i) {
    last[i] = pixel[least(pixels / kPixels * kPixels + i, pixels - 1)];
  }
  for (int64_t first = 0; first < pixels; first += kGroups * kPixels) {
    const int64_t count = least(kGroups * kPixels, pixels - first), groups = (count + kPixels - 1) / kPixels;
    const int64_t lines = (kBlockValues / kVector + groups - 1) / groups;
    const auto at = [&](int64_t group) {
      const int64_t number = first + group * kPixels;
      return number + kPixels <= pixels ? pixel + number : last;
    };
    const auto one = [&](int64_t group, int64_t block, bool last_block) {
      const bool weights = !args.pixels_first && block + 1 < end;
      unit<scaled, whole>(
          args, at(group), count - group * kPixels, block,
          pointwise && last_block && group + 1 < groups ? at(group + 1) : nullptr,
          args.weight + (block + 1) * values + group * lines * args.steps * kVector, weights ? lines : 0);
    };
    if (args.pixels_first) {
      for (int64_t group = 0; group < groups; ++group) {
        for (int64_t block = begin; block < end; ++block) one(group, block, block + 1 == end);
      }
    } else {
      for (int64_t block = begin; block < end; ++block) {
        for (int64_t group = 0; group < groups; ++group) one(group, block, true);
      }
    }
  }
}

}  // namespace

void conv_dots(const ConvArgs& args, const Pixel* pixel, int64_t pixels, int64_t begin, int64_t end) {
  if (pixels == 0) return;
  if (args.scale != nullptr) {
    args.pairs == kPairs ? run<true, true>(args, pixel, pixels, begin, end)
                         : run<true, false>(args, pixel, pixels, begin, end);
  } else {
    args.pairs == kPairs ? run<false, true>(args, pixel, pixels, begin, end)
                         : run<false, false>(args, pixel, pixels, begin, end);
  }
}

}  // namespace resnet_fast::cpu::amx
