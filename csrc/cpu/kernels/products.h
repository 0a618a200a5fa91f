// The product that Winograd's convolutions and the direct one are made of, in float32.
#pragma once

#include "blocks.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace products {

using Vec = Lanes<float>::Vec;

constexpr int kWide = Vec::size() >= 16 ? 4 : 2;  // vectors of columns whose sums the registers hold, of up to six rows
constexpr int64_t kLine = 64 / sizeof(float);

// Terms that are one run of instructions with hardly anything between the products: where another hardware thread takes half
// of a core's issue, every other instruction costs time (NOTES.md, "AVX2 alone"). AVX-512's sums leave no registers for it.
constexpr int kRun = kWide > 2 ? 1 : 16;
static_assert(kRun == 1 || kRun == kLine);

// sums: of value(row, term) * b[term][kWide vectors], over the terms; b's rows are b_step apart. fetch(term, i), where i
// is the term's place among kLine of them, is what is prefetched on the way.
template <int64_t b_step, int rows, typename Value, typename Fetch>
C10_ALWAYS_INLINE void sum_products(
    Vec (&sums)[rows][kWide], const float* b, int64_t terms, const Value& value, const Fetch& fetch) {
  for (auto& row : sums) {
    for (auto& sum : row) sum = Vec(0);
  }
  const auto add = [&](int64_t term, int i) RF_INLINE_LAMBDA {
    fetch(term, i);
    Vec values[kWide];
    for (int j = 0; j < kWide; ++j) values[j] = Vec::loadu(b + term * b_step + j * Vec::size());
    for (int row = 0; row < rows; ++row) {
      const Vec factor(value(row, term));
      for (int j = 0; j < kWide; ++j) sums[row][j] = at::vec::fmadd(factor, values[j], sums[row][j]);
    }
  };
  int64_t term = 0;
  if constexpr (kRun > 1) {
    for (; term + kRun <= terms; term += kRun) {
#pragma GCC unroll 16
      for (int i = 0; i < kRun; ++i) add(term + i, i);
    }
  }
  for (; term < terms; ++term) add(term, static_cast<int>(term % kLine));
}

}  // namespace products

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
