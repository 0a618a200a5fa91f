// What the packing of train.h is made of: float32 values as planes of bfloat16.
#pragma once

#include <immintrin.h>

#include "train.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx::train {

// maskz, because GCC 12 warns of its own header without.
inline __m512 low_half(__m512i bfloats) { return widen(_mm512_castsi512_si256(bfloats)); }
inline __m512 high_half(__m512i bfloats) { return widen(_mm512_maskz_extracti64x4_epi64(0xff, bfloats, 1)); }

// a in the lower half.
inline __m512i narrow(__m512 a, __m512 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }

// Largest magnitude seen, by bits.
struct Largest {
  __m512i bits = _mm512_setzero_si512();

  void see(__m512 v) {
    bits = _mm512_max_epu32(bits, _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)));
  }
  uint32_t result() const { return _mm512_reduce_max_epu32(bits); }
};

// relu((v - mean) * scale + bias), keeping NaN.
struct Norm {
  __m512 mean, scale, bias;

  Norm() = default;
  Norm(const Pixels& from, int64_t channel)
      : mean(load(from.mean + channel)), scale(load(from.scale + channel)), bias(load(from.bias + channel)) {}

  __m512 operator()(__m512 v) const {
    return _mm512_max_ps(_mm512_setzero_ps(), _mm512_fmadd_ps(_mm512_sub_ps(v, mean), scale, bias));
  }
};

// Stores the planes of 32 values, `step` apart; a comes first.
template <int planes>
inline void store_planes(__m512 a, __m512 b, uint16_t* to, int64_t step) {
  __m512i plane = narrow(a, b);
  _mm512_storeu_si512(to, plane);
  for (int i = 1; i < planes; ++i) {
    a = _mm512_sub_ps(a, low_half(plane));
    b = _mm512_sub_ps(b, high_half(plane));
    plane = narrow(a, b);
    _mm512_storeu_si512(to + i * step, plane);
  }
}

// 16 pairs of a and b, a in the lower half of each: `plane`, and the next to come in a and b.
inline __m512i pairs(__m512& a, __m512& b) {
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
      0);
  const __m512i plane = _mm512_permutexvar_epi16(order, narrow(a, b));
  a = _mm512_sub_ps(a, _mm512_castsi512_ps(_mm512_slli_epi32(plane, 16)));
  b = _mm512_sub_ps(b, _mm512_castsi512_ps(_mm512_and_si512(plane, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
  return plane;
}

}  // namespace resnet_fast::cpu::amx::train
