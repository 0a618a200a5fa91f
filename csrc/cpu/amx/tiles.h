// The product that every convolution here is made of. Only for files that are compiled for AMX.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace resnet_fast::cpu::amx {
namespace {

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

}  // namespace
}  // namespace resnet_fast::cpu::amx
