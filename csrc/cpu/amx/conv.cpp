// Implicit GEMM: two tiles of pixels by 32 output channels, summed up over taps and input channels in four tiles, which
// bias, residual and ReLU are applied to before they leave the first cache level. No im2col: a tap is an offset.
//
// A core multiplies 4 KiB of tiles in the time that 3 KiB take from the second cache level, so half of them must come
// from the first: taps are innermost, where a tap reads what the last one has read; and sums are taken in chunks, each for
// several pairs of tiles, with the sums put aside in between.
#include "amx.h"
#include "tiles.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

constexpr int64_t kTogether = 3;  // pairs of tiles whose sums are taken in turn
constexpr int64_t kWaiting = 2;   // units whose epilogue is not done
constexpr int64_t kSums = 1024;   // floats: two tiles of pixels by 32 channels
static_assert(kScratchFloats == (kTogether + kWaiting) * kSums);

// A sum begins with a load from here: tiles that are loaded are renamed, one that is zeroed waits for its last product.
alignas(64) constexpr float kZeros[256] = {};

// Two tiles of pixels, of which the other may be missing, and an output block. whole: summed up to the last chunk.
struct Unit {
  const Tile *one, *other;
  float* sums;
  int64_t block;
  bool whole;
};

// What is left of a unit: bias, residual and ReLU, row by row between the products of the units behind it. The two are
// computed by different parts of a core, at the same time as long as neither is more than some hundred instructions ahead.
template <int planes, bool residual>
class Epilogue {
 public:
  explicit Epilogue(const ConvArgs& args)
      : args_(args), floor_(_mm512_set1_ps(args.relu ? 0.0f : -__builtin_inff())), scale0_(_mm512_set1_ps(1.0f)),
        scale1_(scale0_) {}

  [[gnu::always_inline]] inline void start(const Unit& unit) {
    sums_ = unit.sums;
    other_ = unit.other;
    left_ = unit.other == nullptr ? kTileRows : 2 * kTileRows;
    wanted_ = unit.one->rows;
    if (other_ != nullptr) wanted_ |= other_->rows << kTileRows;
    offset_ = unit.block * args_.y_block;
    place(unit.one->y);
    const float* bias = args_.bias + unit.block * kVector;
    bias0_ = _mm512_loadu_ps(bias), bias1_ = _mm512_loadu_ps(bias + 16);
    if (args_.scale != nullptr) {
      const float* scale = args_.scale + unit.block * kVector;
      scale0_ = _mm512_loadu_ps(scale), scale1_ = _mm512_loadu_ps(scale + 16);
    }
  }

  bool done() const { return left_ == 0; }

  // The next `rows`, a divisor of a tile's.
  template <int rows>
  [[gnu::always_inline]] inline void advance() {
    if (done()) return;
#pragma GCC unroll 16
    for (int row = 0; row < rows; ++row) {
      const bool wanted = wanted_ >> row & 1;
      if (wanted) finish(sums_ + row * kVector);
      y_ += wanted ? args_.y_row : args_.y_gap;
      if constexpr (residual) residual_ += wanted ? args_.y_row : args_.y_gap;
    }
    sums_ += rows * kVector;
    wanted_ >>= rows;
    left_ -= rows;
    if (left_ == kTileRows) place(other_->y);
  }

 private:
  void place(int64_t y) {
    y_ = args_.y + offset_ + y;
    if constexpr (residual) residual_ = args_.residual + offset_ + y;
  }

  [[gnu::always_inline]] inline void finish(const float* sums) const {
    __m512 first = _mm512_fmadd_ps(_mm512_load_ps(sums), scale0_, bias0_);
    __m512 second = _mm512_fmadd_ps(_mm512_load_ps(sums + 16), scale1_, bias1_);
    if constexpr (residual) {
      first = _mm512_add_ps(first, load<planes>(residual_, args_.y_plane));
      second = _mm512_add_ps(second, load<planes>(residual_ + 16, args_.y_plane));
    }
    first = _mm512_max_ps(floor_, first);  // which is the second operand where one is NaN
    second = _mm512_max_ps(floor_, second);
    if constexpr (planes == 1) {
      _mm512_storeu_si512(y_, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    } else {
      store<planes>(y_, args_.y_plane, first);
      store<planes>(y_ + 16, args_.y_plane, second);
    }
  }

  const ConvArgs& args_;
  const __m512 floor_;
  __m512 scale0_, scale1_, bias0_ = {}, bias1_ = {};
  const float* sums_ = nullptr;
  const Tile* other_ = nullptr;
  int64_t left_ = 0, offset_ = 0;
  uint32_t wanted_ = 0;
  uint16_t* y_ = nullptr;
  const uint16_t* residual_ = nullptr;
};

constexpr int64_t kSumsOffset[] = {0, 16, 512, 528};  // of the tiles 0 to 3

// Intrinsics take tiles by number.
template <int tile>
[[gnu::always_inline]] inline void store_sum(float* sums) {
  float* const to = sums + kSumsOffset[tile];
  if constexpr (tile == 0) _tile_stored(0, to, 128);
  if constexpr (tile == 1) _tile_stored(1, to, 128);
  if constexpr (tile == 2) _tile_stored(2, to, 128);
  if constexpr (tile == 3) _tile_stored(3, to, 128);
}

template <int tile>
[[gnu::always_inline]] inline void load_sum(const float* from, int64_t bytes) {
  if constexpr (tile == 0) _tile_loadd(0, from, bytes);
  if constexpr (tile == 1) _tile_loadd(1, from, bytes);
  if constexpr (tile == 2) _tile_loadd(2, from, bytes);
  if constexpr (tile == 3) _tile_loadd(3, from, bytes);
}

// The sums of the last unit leave the tiles, and those of this one come: from its last chunk, or as zeros where `next` is
// null. Each tile just before its first product.
struct Exchange {
  float* last;
  const float* next;

  template <int tile>
  [[gnu::always_inline]] inline void of() const {
    store_sum<tile>(last);
    load_sum<tile>(next == nullptr ? kZeros : next + kSumsOffset[tile], next == nullptr ? 64 : 128);
  }
};

// Tiles 0 to 3 are sums [pixels][channels], 4 and 5 pixels, 6 and 7 weights. Whatever else there is to do is done by
// `between`, called at even distances.

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
template <typename Between>
[[gnu::always_inline]] inline void multiply_planes(
    const uint16_t* a0, const uint16_t* a1, int64_t a_bytes, int64_t plane, const uint16_t* weight,
    const Between& between) {
  const uint16_t *weight0 = weight, *weight1 = weight + kBlockValues, *weight2 = weight + 2 * kBlockValues;
  _tile_loadd(6, weight2, 64);
  _tile_loadd(4, a0, a_bytes);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, a1, a_bytes);
  _tile_dpbf16ps(2, 5, 6);
  _tile_loadd(7, weight2 + kBlockValues / 2, 64);
  multiply_then_weights(weight1, true);
  between();
  multiply_then_pixels(a0 + plane, a1 + plane, a_bytes);
  between();
  multiply_then_weights(weight0, false);
  between();
  multiply_then_pixels(a0 + 2 * plane, a1 + 2 * plane, a_bytes);
  between();
  multiply_then_pixels(a0, a1, a_bytes);
  between();
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(3, 5, 7);
  between();
}

// How often `between` is called in a step.
constexpr int calls(int planes) { return planes == 3 ? 6 : 4; }

// The weights to come, which are in memory, fetched into the second cache level while other tiles are multiplied: by the
// loads of tiles alone a core has too few lines under way.
class Ahead {
 public:
  void start(const uint16_t* weight, int64_t values, int64_t steps) {
    next_ = weight;
    end_ = weight + values;
    lines_ = (values / kVector + steps - 1) / steps;
  }
  void fetch() {
    for (int64_t n = 0; n < lines_ && next_ < end_; ++n, next_ += kVector) {
      _mm_prefetch(reinterpret_cast<const char*>(next_), _MM_HINT_T1);
    }
  }

 private:
  const uint16_t *next_ = nullptr, *end_ = nullptr;
  int64_t lines_ = 0;  // with every step
};

// rows: of an epilogue, each time that there is room for some between products.
template <int planes, bool residual, int rows>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* const scratch) {
  const int64_t pairs = (tiles + 1) / 2, blocks = end - begin, block_values = args.steps * planes * kBlockValues;
  const int64_t together = args.chunk < args.steps ? kTogether : 1, slots = together + kWaiting;
  const int64_t groups = (pairs + together - 1) / together;
  const int64_t outer = args.pixels_first ? groups : blocks, inner = args.pixels_first ? blocks : groups;
  const int64_t a_bytes = args.x_row * 2, plane = args.x_plane;

  Epilogue<planes, residual> epilogue(args);
  const auto between = [&]() __attribute__((always_inline)) { epilogue.template advance<rows>(); };
  const auto multiply = [&]<bool first>(const Exchange& sums, const uint16_t* a0, const uint16_t* a1, const uint16_t* weight)
      __attribute__((always_inline)) {
    const auto exchange = [&]<int tile>() __attribute__((always_inline)) {
      if constexpr (first) sums.of<tile>();
    };
    if constexpr (planes == 1) {
      amx::multiply(a0, a1, a_bytes, weight, weight + kBlockValues / 2, exchange, between);
    } else {
      exchange.template operator()<0>();
      exchange.template operator()<1>();
      exchange.template operator()<2>();
      exchange.template operator()<3>();
      multiply_planes(a0, a1, a_bytes, plane, weight, between);
    }
  };
  Ahead ahead;
  Unit summed = {nullptr, nullptr, scratch, 0, false}, stored = summed;  // whose sums are in the tiles, and in memory
  int64_t slot = 0;
  for (int64_t i = 0; i < outer; ++i) {
    if (!args.pixels_first && i + 1 < blocks) {
      ahead.start(args.weight + (begin + i + 1) * block_values, block_values, pairs * args.steps);
    }
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t number = args.pixels_first ? j : i, block = begin + number;
      const int64_t first = (args.pixels_first ? i : j) * together;
      const int64_t behind = first + together < pairs ? first + together : pairs;
      const uint16_t* const x = args.x + block / args.outputs_per_group * args.blocks * args.x_block;
      for (int64_t from = 0; from < args.steps; from += args.chunk) {
        const int64_t to = from + args.chunk < args.steps ? from + args.chunk : args.steps;
        const uint16_t* const weights = args.weight + block * block_values + from * planes * kBlockValues;
        if (args.pixels_first && i == 0 && j + 1 < blocks) {
          ahead.start(weights + block_values, (to - from) * planes * kBlockValues, (to - from) * (behind - first));
        }
        for (int64_t pair = first; pair < behind; ++pair) {
          const int64_t own = slot + pair - first;
          const Tile *one = tile + 2 * pair, *other = 2 * pair + 1 < tiles ? one + 1 : nullptr;
          const Unit unit{one, other, scratch + (own < slots ? own : own - slots) * kSums, block,
                          to == args.steps};
          const uint16_t *a0 = x + one->x, *a1 = other == nullptr ? a0 : x + other->x, *weight = weights;
          const Exchange sums{summed.sums, from == 0 ? nullptr : unit.sums};
          if (stored.whole) epilogue.start(stored);
          const int64_t* offset = args.offsets + from;
          multiply.template operator()<true>(sums, a0 + *offset, a1 + *offset, weight);
          ahead.fetch();
          for (int64_t left = to - from - 1; left > 0; --left) {
            ++offset;
            weight += planes * kBlockValues;
            multiply.template operator()<false>(sums, a0 + *offset, a1 + *offset, weight);
            ahead.fetch();
          }
          while (!epilogue.done()) between();
          stored = summed;
          summed = unit;
        }
      }
      slot += behind - first;
      if (slot >= slots) slot -= slots;
    }
  }
  if (stored.whole) epilogue.start(stored);
  while (!epilogue.done()) between();
  store_sum<0>(summed.sums);
  store_sum<1>(summed.sums);
  store_sum<2>(summed.sums);
  store_sum<3>(summed.sums);
  epilogue.start(summed);
  while (!epilogue.done()) between();
}

template <int planes, bool residual>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  const int64_t steps = args.chunk < args.steps ? args.chunk : args.steps, room = steps * calls(planes);
  const auto with_rows = [&]<int rows>() { run<planes, residual, rows>(args, tile, tiles, begin, end, scratch); };
  if (room >= 32) {
    with_rows.template operator()<1>();
  } else if (room >= 16) {
    with_rows.template operator()<2>();
  } else if (room >= 8) {
    with_rows.template operator()<4>();
  } else {
    with_rows.template operator()<8>();
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
