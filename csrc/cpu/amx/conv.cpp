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
constexpr uint32_t kAllRows = (1u << kTileRows) - 1;
static_assert(kScratchFloats >= kTogether * kSums);

// In place of the second tile of a pair, where there is none.
constexpr Tile kNoTile = {0, 0, 0};

// Two tiles of pixels and an output block. whole: summed up to the last chunk.
struct Unit {
  const Tile *one, *other;
  float* sums;
  int64_t block;
  bool whole;
};

// What is left of a unit: scale, residual and ReLU, row by row between the products of the next one. The two are computed by
// different parts of a core, at the same time as long as neither is more than some hundred instructions ahead, and as long
// as there are few of them: so rows are asked for one by one only in a tile that does not write them all.
template <int planes, bool residual, bool scaled>
class Epilogue {
 public:
  explicit Epilogue(const ConvArgs& args)
      : args_(args), y_row_(args.y_row), floor_(_mm512_set1_ps(args.relu ? 0.0f : -__builtin_inff())) {}

  [[gnu::always_inline]] inline void start(const Unit& unit) {
    sums_ = unit.sums;
    other_ = unit.other;
    offset_ = unit.block * args_.y_block;
    place(*unit.one);
    if constexpr (scaled) {
      const float *scale = args_.scale + unit.block * kVector, *bias = args_.bias + unit.block * kVector;
      scale0_ = _mm512_loadu_ps(scale), scale1_ = _mm512_loadu_ps(scale + 16);
      bias0_ = _mm512_loadu_ps(bias), bias1_ = _mm512_loadu_ps(bias + 16);
    }
  }

  // The next `rows`, a divisor of a tile's.
  template <int rows>
  [[gnu::always_inline]] inline void advance() {
    if (wanted_ == kAllRows) {
#pragma GCC unroll 16
      for (int row = 0; row < rows; ++row) {
        finish(sums_ + row * kVector);
        step(y_row_);
      }
    } else {
#pragma GCC unroll 16
      for (int row = 0; row < rows; ++row) {
        const bool wanted = wanted_ >> (row_ + row) & 1;
        if (wanted) finish(sums_ + row * kVector);
        step(wanted ? y_row_ : args_.y_gap);
      }
    }
    sums_ += rows * kVector;
    row_ += rows;
    if (row_ == kTileRows) place(*other_);
  }

 private:
  void place(const Tile& tile) {
    row_ = 0;
    wanted_ = tile.rows;
    y_ = args_.y + offset_ + tile.y;
    if constexpr (residual) residual_ = args_.residual + offset_ + tile.y;
  }

  void step(int64_t values) {
    y_ += values;
    if constexpr (residual) residual_ += values;
  }

  [[gnu::always_inline]] inline void finish(const float* sums) const {
    __m512 first = _mm512_load_ps(sums), second = _mm512_load_ps(sums + 16);
    if constexpr (scaled) {
      first = _mm512_fmadd_ps(first, scale0_, bias0_);
      second = _mm512_fmadd_ps(second, scale1_, bias1_);
    }
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
  const int64_t y_row_;
  const __m512 floor_;
  __m512 scale0_ = {}, scale1_ = {}, bias0_ = {}, bias1_ = {};
  const float* sums_ = nullptr;
  const Tile* other_ = nullptr;
  int64_t offset_ = 0;
  int row_ = 0;
  uint32_t wanted_ = 0;
  uint16_t* y_ = nullptr;
  const uint16_t* residual_ = nullptr;
};

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
template <int planes, bool residual, bool scaled, int rows>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* const scratch) {
  const int64_t pairs = (tiles + 1) / 2, blocks = end - begin, block_values = args.steps * planes * kBlockValues;
  const int64_t together = args.chunk < args.steps ? kTogether : 1, groups = (pairs + together - 1) / together;
  const int64_t outer = args.pixels_first ? groups : blocks, inner = args.pixels_first ? blocks : groups;
  const int64_t a_bytes = args.x_row * 2, plane = args.x_plane;

  Epilogue<planes, residual, scaled> epilogue(args);
  Ahead ahead;
  const auto multiply = [&](const uint16_t* a0, const uint16_t* a1, const uint16_t* weight, const auto& before,
                            const auto& after) __attribute__((always_inline)) {
    multiply_block<planes>(a0, a1, a_bytes, plane, weight, before, after);
    ahead.fetch();
  };
  const auto keep = []<int tile>() {};
  const auto wait = [] {};
  const auto advance = [&]() __attribute__((always_inline)) { epilogue.template advance<rows>(); };

  Unit summed = {&kNoTile, &kNoTile, scratch, 0, false};  // whose sums are in the tiles
  for (int64_t i = 0; i < outer; ++i) {
    if (!args.pixels_first && i + 1 < blocks) {
      ahead.start(args.weight + (begin + i + 1) * block_values, block_values, pairs * args.steps);
    }
    for (int64_t j = 0; j < inner; ++j) {
      const int64_t block = begin + (args.pixels_first ? j : i), first = (args.pixels_first ? i : j) * together;
      const int64_t behind = first + together < pairs ? first + together : pairs;
      const uint16_t* const x = args.x + block / args.outputs_per_group * args.blocks * args.x_block;
      for (int64_t from = 0; from < args.steps; from += args.chunk) {
        const int64_t to = from + args.chunk < args.steps ? from + args.chunk : args.steps;
        const uint16_t* const weights = args.weight + block * block_values + from * planes * kBlockValues;
        if (args.pixels_first && i == 0 && j + 1 < blocks) {
          ahead.start(weights + block_values, (to - from) * planes * kBlockValues, (to - from) * (behind - first));
        }
        for (int64_t pair = first; pair < behind; ++pair) {
          const Tile *one = tile + 2 * pair, *other = 2 * pair + 1 < tiles ? one + 1 : &kNoTile;
          const Unit unit{one, other, scratch + (pair - first) * kSums, block, to == args.steps};
          const float* const start = scaled ? kZeros : args.bias + block * kVector;
          const Exchange sums = from == 0 ? Exchange{summed.sums, start, start, 0}
                                          : Exchange{summed.sums, unit.sums, unit.sums + kSums / 2, kSumBytes};
          const uint16_t *a0 = x + one->x, *a1 = x + other->x, *weight = weights;
          const int64_t *offset = args.offsets + from, *last = args.offsets + to;
          multiply(a0 + *offset, a1 + *offset, weight, sums, wait);
          const auto next = [&](const auto& after) __attribute__((always_inline)) {
            weight += planes * kBlockValues;
            multiply(a0 + *offset, a1 + *offset, weight, keep, after);
          };
          ++offset;
          if (summed.whole) {
            epilogue.start(summed);
            for (int row = 0; row < 2 * kTileRows; row += kCalls * rows) {
              if (offset < last) {
                next(advance);
                ++offset;
              } else {
                for (int call = 0; call < kCalls; ++call) advance();
              }
            }
          }
          for (; offset < last; ++offset) next(wait);
          summed = unit;
        }
      }
    }
  }
  store_sums(summed.sums);
  epilogue.start(summed);
  for (int row = 0; row < 2 * kTileRows; row += rows) advance();
}

// An epilogue has all steps but the first.
template <int planes, bool residual, bool scaled>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  const int64_t steps = args.chunk < args.steps ? args.chunk : args.steps, room = (steps - 1) * kCalls;
  const auto with_rows = [&]<int rows>() {
    run<planes, residual, scaled, rows>(args, tile, tiles, begin, end, scratch);
  };
  if (room >= 2 * kTileRows) {
    with_rows.template operator()<1>();
  } else if (room >= kTileRows) {
    with_rows.template operator()<2>();
  } else if (room >= kTileRows / 2) {
    with_rows.template operator()<4>();
  } else {
    with_rows.template operator()<8>();
  }
}

template <int planes>
void run(const ConvArgs& args, const Tile* tile, int64_t tiles, int64_t begin, int64_t end, float* scratch) {
  const auto with = [&]<bool residual, bool scaled>() {
    run<planes, residual, scaled>(args, tile, tiles, begin, end, scratch);
  };
  if (args.residual == nullptr) {
    args.scale == nullptr ? with.template operator()<false, false>() : with.template operator()<false, true>();
  } else {
    args.scale == nullptr ? with.template operator()<true, false>() : with.template operator()<true, true>();
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
