// The transforms of Winograd's F(2x2, 3x3) with the points 0, +-1 and infinity (Lavin and Gray 2016, arXiv:1509.09308), in
// one dimension: y = A' [(G w G') . (B' x B)] A and dw = G' [(A dy A') . (B' x B)] G. Values are `step` apart.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kWinogradIn = 4, kWinogradOut = 2, kWinogradTaps = 3;  // of a tile's side

// B' x.
inline void transform_input(const __m512* x, int64_t step, __m512* out, int64_t out_step) {
  out[0] = _mm512_sub_ps(x[0], x[2 * step]);
  out[out_step] = _mm512_add_ps(x[step], x[2 * step]);
  out[2 * out_step] = _mm512_sub_ps(x[2 * step], x[step]);
  out[3 * out_step] = _mm512_sub_ps(x[step], x[3 * step]);
}

// G w.
inline void transform_weight(const __m512* w, int64_t step, __m512* out, int64_t out_step) {
  const __m512 half = _mm512_set1_ps(0.5f);
  const __m512 even = _mm512_mul_ps(half, _mm512_add_ps(w[0], w[2 * step])), odd = _mm512_mul_ps(half, w[step]);
  out[0] = w[0];
  out[out_step] = _mm512_add_ps(even, odd);
  out[2 * out_step] = _mm512_sub_ps(even, odd);
  out[3 * out_step] = w[2 * step];
}

// A' m.
inline void transform_output(const __m512* m, int64_t step, __m512* out, int64_t out_step) {
  const __m512 sum = _mm512_add_ps(m[step], m[2 * step]), difference = _mm512_sub_ps(m[step], m[2 * step]);
  out[0] = _mm512_add_ps(m[0], sum);
  out[out_step] = _mm512_sub_ps(difference, m[3 * step]);
}

// A dy.
inline void transform_output_gradient(const __m512* dy, int64_t step, __m512* out, int64_t out_step) {
  out[0] = dy[0];
  out[out_step] = _mm512_add_ps(dy[0], dy[step]);
  out[2 * out_step] = _mm512_sub_ps(dy[0], dy[step]);
  out[3 * out_step] = _mm512_sub_ps(_mm512_setzero_ps(), dy[step]);
}

// G' m.
inline void transform_weight_gradient(const __m512* m, int64_t step, __m512* out, int64_t out_step) {
  const __m512 half = _mm512_set1_ps(0.5f);
  const __m512 even = _mm512_mul_ps(half, _mm512_add_ps(m[step], m[2 * step]));
  out[0] = _mm512_add_ps(m[0], even);
  out[out_step] = _mm512_mul_ps(half, _mm512_sub_ps(m[step], m[2 * step]));
  out[2 * out_step] = _mm512_add_ps(even, m[3 * step]);
}

using WinogradTransform = void (*)(const __m512* in, int64_t step, __m512* out, int64_t out_step);

// Both ways, of in x in values row by row: out x out.
template <WinogradTransform transform, int64_t in, int64_t out>
inline void transform_square(const __m512* x, __m512* y) {
  __m512 rows[out * in];
#pragma GCC unroll 4
  for (int64_t column = 0; column < in; ++column) transform(x + column, in, rows + column, in);
#pragma GCC unroll 4
  for (int64_t row = 0; row < out; ++row) transform(rows + row * in, 1, y + row * out, 1);
}

}  // namespace
}  // namespace resnet_fast::cpu::amx
