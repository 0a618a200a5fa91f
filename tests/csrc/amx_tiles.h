// AMX's tiles in AVX2, in place of the compiler's intrinsics: included before the sources of csrc/cpu/amx, which are
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

// A tile's pairs of bfloat16s as their first numbers and their second.
struct Numbers {
  explicit Numbers(const uint8_t (&tile)[kRows][kRowBytes]) {
    uint32_t pairs[kRows][kRows];
    std::memcpy(pairs, tile, sizeof(pairs));
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < kRows; ++i) {
        const uint32_t both[2] = {pairs[row][i] << 16, pairs[row][i] & 0xffff0000};
        std::memcpy(&of[0][row][i], &both[0], sizeof(float));
        std::memcpy(&of[1][row][i], &both[1], sizeof(float));
      }
    }
  }
  alignas(64) float of[2][kRows][kRows];
};

// Not inlined, so that nothing of it is moved out from between the two writes of MXCSR.
__attribute__((noinline)) inline void add_product(
    uint8_t (&sum)[kRows][kRowBytes], const uint8_t (&a)[kRows][kRowBytes], const uint8_t (&b)[kRows][kRowBytes]) {
  constexpr int kTogether = 2, kVectors = 2, kVector = 8;  // rows, whose chains hide each other's latency, and halves
  const Numbers left(a), right(b);
  for (int m = 0; m < kRows; m += kTogether) {
    __m256 chain[2][kTogether][kVectors] = {};
    for (int k = 0; k < kRows; ++k) {
      for (int which = 0; which < 2; ++which) {
        for (int i = 0; i < kTogether; ++i) {
          const __m256 factor = _mm256_set1_ps(left.of[which][m + i][k]);
          for (int v = 0; v < kVectors; ++v) {
            const __m256 values = _mm256_load_ps(right.of[which][k] + v * kVector);
            chain[which][i][v] = _mm256_fmadd_ps(factor, values, chain[which][i][v]);
          }
        }
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* row = reinterpret_cast<float*>(sum[m + i]) + v * kVector;
        _mm256_store_ps(row, _mm256_add_ps(_mm256_load_ps(row), _mm256_add_ps(chain[0][i][v], chain[1][i][v])));
      }
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
