// Implicit GEMM: two tiles of pixels by 32 output channels, summed up over taps and input channels in four tiles, which
// bias, residual and ReLU are applied to before they leave the first cache level. No im2col: a tap is an offset.
//
// A core multiplies 4 KiB of tiles in the time that 3 KiB take from the second cache level, so half of them must come
// from the first: taps are innermost, where a tap reads what the last one has read; and sums over many channels of single
// taps are taken in chunks, each for several output blocks, with the sums put aside in between.
#include "amx.h"
#include "tiles.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kTogether = 3;  // output blocks, or pairs of tiles, whose sums are taken in turn
constexpr int64_t kSlots = kTogether + 2;  // and those whose epilogue is not done
constexpr int64_t kSums = 1024;            // floats: two tiles of pixels by 32 channels
constexpr int64_t kSumsOffset[] = {0, 16, 512, 528};
static_assert(kScratchFloats == kSlots * kSums);

// Tiles 0 to 3 are sums [pixels][channels], 4 and 5 pixels, 6 and 7 weights.

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
inline void multiply_planes(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, int64_t plane, const uint16_t* weight) {
  const uint16_t *weight0 = weight, *weight1 = weight + kBlockValues, *weight2 = weight + 2 * kBlockValues;
  _tile_loadd(6, weight2, 64);
  _tile_loadd(4, a0, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a1, a_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, weight2 + kBlockValues / 2, 64);
  multiply_then_weights(weight1, true);
  multiply_then_pixels(a0 + plane, a1 + plane, a_bytes);
  multiply_then_weights(weight0, false);
  multiply_then_pixels(a0 + 2 * plane, a1 + 2 * plane, a_bytes);
  multiply_then_pixels(a0, a1, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
}

// A sum leaves its tile, if there is one, and the next begins: from an earlier chunk's, or from zero. A macro because
// the intrinsics want the tile's number in letters.
#define RF_STORE_SUM(tile) \
  if (summed_.sums != nullptr) _tile_stored(tile, summed_.sums + kSumsOffset[tile], 128)
#define RF_START_SUM(tile)                                 \
  RF_STORE_SUM(tile);                                      \
  if (sums != nullptr) {                                   \
    _tile_loadd(tile, sums + kSumsOffset[tile], 128);      \
  } else {                                                 \
    _tile_zero(tile);                                      \
  }

template <int planes, bool residual, bool relu_after>
class Kernel {
 public:
  Kernel(const ConvArgs& args, float* scratch) : args_(args), scratch_(scratch) {}

  void run(const Tile* tile, int64_t tiles, int64_t begin, int64_t end) {
    const int64_t pairs = (tiles + 1) / 2, blocks = end - begin;
    const int64_t outer = args_.pixels_first ? pairs : blocks, inner = args_.pixels_first ? blocks : pairs;
    const int64_t chunks = (args_.steps + args_.chunk - 1) / args_.chunk, together = chunks == 1 ? 1 : kTogether;
    for (int64_t i = 0; i < outer; ++i) {
      if (!args_.pixels_first && i + 1 < blocks) fetch_weights(begin + i + 1, pairs);
      for (int64_t first = 0; first < inner; first += together) {
        const int64_t behind = first + together < inner ? first + together : inner;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          for (int64_t j = first; j < behind; ++j) {
            const int64_t number = 2 * (args_.pixels_first ? i : j), block = begin + (args_.pixels_first ? j : i);
            const Tile *one = tile + number, *other = number + 1 < tiles ? one + 1 : one;
            float* sums = scratch_ + (slot_ + j - first) % kSlots * kSums;
            const int64_t rows = one == other ? kTileRows : 2 * kTileRows;
            sum_up({one, other, sums, block, 0, chunk + 1 < chunks ? 0 : rows}, chunk);
          }
        }
        slot_ = (slot_ + behind - first) % kSlots;
      }
    }
    finish_rows(2 * kTileRows);
    RF_STORE_SUM(0);
    RF_STORE_SUM(1);
    RF_STORE_SUM(2);
    RF_STORE_SUM(3);
    waiting_ = summed_;
    finish_rows(2 * kTileRows);
  }

 private:
  // Sums of two tiles of pixels and an output block: of its `rows`, which have no epilogue yet, those from `next` on.
  struct Unit {
    const Tile *one, *other;
    float* sums;
    int64_t block, next, rows;
  };

  // The sums stay in their tiles until the next unit, each, takes them; their epilogue is done between its products.
  void sum_up(const Unit& unit, int64_t chunk) {
    const uint16_t* x = args_.x + unit.block / args_.outputs_per_group * args_.blocks * args_.x_block;
    const uint16_t *a0 = x + unit.one->x, *a1 = x + unit.other->x;
    const int64_t begin = chunk * args_.chunk, a_bytes = args_.x_row * 2, plane = args_.x_plane;
    const int64_t end = begin + args_.chunk < args_.steps ? begin + args_.chunk : args_.steps;
    const uint16_t* weight = args_.weight + (unit.block * args_.steps + begin) * planes * kBlockValues;
    finish_rows(2 * kTileRows);  // whatever the last unit had no products for
    const int64_t offset = args_.offsets[begin];
    const float* sums = chunk == 0 ? nullptr : unit.sums;
    if constexpr (planes == 3) {
      RF_START_SUM(0);
      RF_START_SUM(1);
      RF_START_SUM(2);
      RF_START_SUM(3);
      multiply_planes(a0 + offset, a1 + offset, a_bytes, plane, weight);
    } else {
      _tile_loadd(6, weight, 64);
      _tile_loadd(4, a0 + offset, a_bytes);
      RF_START_SUM(0);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, weight + kBlockValues / 2, 64);
      RF_START_SUM(1);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a1 + offset, a_bytes);
      RF_START_SUM(2);
      _tile_dpbf16ps(2, 5, 6);
      RF_START_SUM(3);
      _tile_dpbf16ps(3, 5, 7);
    }
    waiting_ = summed_;
    summed_ = unit;
    const int64_t left = end - begin - 1, even = left > 0 ? (2 * kTileRows + left - 1) / left : 0;
    const int64_t rows = planes == 1 && even < 8 ? 8 : even;
    for (int64_t step = begin + 1; step < end; ++step) {
      weight += planes * kBlockValues;
      const int64_t next = args_.offsets[step];
      if constexpr (planes == 3) {
        multiply_planes(a0 + next, a1 + next, a_bytes, plane, weight);
      } else {
        multiply(a0 + next, a1 + next, a_bytes, weight, weight + kBlockValues / 2);
      }
      finish_rows(rows);
      fetch_ahead();
    }
  }

  // From now on, step by step, fetch an output block's weights, which come from memory, while the one before it passes by
  // all pairs: by the loads of tiles alone a core has too few lines under way.
  void fetch_weights(int64_t block, int64_t pairs) {
    const int64_t values = args_.steps * planes * kBlockValues, steps = pairs * args_.steps;
    ahead_ = {args_.weight + block * values, args_.weight + (block + 1) * values, (values / kVector + steps - 1) / steps};
  }

  void fetch_ahead() {
    for (int64_t n = 0; n < ahead_.lines && ahead_.next < ahead_.end; ++n, ahead_.next += kVector) {
      _mm_prefetch(reinterpret_cast<const char*>(ahead_.next), _MM_HINT_T1);
    }
  }

  // So many of the waiting rows, as far as there are any.
  void finish_rows(int64_t rows) {
    const int64_t begin = waiting_.next;
    if (begin == waiting_.rows) return;
    const int64_t end = begin + rows < waiting_.rows ? begin + rows : waiting_.rows;
    waiting_.next = end;
    if (begin < kTileRows) finish_part(*waiting_.one, waiting_.sums, begin, end < kTileRows ? end : kTileRows);
    if (end > kTileRows) {
      finish_part(*waiting_.other, waiting_.sums + 512, begin > kTileRows ? begin - kTileRows : 0, end - kTileRows);
    }
  }

  void finish_part(const Tile& tile, const float* sums, int64_t begin, int64_t end) const {
    const int64_t y_plane = args_.y_plane, first = waiting_.block * args_.y_block;
    uint16_t* const y = args_.y + first;
    const uint16_t* const r = residual ? args_.residual + first : nullptr;
    const float* bias = args_.bias + waiting_.block * kVector;
    const float* scale = args_.scale == nullptr ? nullptr : args_.scale + waiting_.block * kVector;
    const __m512 one = _mm512_set1_ps(1.0f), bias0 = _mm512_loadu_ps(bias), bias1 = _mm512_loadu_ps(bias + 16);
    const __m512 scale0 = scale == nullptr ? one : _mm512_loadu_ps(scale);
    const __m512 scale1 = scale == nullptr ? one : _mm512_loadu_ps(scale + 16);
    const auto finish_row = [&](int64_t row) {
      const int64_t at = tile.y[row];
      finish(sums + row * kVector, y + at, residual ? r + at : nullptr, y_plane, scale0, scale1, bias0, bias1);
    };
    const uint32_t wanted = tile.rows;
    if (wanted == 0xffff) {
      for (int64_t row = begin; row < end; ++row) finish_row(row);
    } else {
      for (int64_t row = begin; row < end; ++row) {
        if (wanted >> row & 1) finish_row(row);
      }
    }
  }

  static void finish(
      const float* sums, uint16_t* y, const uint16_t* r, int64_t plane, __m512 scale0, __m512 scale1, __m512 bias0,
      __m512 bias1) {
    __m512 first = _mm512_fmadd_ps(_mm512_load_ps(sums), scale0, bias0);
    __m512 second = _mm512_fmadd_ps(_mm512_load_ps(sums + 16), scale1, bias1);
    if constexpr (residual) {
      first = _mm512_add_ps(first, load<planes>(r, plane));
      second = _mm512_add_ps(second, load<planes>(r + 16, plane));
    }
    if constexpr (relu_after) {
      first = relu(first);
      second = relu(second);
    }
    if constexpr (planes == 1) {
      _mm512_storeu_si512(y, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    } else {
      store<planes>(y, plane, first);
      store<planes>(y + 16, plane, second);
    }
  }

  const ConvArgs args_;
  float* const scratch_;
  int64_t slot_ = 0;
  Unit summed_ = {}, waiting_ = {};
  struct {
    const uint16_t *next, *end;
    int64_t lines;  // with every step
  } ahead_ = {};
};

template <int planes, bool residual>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  if (args.relu) {
    Kernel<planes, residual, true>(args, scratch).run(tile, tiles, begin, end);
  } else {
    Kernel<planes, residual, false>(args, scratch).run(tile, tiles, begin, end);
  }
}

template <int planes>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  if (args.residual != nullptr) {
    run<planes, true>(args, tile, tiles, begin, end, scratch);
  } else {
    run<planes, false>(args, tile, tiles, begin, end, scratch);
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
