// The Winograd kernels of csrc/cpu/kernels/winograd.cpp, original and mutated: compiled by tests/test_winograd_mutants.py,
// which writes the copies, each in a namespace of its own, to WINOGRAD_COPIES, and their names to WINOGRAD_NAMES(entry).
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/kernels/blocks.h"
#include "cpu/kernels/kernels.h"
#include "cpu/winograd_points.h"
#include WINOGRAD_COPIES

using namespace resnet_fast::cpu;

// One image by one slab. sizes: channels, outputs, height, width, panels, whether with ReLU.
#define ENTRY(name)                                                                                               \
  extern "C" bool name(                                                                                           \
      const float* x, const float* weight, const float* bias, const float* residual, float* y, const int64_t* sizes) { \
    WinogradConv conv;                                                                                            \
    std::vector<float> zeros(sizes[0] + 32);                                                                      \
    conv.x = x, conv.zeros = zeros.data(), conv.weight = weight, conv.bias = bias, conv.residual = residual;      \
    conv.y = y, conv.relu = sizes[5] != 0;                                                                        \
    conv.channels = sizes[0], conv.outputs = sizes[1], conv.height = sizes[2], conv.width = sizes[3];             \
    conv.tile_rows = (sizes[2] + 3) / 4, conv.tile_columns = (sizes[3] + 3) / 4;                                  \
    conv.panels = sizes[4], conv.summed = 16;                                                                     \
    WinogradSlab slab;                                                                                            \
    slab.tiles = conv.tile_rows * conv.tile_columns;                                                              \
    slab.transformed_step = slab.tiles * (sizes[0] + 31) / 32 * 32 + 16;                                          \
    slab.products_step = slab.tiles * sizes[4] * kWinogradPanel + 16;                                             \
    std::vector<float> transformed(36 * slab.transformed_step), products(36 * slab.products_step);                \
    slab.transformed = transformed.data(), slab.products = products.data();                                       \
    DEFAULT::name::winograd_input(conv, slab, 0, slab.tiles);                                                     \
    DEFAULT::name::winograd_product(conv, slab, 0, 36 * sizes[4]);                                                \
    return DEFAULT::name::winograd_output(conv, slab, 0, slab.tiles);                                             \
  }
WINOGRAD_NAMES(ENTRY)
