// 16 activations at a time as float32, whatever the planes. Only for files that are compiled for AVX-512 with bfloat16.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resnet_fast::cpu::amx {
namespace {

inline __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

inline __m256i narrow(__m512 values) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values)); }

inline __m512 load_half(const uint16_t* values) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values)));
}

inline __m512 load(const float* values) { return _mm512_loadu_ps(values); }
inline __m512 load(const uint16_t* values) { return load_half(values); }

inline void store_half(uint16_t* values, __m256i half) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(values), half);
}

template <int planes>
inline __m512 load(const uint16_t* values, int64_t plane) {
  __m512 sum = load_half(values);
  if constexpr (planes == 3) {
    sum = _mm512_add_ps(sum, _mm512_add_ps(load_half(values + plane), load_half(values + 2 * plane)));
  }
  return sum;
}

// What is not finite has no remainder: Inf - Inf would make NaN of an Inf.
template <int planes>
inline void split(__m512 value, __m256i (&parts)[planes]) {
  parts[0] = narrow(value);
  if constexpr (planes == 3) {
    const __m512 high = widen(parts[0]);
    const __mmask16 finite = _mm512_cmp_ps_mask(_mm512_abs_ps(high), _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    const __m512 rest = _mm512_maskz_sub_ps(finite, value, high);
    parts[1] = narrow(rest);
    parts[2] = narrow(_mm512_sub_ps(rest, widen(parts[1])));
  }
}

template <int planes>
inline void store(uint16_t* values, int64_t plane, __m512 value) {
  __m256i parts[planes];
  split<planes>(value, parts);
  for (int64_t i = 0; i < planes; ++i) store_half(values + i * plane, parts[i]);
}

// rows[i] lane j <-> rows[j] lane i, 16 by 16.
inline void transpose(__m512i* rows) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// relu that keeps NaN: max returns its second operand where one is NaN.
inline __m512 relu(__m512 value) { return _mm512_max_ps(_mm512_setzero_ps(), value); }

}  // namespace
}  // namespace resnet_fast::cpu::amx
