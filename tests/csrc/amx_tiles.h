// AMX's tiles in AVX-512, in place of the compiler's intrinsics: included before the sources of csrc/cpu/amx, which are
// then compiled without the AMX flags. Never part of a build that is installed: see `emulate_amx` in setup.py.
//
// What Intel's manual says (Software Developer's Manual, volume 2, TDPBF16PS and LDTILECFG), bit by bit: a tile's product
// is summed up from zero in two chains of fused multiply-adds, one of the pairs' first numbers and one of their second;
// the chains are added to one another and that to the sum. Rounded to nearest even, denormals zero on the way in and out,
// MXCSR neither read nor changed. What raises #UD aborts here. Tiles are 16 rows of 64 bytes or not configured, as the
// kernels have them; other shapes abort as well.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace resnet_fast::emulated_amx {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct State {
  alignas(64) uint8_t tile[kTiles][kRows][kRowBytes];
  bool configured[kTiles];
};
inline thread_local State state = {};

[[noreturn]] inline void fault(const char* what) {
  std::fprintf(stderr, "emulated AMX: #UD: %s\n", what);
  std::abort();
}

inline auto& use(int tile) {
  if (tile < 0 || tile >= kTiles || !state.configured[tile]) fault("the tile is not configured");
  return state.tile[tile];
}

inline void release() { state = {}; }

inline void load_config(const void* memory) {
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t column_bytes[16];
    uint8_t rows[16];
  } config;
  static_assert(sizeof(config) == 64);
  std::memcpy(&config, memory, sizeof(config));
  release();
  if (config.palette == 0) return;
  if (config.palette != 1 || config.start_row != 0) fault("the palette is not 1, or the start row not 0");
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = config.rows[tile], bytes = config.column_bytes[tile];
    const bool whole = rows == kRows && bytes == kRowBytes && tile < kTiles;
    if (!whole && (rows != 0 || bytes != 0)) fault("a tile's shape is not 16 rows of 64 bytes");
    if (whole) state.configured[tile] = true;
  }
}

inline void zero(int tile) { std::memset(use(tile), 0, sizeof(use(tile))); }

inline void load(int tile, const void* memory, int64_t stride) {
  auto& rows = use(tile);
  for (int i = 0; i < kRows; ++i) std::memcpy(rows[i], static_cast<const char*>(memory) + i * stride, kRowBytes);
}

inline void store(int tile, void* memory, int64_t stride) {
  const auto& rows = use(tile);
  for (int i = 0; i < kRows; ++i) std::memcpy(static_cast<char*>(memory) + i * stride, rows[i], kRowBytes);
}

// The first numbers of 16 pairs of bfloat16s, and the second.
inline __m512 first(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// Not inlined, so that nothing of it is moved out from between the two writes of MXCSR.
__attribute__((noinline)) inline void add_product(
    uint8_t (&sum)[kRows][kRowBytes], const uint8_t (&a)[kRows][kRowBytes], const uint8_t (&b)[kRows][kRowBytes]) {
  constexpr int kTogether = 4;  // rows, whose chains hide each other's latency
  alignas(64) float numbers[2][kRows][kRows];
  for (int m = 0; m < kRows; ++m) {
    const __m512i pairs = _mm512_load_si512(a[m]);
    _mm512_store_ps(numbers[0][m], first(pairs));
    _mm512_store_ps(numbers[1][m], second(pairs));
  }
  for (int m = 0; m < kRows; m += kTogether) {
    __m512 chain[2][kTogether];
    for (int i = 0; i < kTogether; ++i) chain[0][i] = chain[1][i] = _mm512_setzero_ps();
    for (int k = 0; k < kRows; ++k) {
      const __m512i pairs = _mm512_load_si512(b[k]);
      for (int i = 0; i < kTogether; ++i) {
        chain[0][i] = _mm512_fmadd_ps(_mm512_set1_ps(numbers[0][m + i][k]), first(pairs), chain[0][i]);
        chain[1][i] = _mm512_fmadd_ps(_mm512_set1_ps(numbers[1][m + i][k]), second(pairs), chain[1][i]);
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      float* row = reinterpret_cast<float*>(sum[m + i]);
      _mm512_store_ps(row, _mm512_add_ps(_mm512_load_ps(row), _mm512_add_ps(chain[0][i], chain[1][i])));
    }
  }
}

inline void multiply(int sum, int a, int b) {
  if (sum == a || sum == b || a == b) fault("two operands of a product are one tile");
  constexpr unsigned kMaskedNearest = 0x1f80, kFlushToZero = 0x8000, kDenormalsAreZero = 0x0040;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMaskedNearest | kFlushToZero | kDenormalsAreZero);
  add_product(use(sum), use(a), use(b));
  _mm_setcsr(before);
}

}  // namespace resnet_fast::emulated_amx

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) resnet_fast::emulated_amx::load_config(config)
#define _tile_release() resnet_fast::emulated_amx::release()
#define _tile_zero(tile) resnet_fast::emulated_amx::zero(tile)
#define _tile_loadd(tile, memory, stride) resnet_fast::emulated_amx::load(tile, memory, stride)
#define _tile_stored(tile, memory, stride) resnet_fast::emulated_amx::store(tile, memory, stride)
#define _tile_dpbf16ps(sum, a, b) resnet_fast::emulated_amx::multiply(sum, a, b)
