// The product that every convolution by dot products is made of. Only for files compiled for AVX-512 with bfloat16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resnet_fast::cpu::amx {
namespace {

inline __m512i broadcast(const uint16_t* pair) {
  int32_t both;
  __builtin_memcpy(&both, pair, sizeof(both));
  return _mm512_set1_epi32(both);
}

inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// To the sums of `rows` rows by 32 columns, the products of each row's pair, where pair(row) points, by the columns' pairs.
template <int64_t rows, typename Pair>
[[gnu::always_inline]] inline void multiply_rows(
    __m512 (&sum)[rows][2], const uint16_t* low, const uint16_t* high, const Pair& pair) {
  const __m512i first = _mm512_loadu_si512(low), second = _mm512_loadu_si512(high);
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i) {
    const __m512i both = broadcast(pair(i));
    sum[i][0] = multiply_add(sum[i][0], both, first);
    sum[i][1] = multiply_add(sum[i][1], both, second);
  }
}

}  // namespace
}  // namespace resnet_fast::cpu::amx
