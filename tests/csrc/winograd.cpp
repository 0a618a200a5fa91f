// The Winograd kernels of csrc/cpu/conv_kernels/winograd*, original and mutated: compiled by tests/test_winograd_mutants.py,
// which writes the copies, each in a namespace of its own, to MUTANT_COPIES, and their names to MUTANT_NAMES(entry).
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/conv_kernels/conv_kernels.h"
#include "cpu/kernels/blocks.h"
#include "cpu/kernels/normalize.h"
#include "cpu/winograd_points.h"
#include MUTANT_COPIES

using namespace resnet_fast::cpu;

namespace {

struct Sizes {
  int64_t images, channels, outputs, height, width;
  int64_t chunk;
  bool relu, turned, taps_together;  // the last: of the weight
  int64_t panels() const { return (outputs + kWinogradPanel - 1) / kWinogradPanel; }
  int64_t blocks() const { return (channels + kWinogradBlock - 1) / kWinogradBlock; }
};

// The memory of all tiles, as one slab, and slabs of at most `most` of them.
struct Scratch {
  Scratch(const Sizes& s, int64_t elements, int64_t tiles)
      : in(tiles * s.blocks() * kWinogradBlock + 16),
        out(tiles * s.panels() * kWinogradPanel + 16),
        transformed(elements * in),
        products(elements * out) {}
  WinogradSlab slab(int64_t first, int64_t tiles) { return {first, tiles, transformed.data(), in, products.data(), out}; }
  int64_t in, out;
  std::vector<float> transformed, products;
};

// norm: null, or mean, scale and bias, padded.
void pend(WinogradShape& conv, const float* norm) {
  if (norm == nullptr) return;
  const int64_t step = conv.channels + kLanePadding;
  conv.norm.mean = norm, conv.norm.scale = norm + step, conv.norm.bias = norm + 2 * step;
}

}  // namespace

#define ENTRIES(name)                                                                                                  \
  extern "C" bool name##_conv(                                                                                         \
      const float* x, const float* weight, const float* scale, const float* bias, const float* residual, float* y,     \
      const float* norm, float* moments, const Sizes* s) {                                                             \
    std::vector<float> zeros(s->channels + 32), packed(36 * s->panels() * s->channels * kWinogradPanel);               \
    WinogradWeight w;                                                                                                  \
    w.weight = weight, w.scale = scale, w.packed = packed.data(), w.panels = s->panels();                              \
    w.outputs = s->outputs, w.channels = s->channels;                                                                  \
    const int64_t inner = s->turned ? s->outputs : s->channels; /* channels of the weight itself */                    \
    w.output_step = 9 * inner, w.channel_step = s->taps_together ? 9 : 1, w.tap_step = s->taps_together ? 1 : inner;   \
    if (s->turned) {                                                                                                   \
      w.weight += 8 * w.tap_step, w.tap_step = -w.tap_step;                                                            \
      std::swap(w.output_step, w.channel_step);                                                                        \
    }                                                                                                                  \
    CPU_CAPABILITY::name::winograd_pack(w, 0, s->channels);                                                                   \
    WinogradConv conv;                                                                                                 \
    conv.x = x, conv.zeros = zeros.data(), conv.weight = packed.data(), conv.bias = bias, conv.residual = residual;    \
    conv.y = y, conv.relu = s->relu, conv.panels = s->panels(), conv.summed = 16;                                      \
    conv.channels = s->channels, conv.outputs = s->outputs, conv.height = s->height, conv.width = s->width;            \
    conv.tile_rows = (s->height + 3) / 4, conv.tile_columns = (s->width + 3) / 4;                                      \
    conv.moments = moments, conv.chunk = s->chunk;                                                                     \
    pend(conv, norm);                                                                                                  \
    const int64_t tiles = s->images * conv.tile_rows * conv.tile_columns;                                              \
    Scratch scratch(*s, 36, tiles);                                                                                    \
    const WinogradSlab slab = scratch.slab(0, tiles);                                                                  \
    CPU_CAPABILITY::name::winograd_input(conv, slab, 0, tiles);                                                               \
    CPU_CAPABILITY::name::winograd_product(conv, slab, 0, 36 * s->panels());                                                  \
    return CPU_CAPABILITY::name::winograd_output(conv, slab, 0, tiles);                                                       \
  }                                                                                                                    \
  extern "C" bool name##_gradient(                                                                                     \
      const float* dy, const float* x, float* dweight, const float* norm, const Sizes* s) {                            \
    std::vector<float> zeros(s->channels + 32), sums(24 * s->panels() * s->channels * kWinogradPanel);                 \
    WinogradGradient conv;                                                                                             \
    conv.x = x, conv.dy = dy, conv.zeros = zeros.data(), conv.sums = sums.data(), conv.dweight = dweight;              \
    conv.output_step = 9 * s->channels, conv.channel_step = s->taps_together ? 9 : 1;                                  \
    conv.tap_step = s->taps_together ? 1 : s->channels, conv.panels = s->panels();                                     \
    conv.channels = s->channels, conv.outputs = s->outputs, conv.height = s->height, conv.width = s->width;            \
    conv.tile_rows = (s->height + 3) / 4, conv.tile_columns = (s->width + 1) / 2;                                      \
    pend(conv, norm);                                                                                                  \
    const int64_t tiles = s->images * conv.tile_rows * conv.tile_columns, step = tiles / 2 + 1;                        \
    Scratch scratch(*s, 24, step);                                                                                     \
    for (int64_t first = 0; first < tiles; first += step) {                                                            \
      const WinogradSlab slab = scratch.slab(first, std::min(step, tiles - first));                                    \
      CPU_CAPABILITY::name::winograd_gradient_input(conv, slab, 0, slab.tiles);                                               \
      CPU_CAPABILITY::name::winograd_gradient_product(conv, slab, 0, 24 * s->panels() * s->blocks());                         \
    }                                                                                                                  \
    return CPU_CAPABILITY::name::winograd_gradient_output(conv, 0, s->channels);                                              \
  }
MUTANT_NAMES(ENTRIES)
