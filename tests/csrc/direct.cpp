// The kernels of csrc/cpu/conv_kernels/direct_conv*.cpp, original and mutated: compiled by tests/test_direct_mutants.py, which
// writes the copies, each in a namespace of its own, to MUTANT_COPIES, and their names to MUTANT_NAMES(entry).
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cpu/conv_kernels/conv_kernels.h"
#include "cpu/direct_sizes.h"
#include "cpu/kernels/blocks.h"
#include MUTANT_COPIES

using namespace resnet_fast::cpu;

// All panels but the first in two ranges of pixels, then the first: each weight is packed for its own.
#define ENTRIES(name)                                                                                                 \
  template <typename F>                                                                                               \
  void name##_convolve(DirectConv conv, DirectWeight weight, int64_t pixels, const F& convolve) {                     \
    const int64_t panels = (conv.outputs + kDirectPanel - 1) / kDirectPanel, middle = pixels / 2 - 2;                 \
    std::vector<float> zeros(conv.channels), packed(panels * kDirectPanel * weight.taps * conv.channels);             \
    conv.zeros = zeros.data();                                                                                        \
    weight.packed = packed.data();                                                                                    \
    CPU_CAPABILITY::name::direct_pack(weight, 1, panels);                                                                    \
    convolve(conv, packed.data(), 1, panels, 0, middle);                                                              \
    convolve(conv, packed.data(), 1, panels, middle, pixels);                                                         \
    CPU_CAPABILITY::name::direct_pack(weight, 0, 1);                                                                         \
    convolve(conv, packed.data(), 0, 1, 0, pixels);                                                                   \
  }                                                                                                                   \
  extern "C" void name##_conv(DirectConv conv, DirectWeight weight, int64_t pixels) {                                 \
    name##_convolve(conv, weight, pixels, &CPU_CAPABILITY::name::direct_conv);                                               \
  }                                                                                                                   \
  extern "C" void name##_conv_copied(DirectConv conv, DirectWeight weight, int64_t pixels) {                          \
    const int64_t terms = weight.taps * conv.channels + kDirectChunk;                                                 \
    std::vector<float> copies(kDirectCopied * terms);                                                                 \
    name##_convolve(conv, weight, pixels, [&](auto&&... range) {                                                      \
      CPU_CAPABILITY::name::direct_conv_copied(range..., copies.data());                                                     \
    });                                                                                                               \
  }                                                                                                                   \
  /* Each image in two bands of rows. */                                                                              \
  extern "C" void name##_conv_image(DirectConv conv, DirectWeight weight, int64_t pixels) {                           \
    const int64_t panels = (conv.outputs + kDirectPanel - 1) / kDirectPanel, image = conv.out_height * conv.out_width; \
    const int64_t middle = conv.out_height / 2, room = (conv.out_height + 1) * conv.stride[0] + conv.kernel_rows;     \
    std::vector<float> packed(panels * kDirectPanel * weight.taps * conv.channels);                                   \
    std::vector<float> rows(room * direct_image_row(conv), std::nanf(""));                                            \
    weight.packed = packed.data();                                                                                    \
    CPU_CAPABILITY::name::direct_pack(weight, 0, panels);                                                                    \
    for (int64_t i = 0; i < pixels / image; ++i) {                                                                    \
      const int64_t first = i * image, second = first + middle * conv.out_width;                                      \
      CPU_CAPABILITY::name::direct_conv_image(conv, packed.data(), i, 0, middle, first, rows.data());                        \
      CPU_CAPABILITY::name::direct_conv_image(conv, packed.data(), i, middle, conv.out_height, second, rows.data());         \
    }                                                                                                                 \
  }
MUTANT_NAMES(ENTRIES)
