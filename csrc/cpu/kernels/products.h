// The product that Winograd's convolutions and the direct one are made of, in float32.
#pragma once

#include "blocks.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace products {

using Vec = Lanes<float>::Vec;

constexpr int kWide = Vec::size() >= 16 ? 4 : 2;  // vectors of columns whose sums the registers hold, of up to six rows
constexpr int64_t kLine = 64 / sizeof(float);

// sums: of value(row, term) * b[term][kWide vectors], over the terms; b's rows are b_step apart. fetch(term): what is
// prefetched on the way.
template <int64_t b_step, int rows, typename Value, typename Fetch>
C10_ALWAYS_INLINE void sum_products(
    Vec (&sums)[rows][kWide], const float* b, int64_t terms, const Value& value, const Fetch& fetch) {
  for (auto& row : sums) {
    for (auto& sum : row) sum = Vec(0);
  }
  for (int64_t term = 0; term < terms; ++term) {
    fetch(term);
    Vec values[kWide];
    for (int i = 0; i < kWide; ++i) values[i] = Vec::loadu(b + term * b_step + i * Vec::size());
    for (int row = 0; row < rows; ++row) {
      const Vec factor(value(row, term));
      for (int i = 0; i < kWide; ++i) sums[row][i] = at::vec::fmadd(factor, values[i], sums[row][i]);
    }
  }
}

}  // namespace products

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
