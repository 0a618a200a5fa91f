// AVX-512 for CPUs without: what csrc/cpu/amx and amx_tiles.h use of it, in place of the compiler's intrinsics, included
// before them and compiled for AVX2. Never part of a build that is installed: see `emulate_amx` in setup.py.
//
// As Intel's Software Developer's Manual says. Of bfloat16: denormals are zero on the way in and out, NaN is quieted, and
// VDPBF16PS adds the product of the second numbers of a pair, then that of the first.
#pragma once

#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#define RF_INLINE [[gnu::always_inline]] inline

namespace resnet_fast::emulated_avx512 {

template <typename T>
using Lanes = std::array<T, 64 / sizeof(T)>;  // of a register
template <typename T>
using Half = std::array<T, 32 / sizeof(T)>;
using Integers [[gnu::vector_size(64)]] = uint32_t;

// The bits of one thing as another.
template <typename To, typename From>
RF_INLINE To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename To>
RF_INLINE To read(const void* memory) {
  To to;
  std::memcpy(&to, memory, sizeof(to));
  return to;
}

// The address of an instruction that faults where that is not a multiple of 64.
template <typename T>
RF_INLINE T* aligned(T* memory) {
  if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) std::abort();
  return memory;
}

// value(lane) of every lane.
template <typename Register, typename T, typename Value>
RF_INLINE Register each(const Value& value) {
  std::array<T, sizeof(Register) / sizeof(T)> out;
  for (size_t i = 0; i < out.size(); ++i) out[i] = value(i);
  return as<Register>(out);
}

template <typename T, typename Register, typename Value>
inline Register map(const Register& a, const Register& b, const Value& value) {
  const auto x = as<Lanes<T>>(a), y = as<Lanes<T>>(b);
  return each<Register, T>([&](size_t i) { return value(x[i], y[i]); });
}

template <typename Mask, typename T, typename Register, typename Predicate>
inline Mask ask(const Register& a, const Register& b, const Predicate& predicate) {
  const auto x = as<Lanes<T>>(a), y = as<Lanes<T>>(b);
  Mask mask = 0;
  for (size_t i = 0; i < x.size(); ++i) mask |= static_cast<Mask>(predicate(x[i], y[i])) << i;
  return mask;
}

// Lanes that the mask leaves out are neither read nor written.
template <typename Register, typename T>
inline Register load_masked(uint64_t mask, const void* memory) {
  const char* from = static_cast<const char*>(memory);
  return each<Register, T>([&](size_t i) { return mask >> i & 1 ? read<T>(from + i * sizeof(T)) : T(0); });
}
template <typename T, typename Register>
inline void store_masked(void* memory, uint64_t mask, const Register& value) {
  const auto from = as<std::array<T, sizeof(Register) / sizeof(T)>>(value);
  for (size_t i = 0; i < from.size(); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(memory) + i * sizeof(T), &from[i], sizeof(T));
  }
}

inline float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.0f, x) : x; }
inline float widened(uint16_t x) { return as<float>(static_cast<uint32_t>(x) << 16); }
inline uint16_t narrowed(float value) {
  const auto bits = as<uint32_t>(flushed(value));
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512 dot(const __m512& sum, const __m512bh& a, const __m512bh& b) {
  const auto before = as<Lanes<float>>(sum);
  const auto x = as<Lanes<uint16_t>>(a), y = as<Lanes<uint16_t>>(b);
  const auto product = [&](size_t i, float to) {
    return flushed(std::fma(flushed(widened(x[i])), flushed(widened(y[i])), flushed(to)));
  };
  return each<__m512, float>([&](size_t i) { return product(2 * i, product(2 * i + 1, before[i])); });
}

// 128 bits of the register `from` or of the other by two bits of `order` each.
template <typename Register>
inline Register shuffle(const Register& a, const Register& b, int order) {
  using Quarters = std::array<std::array<uint8_t, 16>, 4>;
  const auto x = as<Quarters>(a), y = as<Quarters>(b);
  return as<Register>(Quarters{x[order & 3], x[order >> 2 & 3], y[order >> 4 & 3], y[order >> 6 & 3]});
}

// In every 128 bits, the lower or upper halves of both, in turns.
template <typename T, bool upper, typename Register>
inline Register unpack(const Register& a, const Register& b) {
  constexpr size_t kQuarter = 16 / sizeof(T);
  const auto x = as<Lanes<T>>(a), y = as<Lanes<T>>(b);
  return each<Register, T>([&](size_t i) {
    const size_t from = i / kQuarter * kQuarter + i % kQuarter / 2 + (upper ? kQuarter / 2 : 0);
    return i % 2 == 0 ? x[from] : y[from];
  });
}

inline __m512 compress(uint16_t mask, const __m512& value) {
  const auto from = as<Lanes<float>>(value);
  Lanes<float> out = {};
  for (size_t i = 0, at = 0; i < 16; ++i) {
    if (mask >> i & 1) out[at++] = from[i];
  }
  return as<__m512>(out);
}

RF_INLINE __m512 mm512_add_ps(const __m512& a, const __m512& b) { return a + b; }
RF_INLINE __m512 mm512_sub_ps(const __m512& a, const __m512& b) { return a - b; }
RF_INLINE __m512 mm512_mul_ps(const __m512& a, const __m512& b) { return a * b; }
RF_INLINE __m512 mm512_div_ps(const __m512& a, const __m512& b) { return a / b; }
RF_INLINE __m512 mm512_max_ps(const __m512& a, const __m512& b) { return a > b ? a : b; }
RF_INLINE __m512i mm512_and_si512(const __m512i& a, const __m512i& b) { return a & b; }
RF_INLINE __m512i mm512_or_si512(const __m512i& a, const __m512i& b) { return a | b; }
RF_INLINE __m512i mm512_max_epi32(const __m512i& a, const __m512i& b) {
  return map<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
RF_INLINE __m512i mm512_max_epu32(const __m512i& a, const __m512i& b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}
RF_INLINE __m512i mm512_max_epi16(const __m512i& a, const __m512i& b) {
  return map<int16_t>(a, b, [](int16_t x, int16_t y) { return x > y ? x : y; });
}
RF_INLINE __m512 mm512_abs_ps(const __m512& a) {
  return map<float>(a, a, [](float x, float) { return std::fabs(x); });
}
RF_INLINE __m512i mm512_slli_epi32(const __m512i& a, int bits) { return as<__m512i>(as<Integers>(a) << bits); }
RF_INLINE __m512 mm512_fmadd_ps(const __m512& a, const __m512& b, const __m512& c) {
  using Halves = std::array<__m256, 2>;
  const auto x = as<Halves>(a), y = as<Halves>(b), z = as<Halves>(c);
  return as<__m512>(Halves{_mm256_fmadd_ps(x[0], y[0], z[0]), _mm256_fmadd_ps(x[1], y[1], z[1])});
}
RF_INLINE __m512 mm512_maskz_sub_ps(__mmask16 mask, const __m512& a, const __m512& b) {
  const auto x = as<Lanes<float>>(a), y = as<Lanes<float>>(b);
  return each<__m512, float>([&](size_t i) { return mask >> i & 1 ? x[i] - y[i] : 0.0f; });
}
RF_INLINE __m512 mm512_mask_mov_ps(const __m512& a, __mmask16 mask, const __m512& b) {
  const auto x = as<Lanes<float>>(a), y = as<Lanes<float>>(b);
  return each<__m512, float>([&](size_t i) { return mask >> i & 1 ? y[i] : x[i]; });
}
RF_INLINE __m512 mm512_setzero_ps() { return __m512{}; }
RF_INLINE __m512i mm512_setzero_si512() { return __m512i{}; }
RF_INLINE __m512 mm512_set1_ps(float x) { return __m512{} + x; }
RF_INLINE __m512i mm512_set1_epi32(int32_t x) { return as<__m512i>(Integers{} + static_cast<uint32_t>(x)); }
RF_INLINE __m512i mm512_set1_epi16(int16_t x) { return each<__m512i, int16_t>([&](size_t) { return x; }); }
RF_INLINE __m512 mm512_load_ps(const void* p) { return read<__m512>(aligned(p)); }
RF_INLINE __m512 mm512_loadu_ps(const void* p) { return read<__m512>(p); }
RF_INLINE __m512i mm512_load_si512(const void* p) { return read<__m512i>(aligned(p)); }
RF_INLINE __m512i mm512_loadu_si512(const void* p) { return read<__m512i>(p); }
RF_INLINE void mm512_store_ps(void* p, const __m512& a) { std::memcpy(aligned(p), &a, sizeof(a)); }
RF_INLINE void mm512_storeu_ps(void* p, const __m512& a) { std::memcpy(p, &a, sizeof(a)); }
RF_INLINE void mm512_stream_ps(void* p, const __m512& a) { std::memcpy(aligned(p), &a, sizeof(a)); }
RF_INLINE void mm512_storeu_si512(void* p, const __m512i& a) { std::memcpy(p, &a, sizeof(a)); }
RF_INLINE void mm512_stream_si512(void* p, const __m512i& a) { std::memcpy(aligned(p), &a, sizeof(a)); }
RF_INLINE __m512 mm512_maskz_loadu_ps(__mmask16 mask, const void* p) { return load_masked<__m512, float>(mask, p); }
RF_INLINE __m512i mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  return load_masked<__m512i, uint16_t>(mask, p);
}
RF_INLINE __m256i mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  return load_masked<__m256i, uint16_t>(mask, p);
}
RF_INLINE void mm512_mask_storeu_ps(void* p, __mmask16 mask, const __m512& a) { store_masked<float>(p, mask, a); }
RF_INLINE void mm256_mask_storeu_epi16(void* p, __mmask16 mask, const __m256i& a) {
  store_masked<uint16_t>(p, mask, a);
}
RF_INLINE __m512 mm512_castsi512_ps(const __m512i& a) { return as<__m512>(a); }
RF_INLINE __m512i mm512_castps_si512(const __m512& a) { return as<__m512i>(a); }
RF_INLINE __m512d mm512_castps_pd(const __m512& a) { return as<__m512d>(a); }
RF_INLINE __m512 mm512_castpd_ps(const __m512d& a) { return as<__m512>(a); }
RF_INLINE float mm512_cvtss_f32(const __m512& a) { return as<Lanes<float>>(a)[0]; }
RF_INLINE __m256i mm512_castsi512_si256(const __m512i& a) { return as<std::array<__m256i, 2>>(a)[0]; }
RF_INLINE __m512i mm512_castsi256_si512(const __m256i& a) { return as<__m512i>(std::array<__m256i, 2>{a, a}); }
RF_INLINE __m512 mm512_shuffle_f32x4(const __m512& a, const __m512& b, int order) { return shuffle(a, b, order); }
RF_INLINE __m512i mm512_shuffle_i32x4(const __m512i& a, const __m512i& b, int order) { return shuffle(a, b, order); }
RF_INLINE __m512 mm512_unpacklo_ps(const __m512& a, const __m512& b) { return unpack<float, false>(a, b); }
RF_INLINE __m512 mm512_unpackhi_ps(const __m512& a, const __m512& b) { return unpack<float, true>(a, b); }
RF_INLINE __m512d mm512_unpacklo_pd(const __m512d& a, const __m512d& b) { return unpack<double, false>(a, b); }
RF_INLINE __m512d mm512_unpackhi_pd(const __m512d& a, const __m512d& b) { return unpack<double, true>(a, b); }
RF_INLINE __m512i mm512_unpacklo_epi32(const __m512i& a, const __m512i& b) { return unpack<int32_t, false>(a, b); }
RF_INLINE __m512i mm512_unpackhi_epi32(const __m512i& a, const __m512i& b) { return unpack<int32_t, true>(a, b); }
RF_INLINE __m512i mm512_unpacklo_epi64(const __m512i& a, const __m512i& b) { return unpack<int64_t, false>(a, b); }
RF_INLINE __m512i mm512_unpackhi_epi64(const __m512i& a, const __m512i& b) { return unpack<int64_t, true>(a, b); }
RF_INLINE __m512 mm512_dpbf16_ps(const __m512& sum, const __m512bh& a, const __m512bh& b) { return dot(sum, a, b); }
RF_INLINE __m512 mm512_maskz_compress_ps(__mmask16 mask, const __m512& a) { return compress(mask, a); }
RF_INLINE __m512i mm512_inserti64x4(const __m512i& a, const __m256i& b, int upper) {
  auto halves = as<std::array<__m256i, 2>>(a);
  halves[upper] = b;
  return as<__m512i>(halves);
}
RF_INLINE __m256i mm512_maskz_extracti64x4_epi64(__mmask8 mask, const __m512i& a, int upper) {
  const auto half = as<std::array<__m256i, 2>>(a)[upper];
  return load_masked<__m256i, uint64_t>(mask, &half);
}
RF_INLINE __m512i mm512_cvtepu16_epi32(const __m256i& a) {
  const auto x = as<Half<uint16_t>>(a);
  return each<__m512i, uint32_t>([&](size_t i) { return x[i]; });
}
RF_INLINE __m256bh mm512_cvtneps_pbh(const __m512& a) {
  const auto x = as<Lanes<float>>(a);
  return each<__m256bh, uint16_t>([&](size_t i) { return narrowed(x[i]); });
}
RF_INLINE __m512bh mm512_cvtne2ps_pbh(const __m512& high, const __m512& low) {
  return as<__m512bh>(std::array<__m256bh, 2>{mm512_cvtneps_pbh(low), mm512_cvtneps_pbh(high)});
}
RF_INLINE __m512i mm512_permutexvar_epi16(const __m512i& order, const __m512i& a) {
  const auto from = as<Lanes<uint16_t>>(order), x = as<Lanes<uint16_t>>(a);
  return each<__m512i, uint16_t>([&](size_t i) { return x[from[i] & 31]; });
}
RF_INLINE __m512 mm512_mask_i32gather_ps(
    const __m512& a, __mmask16 mask, const __m512i& index, const void* p, int scale) {
  const auto x = as<Lanes<float>>(a);
  const auto at = as<Lanes<int32_t>>(index);
  return each<__m512, float>([&](size_t i) {
    return mask >> i & 1 ? read<float>(static_cast<const char*>(p) + int64_t{at[i]} * scale) : x[i];
  });
}
RF_INLINE uint32_t mm512_reduce_max_epu32(const __m512i& a) {
  uint32_t most = 0;
  for (const uint32_t x : as<Lanes<uint32_t>>(a)) most = x > most ? x : most;
  return most;
}
RF_INLINE __mmask32 mm512_cmpeq_epi16_mask(const __m512i& a, const __m512i& b) {
  return ask<__mmask32, int16_t>(a, b, [](int16_t x, int16_t y) { return x == y; });
}
RF_INLINE __mmask16 mm512_cmp_ps_mask(const __m512& a, const __m512& b, int predicate) {
  if (predicate != _CMP_UNORD_Q && predicate != _CMP_LT_OQ) std::abort();  // not emulated
  const bool less = predicate == _CMP_LT_OQ;
  return ask<__mmask16, float>(
      a, b, [=](float x, float y) { return less ? std::isless(x, y) : std::isunordered(x, y); });
}
RF_INLINE __mmask16 mm512_fpclass_ps_mask(const __m512& a, int classes) {
  if (classes != 0x99) std::abort();  // not emulated: NaN and infinity alone are
  return ask<__mmask16, float>(a, a, [](float x, float) { return !std::isfinite(x); });
}
template <typename... Values>
RF_INLINE __m512i mm512_set_epi16(Values... values) {
  static_assert(sizeof...(values) == 32);
  const Lanes<int16_t> from = {static_cast<int16_t>(values)...};
  return each<__m512i, int16_t>([&](size_t i) { return from[31 - i]; });
}

}  // namespace resnet_fast::emulated_avx512

#undef RF_INLINE

#undef _mm512_add_ps
#define _mm512_add_ps resnet_fast::emulated_avx512::mm512_add_ps
#undef _mm512_sub_ps
#define _mm512_sub_ps resnet_fast::emulated_avx512::mm512_sub_ps
#undef _mm512_mul_ps
#define _mm512_mul_ps resnet_fast::emulated_avx512::mm512_mul_ps
#undef _mm512_div_ps
#define _mm512_div_ps resnet_fast::emulated_avx512::mm512_div_ps
#undef _mm512_max_ps
#define _mm512_max_ps resnet_fast::emulated_avx512::mm512_max_ps
#undef _mm512_and_si512
#define _mm512_and_si512 resnet_fast::emulated_avx512::mm512_and_si512
#undef _mm512_or_si512
#define _mm512_or_si512 resnet_fast::emulated_avx512::mm512_or_si512
#undef _mm512_max_epi32
#define _mm512_max_epi32 resnet_fast::emulated_avx512::mm512_max_epi32
#undef _mm512_max_epu32
#define _mm512_max_epu32 resnet_fast::emulated_avx512::mm512_max_epu32
#undef _mm512_max_epi16
#define _mm512_max_epi16 resnet_fast::emulated_avx512::mm512_max_epi16
#undef _mm512_abs_ps
#define _mm512_abs_ps resnet_fast::emulated_avx512::mm512_abs_ps
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 resnet_fast::emulated_avx512::mm512_slli_epi32
#undef _mm512_fmadd_ps
#define _mm512_fmadd_ps resnet_fast::emulated_avx512::mm512_fmadd_ps
#undef _mm512_maskz_sub_ps
#define _mm512_maskz_sub_ps resnet_fast::emulated_avx512::mm512_maskz_sub_ps
#undef _mm512_mask_mov_ps
#define _mm512_mask_mov_ps resnet_fast::emulated_avx512::mm512_mask_mov_ps
#undef _mm512_setzero_ps
#define _mm512_setzero_ps resnet_fast::emulated_avx512::mm512_setzero_ps
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 resnet_fast::emulated_avx512::mm512_setzero_si512
#undef _mm512_set1_ps
#define _mm512_set1_ps resnet_fast::emulated_avx512::mm512_set1_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 resnet_fast::emulated_avx512::mm512_set1_epi32
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 resnet_fast::emulated_avx512::mm512_set1_epi16
#undef _mm512_load_ps
#define _mm512_load_ps resnet_fast::emulated_avx512::mm512_load_ps
#undef _mm512_loadu_ps
#define _mm512_loadu_ps resnet_fast::emulated_avx512::mm512_loadu_ps
#undef _mm512_load_si512
#define _mm512_load_si512 resnet_fast::emulated_avx512::mm512_load_si512
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 resnet_fast::emulated_avx512::mm512_loadu_si512
#undef _mm512_store_ps
#define _mm512_store_ps resnet_fast::emulated_avx512::mm512_store_ps
#undef _mm512_storeu_ps
#define _mm512_storeu_ps resnet_fast::emulated_avx512::mm512_storeu_ps
#undef _mm512_stream_ps
#define _mm512_stream_ps resnet_fast::emulated_avx512::mm512_stream_ps
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 resnet_fast::emulated_avx512::mm512_storeu_si512
#undef _mm512_stream_si512
#define _mm512_stream_si512 resnet_fast::emulated_avx512::mm512_stream_si512
#undef _mm512_maskz_loadu_ps
#define _mm512_maskz_loadu_ps resnet_fast::emulated_avx512::mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi16
#define _mm512_maskz_loadu_epi16 resnet_fast::emulated_avx512::mm512_maskz_loadu_epi16
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 resnet_fast::emulated_avx512::mm256_maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#define _mm512_mask_storeu_ps resnet_fast::emulated_avx512::mm512_mask_storeu_ps
#undef _mm256_mask_storeu_epi16
#define _mm256_mask_storeu_epi16 resnet_fast::emulated_avx512::mm256_mask_storeu_epi16
#undef _mm512_castsi512_ps
#define _mm512_castsi512_ps resnet_fast::emulated_avx512::mm512_castsi512_ps
#undef _mm512_castps_si512
#define _mm512_castps_si512 resnet_fast::emulated_avx512::mm512_castps_si512
#undef _mm512_castps_pd
#define _mm512_castps_pd resnet_fast::emulated_avx512::mm512_castps_pd
#undef _mm512_castpd_ps
#define _mm512_castpd_ps resnet_fast::emulated_avx512::mm512_castpd_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 resnet_fast::emulated_avx512::mm512_cvtss_f32
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 resnet_fast::emulated_avx512::mm512_castsi512_si256
#undef _mm512_castsi256_si512
#define _mm512_castsi256_si512 resnet_fast::emulated_avx512::mm512_castsi256_si512
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4 resnet_fast::emulated_avx512::mm512_shuffle_f32x4
#undef _mm512_shuffle_i32x4
#define _mm512_shuffle_i32x4 resnet_fast::emulated_avx512::mm512_shuffle_i32x4
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps resnet_fast::emulated_avx512::mm512_unpacklo_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps resnet_fast::emulated_avx512::mm512_unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd resnet_fast::emulated_avx512::mm512_unpacklo_pd
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd resnet_fast::emulated_avx512::mm512_unpackhi_pd
#undef _mm512_unpacklo_epi32
#define _mm512_unpacklo_epi32 resnet_fast::emulated_avx512::mm512_unpacklo_epi32
#undef _mm512_unpackhi_epi32
#define _mm512_unpackhi_epi32 resnet_fast::emulated_avx512::mm512_unpackhi_epi32
#undef _mm512_unpacklo_epi64
#define _mm512_unpacklo_epi64 resnet_fast::emulated_avx512::mm512_unpacklo_epi64
#undef _mm512_unpackhi_epi64
#define _mm512_unpackhi_epi64 resnet_fast::emulated_avx512::mm512_unpackhi_epi64
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps resnet_fast::emulated_avx512::mm512_dpbf16_ps
#undef _mm512_maskz_compress_ps
#define _mm512_maskz_compress_ps resnet_fast::emulated_avx512::mm512_maskz_compress_ps
#undef _mm512_inserti64x4
#define _mm512_inserti64x4 resnet_fast::emulated_avx512::mm512_inserti64x4
#undef _mm512_maskz_extracti64x4_epi64
#define _mm512_maskz_extracti64x4_epi64 resnet_fast::emulated_avx512::mm512_maskz_extracti64x4_epi64
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 resnet_fast::emulated_avx512::mm512_cvtepu16_epi32
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh resnet_fast::emulated_avx512::mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh resnet_fast::emulated_avx512::mm512_cvtne2ps_pbh
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 resnet_fast::emulated_avx512::mm512_permutexvar_epi16
#undef _mm512_mask_i32gather_ps
#define _mm512_mask_i32gather_ps resnet_fast::emulated_avx512::mm512_mask_i32gather_ps
#undef _mm512_reduce_max_epu32
#define _mm512_reduce_max_epu32 resnet_fast::emulated_avx512::mm512_reduce_max_epu32
#undef _mm512_cmpeq_epi16_mask
#define _mm512_cmpeq_epi16_mask resnet_fast::emulated_avx512::mm512_cmpeq_epi16_mask
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask resnet_fast::emulated_avx512::mm512_cmp_ps_mask
#undef _mm512_fpclass_ps_mask
#define _mm512_fpclass_ps_mask resnet_fast::emulated_avx512::mm512_fpclass_ps_mask
#undef _mm512_set_epi16
#define _mm512_set_epi16 resnet_fast::emulated_avx512::mm512_set_epi16
