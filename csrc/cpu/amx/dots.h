// The product that every convolution by dot products is made of. Only for files that are compiled for AVX-512 with bfloat16.
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

}  // namespace
}  // namespace resnet_fast::cpu::amx
