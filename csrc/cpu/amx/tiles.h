// The products that every convolution here is made of: two tiles of rows of a by two of columns of b, summed up in four.
// Only for files that are compiled for AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "amx.h"

namespace resnet_fast::cpu::amx {
namespace {

// Intrinsics take tiles by number, of which those up to 5 may be sums.
template <int tile>
[[gnu::always_inline]] inline void load_tile(const float* from, int64_t bytes) {
  if constexpr (tile == 0) _tile_loadd(0, from, bytes);
  if constexpr (tile == 1) _tile_loadd(1, from, bytes);
  if constexpr (tile == 2) _tile_loadd(2, from, bytes);
  if constexpr (tile == 3) _tile_loadd(3, from, bytes);
  if constexpr (tile == 4) _tile_loadd(4, from, bytes);
  if constexpr (tile == 5) _tile_loadd(5, from, bytes);
}

template <int tile>
[[gnu::always_inline]] inline void store_tile(float* to, int64_t bytes) {
  if constexpr (tile == 0) _tile_stored(0, to, bytes);
  if constexpr (tile == 1) _tile_stored(1, to, bytes);
  if constexpr (tile == 2) _tile_stored(2, to, bytes);
  if constexpr (tile == 3) _tile_stored(3, to, bytes);
  if constexpr (tile == 4) _tile_stored(4, to, bytes);
  if constexpr (tile == 5) _tile_stored(5, to, bytes);
}

// f<0>() and on, for four or six.
template <int tiles = 4, typename F>
[[gnu::always_inline]] inline void each_tile(const F& f) {
  f.template operator()<0>();
  f.template operator()<1>();
  f.template operator()<2>();
  f.template operator()<3>();
  if constexpr (tiles == 6) {
    f.template operator()<4>();
    f.template operator()<5>();
  }
}

// Tiles 0 to 3 are sums, 4 and 5 take the rows of a, `a_bytes` apart, 6 and 7 those of b, which lie one behind another.
// before<tile>() is called just before the product of a sum's tile, after() behind each.
template <typename Before, typename After>
[[gnu::always_inline]] inline void multiply(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, const uint16_t* b0, const uint16_t* b1,
    const Before& before, const After& after) {
  _tile_loadd(6, b0, 64);
  _tile_loadd(4, a0, a_bytes);
  before.template operator()<0>();
  _tile_dpbf16ps(0, 4, 6);
  after();
  _tile_loadd(7, b1, 64);
  before.template operator()<1>();
  _tile_dpbf16ps(1, 4, 7);
  after();
  _tile_loadd(5, a1, a_bytes);
  before.template operator()<2>();
  _tile_dpbf16ps(2, 5, 6);
  after();
  before.template operator()<3>();
  _tile_dpbf16ps(3, 5, 7);
  after();
}

inline void multiply(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, const uint16_t* b0, const uint16_t* b1) {
  multiply(a0, a1, a_bytes, b0, b1, []<int>() {}, [] {});
}

// The products of the tiles that are loaded, and the next weights; `half`: of the first half they are done.
inline void multiply_then_weights(const uint16_t* weight, bool half) {
  if (!half) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(2, 5, 6);
  }
  _tile_loadd(6, weight, 64);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(7, weight + kBlockValues / 2, 64);
}

inline void multiply_then_pixels(const uint16_t* a0, const uint16_t* a1, int64_t a_bytes) {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_loadd(4, a0, a_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
  _tile_loadd(5, a1, a_bytes);
}

// The six products of planes (i, j), i + j <= 2, the smallest first. Of the tiles that change next, the first is free
// after two of four products, so that its load is hidden by the other two.
template <typename After>
[[gnu::always_inline]] inline void multiply_planes(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, int64_t plane, const uint16_t* weight,
    const After& after) {
  const uint16_t *weight0 = weight, *weight1 = weight + kBlockValues, *weight2 = weight + 2 * kBlockValues;
  _tile_loadd(6, weight2, 64);
  _tile_loadd(4, a0, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a1, a_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, weight2 + kBlockValues / 2, 64);
  multiply_then_weights(weight1, true);
  after();
  multiply_then_pixels(a0 + plane, a1 + plane, a_bytes);
  after();
  multiply_then_weights(weight0, false);
  multiply_then_pixels(a0 + 2 * plane, a1 + 2 * plane, a_bytes);
  after();
  multiply_then_pixels(a0, a1, a_bytes);
  after();
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// A block of channels of two tiles of pixels, whose planes are `plane` values apart, by a block of packed weights.
template <int planes, typename Before, typename After>
[[gnu::always_inline]] inline void multiply_block(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, int64_t plane, const uint16_t* weight, const Before& before,
    const After& after) {
  if constexpr (planes == 1) {
    multiply(a0, a1, a_bytes, weight, weight + kBlockValues / 2, before, after);
  } else {
    each_tile(before);
    multiply_planes(a0, a1, a_bytes, plane, weight, after);
  }
}
constexpr int kCalls = 4;  // of after() in it

constexpr int64_t kSums = 1024;  // floats: 32 rows of 32 columns
// A sum begins with a load, from here if from nothing: tiles that are loaded are renamed, one that is zeroed waits for its
// last product.
alignas(64) constexpr float kZeros[kVector] = {};

constexpr int64_t kSumsOffset[] = {0, 16, 512, 528};  // of the tiles 0 to 3
constexpr int64_t kSumBytes = kVector * sizeof(float);  // from row to row

// The sums of the last products leave the tiles, and those that the next are added to come, in rows `bytes` apart; `other`:
// of the second tile of rows. Each tile just before its first product.
struct Exchange {
  float* last;
  const float *one, *other;
  int64_t bytes;

  template <int tile>
  [[gnu::always_inline]] inline void operator()() const {
    store_tile<tile>(last + kSumsOffset[tile], kSumBytes);
    load_tile<tile>((tile < 2 ? one : other) + tile % 2 * 16, bytes);
  }
};

// As zeros where `from` is null.
inline void load_sums(const float* from) {
  each_tile([&]<int tile>() {
    load_tile<tile>(from == nullptr ? kZeros : from + kSumsOffset[tile], from == nullptr ? 0 : kSumBytes);
  });
}

inline void store_sums(float* to) {
  each_tile([&]<int tile>() { store_tile<tile>(to + kSumsOffset[tile], kSumBytes); });
}

}  // namespace
}  // namespace resnet_fast::cpu::amx
