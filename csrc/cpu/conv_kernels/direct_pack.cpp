// A weight of the direct convolutions, in the order that they read it in. See conv_kernels.h for what is read and written.
#include <cstring>

#include "direct_parts.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

using namespace direct;

constexpr int64_t kSquare = 16;  // outputs and terms that are transposed at once

// The terms [term, term + kSquare) of kSquare outputs, as [term][output].
void transpose(const DirectWeight& w, int64_t output, int64_t term, float* to) {
  const int64_t terms = w.taps * w.channels;
  const float* from = w.weight + output * terms + term;
  if (output + kSquare <= w.outputs && term + kSquare <= terms) {
    at::vec::transpose_mxn<float, kSquare, kSquare>(from, terms, to, kSquare);
    return;
  }
  for (int64_t i = 0; i < kSquare; ++i) {  // beyond the outputs, zeros, whose products are not stored
    for (int64_t j = 0; j < kSquare; ++j) {
      to[j * kSquare + i] = output + i < w.outputs && term + j < terms ? from[i * terms + j] : 0;
    }
  }
}

}  // namespace

void direct_pack(const DirectWeight& w, int64_t begin, int64_t end) {
  const int64_t terms = w.taps * w.channels;
  for (int64_t panel = begin; panel < end; ++panel) {
    float* packed = w.packed + (panel - begin) * terms * kDirectPanel;
    for (int64_t at = 0; at < kDirectPanel; at += kSquare) {
      const int64_t output = panel * kDirectPanel + at;
      float* to = packed + at / kStep * kStep * terms + at % kStep;
      for (int64_t term = 0; term < terms; term += kSquare) {
        float square[kSquare * kSquare];
        const int64_t count = smaller(kSquare, terms - term);
        transpose(w, output, term, square);
        for (int64_t j = 0; j < count; ++j) {
          const int64_t number = term + j;
          const int64_t place = w.channels_last ? number : number % w.taps * w.channels + number / w.taps;
          std::memcpy(to + place * kStep, square + j * kSquare, kSquare * sizeof(float));
        }
      }
    }
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
