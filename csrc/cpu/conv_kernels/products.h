// The product that Winograd's convolutions and the direct one are made of, in float32.
#pragma once

#include <type_traits>
#include <utility>

#include "../kernels/blocks.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace products {

using Vec = Lanes<float>::Vec;

constexpr int kWide = Vec::size() >= 16 ? 4 : 2;  // vectors of columns whose sums the registers hold, of up to six rows
constexpr int64_t kStep = kWide * Vec::size();    // columns, that is outputs
constexpr int64_t kLine = 64 / sizeof(float);

// Terms that are one run of instructions with hardly anything between the products: where another hardware thread takes half
// of a core's issue, every other instruction costs time (NOTES.md, "AVX2 alone"). AVX-512's sums leave no registers for it.
#ifdef CPU_CAPABILITY_AVX2
constexpr int kRun = 16;
#else
constexpr int kRun = 1;
#endif
static_assert(kRun == 1 || kRun == kLine);

template <typename F, int... i>
C10_ALWAYS_INLINE void each_of(const F& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>()), ...);
}
// f(0) to f(count - 1), all constants: what they index stays in registers from one loop to the next, where that of a loop
// which is unrolled is stored in between.
template <int count, typename F>
C10_ALWAYS_INLINE void each(const F& f) {
  each_of(f, std::make_integer_sequence<int, count>());
}

// Fetches, once in `terms_a_line` terms, a line of those that lie from `first` on; i as in add_products.
template <int terms_a_line>
C10_ALWAYS_INLINE void fetch_a_line(const float* first, int64_t term, int i) {
  if (i % terms_a_line == 0) fetch_to_read(first + ((term - i) / terms_a_line + i / terms_a_line) * kLine);
}

template <int rows>
C10_ALWAYS_INLINE void set_to_zero(Vec (&sums)[rows][kWide]) {
  each<rows>([&](auto row) RF_INLINE_LAMBDA { each<kWide>([&](auto j) RF_INLINE_LAMBDA { sums[row][j] = Vec(0); }); });
}

// sums += value(row, term) * b[term][kWide vectors], over the terms; b's rows are b_step apart. fetch(term, i), where i
// is the term's place among kLine of them, is what is prefetched on the way.
template <int64_t b_step, int rows, typename Value, typename Fetch>
C10_ALWAYS_INLINE void add_products(
    Vec (&sums)[rows][kWide], const float* b, int64_t terms, const Value& value, const Fetch& fetch) {
  const auto add = [&](int64_t term, int i) RF_INLINE_LAMBDA {
    fetch(term, i);
    Vec values[kWide];
    each<kWide>([&](auto j) RF_INLINE_LAMBDA { values[j] = Vec::loadu(b + term * b_step + j * Vec::size()); });
    each<rows>([&](auto row) RF_INLINE_LAMBDA {
      const Vec factor(value(row, term));
      each<kWide>([&](auto j) RF_INLINE_LAMBDA { sums[row][j] = at::vec::fmadd(factor, values[j], sums[row][j]); });
    });
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

// The same from zero on.
template <int64_t b_step, int rows, typename Value, typename Fetch>
C10_ALWAYS_INLINE void sum_products(
    Vec (&sums)[rows][kWide], const float* b, int64_t terms, const Value& value, const Fetch& fetch) {
  set_to_zero(sums);
  add_products<b_step>(sums, b, terms, value, fetch);
}

}  // namespace products

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
