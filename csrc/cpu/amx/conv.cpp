// Implicit GEMM: two tiles of pixels by 32 output channels, summed up over taps and input channels in four tiles, which
// bias, residual and ReLU are applied to before they leave the first cache level. No im2col: a tap is an offset.
#include "amx.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

// Tiles 0 to 3 are sums [pixels][channels], 4 and 5 pixels, 6 and 7 weights.
inline void multiply(const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, const uint16_t* weight) {
  _tile_loadd(6, weight, 64);
  _tile_loadd(4, a0, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(7, weight + kBlockValues / 2, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(5, a1, a_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

inline void load_weight(const uint16_t* weight) {
  _tile_loadd(6, weight, 64);
  _tile_loadd(7, weight + kBlockValues / 2, 64);
}

inline void load_pixels(const uint16_t* a0, const uint16_t* a1, int64_t a_bytes) {
  _tile_loadd(4, a0, a_bytes);
  _tile_loadd(5, a1, a_bytes);
}

inline void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// The five products of planes (i, j), 0 < i + j <= 2, that correct high * high to float32.
inline void multiply_corrections(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, int64_t plane, const uint16_t* weight) {
  load_weight(weight);
  load_pixels(a0 + 2 * plane, a1 + 2 * plane, a_bytes);
  multiply_loaded();
  load_pixels(a0 + plane, a1 + plane, a_bytes);
  multiply_loaded();
  load_weight(weight + kBlockValues);
  multiply_loaded();
  load_pixels(a0, a1, a_bytes);
  multiply_loaded();
  load_weight(weight + 2 * kBlockValues);
  multiply_loaded();
}

template <int planes>
inline void sum_up(const ConvArgs& args, const uint16_t* a0, const uint16_t* a1, const uint16_t* weight) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t bytes = args.x_row * 2;
  if constexpr (planes == 3) {
    // First, while the sums are small: added to sums of full size, each would cost a rounding error of full size.
    const uint16_t* w = weight;
    for (int64_t tap = 0; tap < args.n_taps; ++tap) {
      const uint16_t *p0 = a0 + args.taps[tap], *p1 = a1 + args.taps[tap];
      for (int64_t block = 0; block < args.blocks; ++block, w += planes * kBlockValues) {
        multiply_corrections(p0, p1, bytes, args.x_plane, w);
        p0 += args.x_block;
        p1 += args.x_block;
      }
    }
  }
  for (int64_t tap = 0; tap < args.n_taps; ++tap) {
    const uint16_t *p0 = a0 + args.taps[tap], *p1 = a1 + args.taps[tap];
    for (int64_t block = 0; block < args.blocks; ++block, weight += planes * kBlockValues) {
      multiply(p0, p1, bytes, weight);
      p0 += args.x_block;
      p1 += args.x_block;
    }
  }
}

template <int planes>
inline void finish_row(const ConvArgs& args, const float* sums, __m512 bias0, __m512 bias1, int64_t at) {
  __m512 first = _mm512_add_ps(_mm512_load_ps(sums), bias0);
  __m512 second = _mm512_add_ps(_mm512_load_ps(sums + 16), bias1);
  if (args.residual != nullptr) {
    first = _mm512_add_ps(first, load<planes>(args.residual + at, args.y_plane));
    second = _mm512_add_ps(second, load<planes>(args.residual + at + 16, args.y_plane));
  }
  if (args.relu) {
    first = relu(first);
    second = relu(second);
  }
  if constexpr (planes == 1) {
    _mm512_storeu_si512(args.y + at, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
  } else {
    store<planes>(args.y + at, args.y_plane, first);
    store<planes>(args.y + at + 16, args.y_plane, second);
  }
}

template <int planes>
inline void finish(const ConvArgs& args, const Tile& tile, const float* sums, const float* bias, int64_t block) {
  const __m512 bias0 = _mm512_loadu_ps(bias), bias1 = _mm512_loadu_ps(bias + 16);
  const int64_t at = tile.y + block * args.y_block;
  if (tile.rows == 0xffff) {
    for (int64_t row = 0; row < kTileRows; ++row) {
      finish_row<planes>(args, sums + row * kVector, bias0, bias1, at + row * args.y_row);
    }
  } else {
    for (uint32_t rows = tile.rows; rows != 0; rows &= rows - 1) {
      const int64_t row = __builtin_ctz(rows);
      finish_row<planes>(args, sums + row * kVector, bias0, bias1, at + row * args.y_row);
    }
  }
}

template <int planes>
inline void pair(const ConvArgs& args, const Tile& one, const Tile& other, int64_t block, float* sums) {
  const int64_t first_input = block / args.outputs_per_group * args.blocks * args.x_block;
  const uint16_t* weight = args.weight + block * args.n_taps * args.blocks * planes * kBlockValues;
  sum_up<planes>(args, args.x + first_input + one.x, args.x + first_input + other.x, weight);
  _tile_stored(0, sums, 128);
  _tile_stored(1, sums + 16, 128);
  _tile_stored(2, sums + 512, 128);
  _tile_stored(3, sums + 528, 128);
  const float* bias = args.bias + block * kVector;
  finish<planes>(args, one, sums, bias, block);
  if (&other != &one) finish<planes>(args, other, sums + 512, bias, block);
}

constexpr int64_t kFirstCacheBytes = 24 * 1024;  // of 48 KiB, for the weights of one output block

template <int planes>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  const int64_t weight_bytes = args.n_taps * args.blocks * planes * kBlockValues * 2;
  int64_t turn = 0;  // two scratches, so that a product need not wait for the epilogue before it
  const auto at = [&](int64_t number, int64_t block) {
    const Tile& one = tile[number];
    pair<planes>(args, one, number + 1 < tiles ? tile[number + 1] : one, block, scratch + (turn ^= 1) * 1024);
  };
  if (weight_bytes <= kFirstCacheBytes) {
    for (int64_t block = begin; block < end; ++block) {
      for (int64_t number = 0; number < tiles; number += 2) at(number, block);
    }
  } else {
    for (int64_t number = 0; number < tiles; number += 2) {
      for (int64_t block = begin; block < end; ++block) at(number, block);
    }
  }
}

struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t column_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace

void configure_tiles() {
  alignas(64) TileConfig config = {};
  config.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    config.column_bytes[tile] = 64;
    config.rows[tile] = kTileRows;
  }
  asm volatile("" : : "r"(&config) : "memory");  // GCC believes that ldtilecfg reads 8 bytes
  _tile_loadconfig(&config);
}

void release_tiles() { _tile_release(); }

void conv(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  args.planes == 3 ? run<3>(args, tile, tiles, begin, end, scratch) : run<1>(args, tile, tiles, begin, end, scratch);
}

}  // namespace resnet_fast::cpu::amx
