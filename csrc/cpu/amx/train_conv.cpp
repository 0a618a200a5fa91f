// Implicit GEMM: two tiles of positions by 32 output channels, summed up over taps and input channels in four tiles.
// A tap is an offset into the packed pixels; which pixel a row becomes is in a table, so padding, strides and the
// gradient's parities are the host's affair.
#include "tiles.h"
#include "train_vectors.h"

namespace resnet_fast::cpu::amx::train {
namespace {

// Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights.
inline void load_pixels(const uint16_t* a0, const uint16_t* a1) {
  _tile_loadd(4, a0, 64);
  _tile_loadd(5, a1, 64);
}
inline void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// A row of 32 output channels, left in a and b as it was stored. stream: past the caches, which y does not fit in.
template <int planes, bool stream = false>
[[gnu::always_inline]] inline void store_row(__m512& a, __m512& b, void* y, const void* add, int64_t at) {
  if constexpr (planes == 1) {
    if (add != nullptr) {
      const auto* row = static_cast<const uint16_t*>(add) + at;
      a = _mm512_add_ps(a, load(row));
      b = _mm512_add_ps(b, load(row + 16));
    }
    const __m512i stored = narrow(a, b);
    auto* row = reinterpret_cast<__m512i*>(static_cast<uint16_t*>(y) + at);
    stream ? _mm512_stream_si512(row, stored) : _mm512_storeu_si512(row, stored);
    a = low_half(stored);
    b = high_half(stored);
  } else {
    if (add != nullptr) {
      const auto* row = static_cast<const float*>(add) + at;
      a = _mm512_add_ps(a, load(row));
      b = _mm512_add_ps(b, load(row + 16));
    }
    auto* row = static_cast<float*>(y) + at;
    stream ? _mm512_stream_ps(row, a) : _mm512_storeu_ps(row, a);
    stream ? _mm512_stream_ps(row + 16, b) : _mm512_storeu_ps(row + 16, b);
  }
}

inline __m512 finite_or_zero(__m512 v) {
  const __mmask16 special = _mm512_fpclass_ps_mask(v, 0x99);  // NaN, infinity
  return _mm512_mask_mov_ps(v, special, _mm512_setzero_ps());
}

// Two tiles of positions, of which the second may be missing, and an output block. whole: all 32 rows are pixels.
struct Unit {
  const int32_t* pixel;
  int64_t rows, output;
  bool whole;
};

// The mean of a unit's rows, as a shift that keeps sums small and squares from cancelling; rounded as what is stored, so
// that a constant channel's variance is zero.
template <int planes>
inline void set_shift(Moments& m, const Unit& unit, const float* sums) {
  __m512 a = _mm512_setzero_ps(), b = a, count = a;
  for (int64_t i = 0; i < unit.rows; ++i) {
    if (unit.pixel[i] < 0) continue;
    a = _mm512_add_ps(a, load(sums + i * kBlock));
    b = _mm512_add_ps(b, load(sums + i * kBlock + 16));
    count = _mm512_add_ps(count, _mm512_set1_ps(1));
  }
  a = finite_or_zero(_mm512_div_ps(a, count));
  b = finite_or_zero(_mm512_div_ps(b, count));
  if constexpr (planes == 1) {
    const __m512i rounded = narrow(a, b);
    a = low_half(rounded);
    b = high_half(rounded);
  }
  _mm512_storeu_ps(m.shift, a);
  _mm512_storeu_ps(m.shift + 16, b);
}

inline void add_up(double* to, __m512 values) {
  _mm512_storeu_pd(to, _mm512_add_pd(_mm512_loadu_pd(to), _mm512_cvtps_pd(_mm512_castps512_ps256(values))));
  const __m256 upper = _mm512_maskz_extractf32x8_ps(0xff, values, 1);
  _mm512_storeu_pd(to + 8, _mm512_add_pd(_mm512_loadu_pd(to + 8), _mm512_cvtps_pd(upper)));
}

// A unit's sums on their way to y and to the moments, row by row between the products of the next one: the two run on
// different parts of a core.
template <int planes, bool stream, bool moments>
class Epilogue {
 public:
  Epilogue(const ConvArgs& args, const float* sums) : args_(args), sums_(sums) {}

  [[gnu::always_inline]] inline void start(const Unit& unit) {
    unit_ = unit;
    row_ = 0;
    const int64_t offset = unit.output * kBlock * (planes == 1 ? 2 : 4);
    y_ = static_cast<char*>(args_.y) + offset;
    add_ = args_.add == nullptr ? nullptr : static_cast<const char*>(args_.add) + offset;
    if constexpr (moments) {
      Moments& m = args_.moments[unit.output];
      if (m.rows == 0) set_shift<planes>(m, unit, sums_);
      shift0_ = load(m.shift), shift1_ = load(m.shift + 16);
      sum0_ = sum1_ = square0_ = square1_ = _mm512_setzero_ps();
    }
  }

  template <int rows>
  [[gnu::always_inline]] inline void advance() {
    if (unit_.whole) {
#pragma GCC unroll 8
      for (int i = 0; i < rows; ++i) finish(row_ + i);
    } else {
      for (int i = 0; i < rows; ++i) {
        if (row_ + i < unit_.rows && unit_.pixel[row_ + i] >= 0) finish(row_ + i);
      }
    }
    row_ += rows;
  }

  // Behind all rows.
  [[gnu::always_inline]] inline void end() {
    if constexpr (moments) {
      Moments& m = args_.moments[unit_.output];
      add_up(m.sums, sum0_), add_up(m.sums + 16, sum1_);
      add_up(m.squares, square0_), add_up(m.squares + 16, square1_);
      for (int64_t i = 0; !unit_.whole && i < unit_.rows; ++i) m.rows += unit_.pixel[i] >= 0;
      if (unit_.whole) m.rows += unit_.rows;
    }
  }

 private:
  [[gnu::always_inline]] inline void finish(int64_t row) {
    __m512 a = _mm512_load_ps(sums_ + row * kBlock), b = _mm512_load_ps(sums_ + row * kBlock + 16);
    store_row<planes, stream>(a, b, y_, add_, unit_.pixel[row] * args_.y_channels);
    if constexpr (moments) {
      a = _mm512_sub_ps(a, shift0_);
      b = _mm512_sub_ps(b, shift1_);
      sum0_ = _mm512_add_ps(sum0_, a);
      sum1_ = _mm512_add_ps(sum1_, b);
      square0_ = _mm512_fmadd_ps(a, a, square0_);
      square1_ = _mm512_fmadd_ps(b, b, square1_);
    }
  }

  const ConvArgs& args_;
  const float* const sums_;
  Unit unit_ = {};
  int64_t row_ = 0;
  void* y_ = nullptr;
  const void* add_ = nullptr;
  __m512 shift0_ = {}, shift1_ = {}, sum0_ = {}, sum1_ = {}, square0_ = {}, square1_ = {};
};

// rows: of an epilogue, each time that there is room for some between products.
template <int planes, bool stream, bool moments, int rows>
void conv_tiles(const ConvArgs& args) {
  alignas(64) float sums[kSums];
  Epilogue<planes, stream, moments> epilogue(args, sums);
  const auto advance = [&]() __attribute__((always_inline)) { epilogue.template advance<rows>(); };
  const auto wait = [] {};
  const auto keep = []<int tile>() {};
  const Exchange exchange{sums, kZeros, kZeros, 0};
  const int64_t* const end = args.offsets + args.steps;
  Unit summed = {nullptr, 0, 0, false};  // whose sums are in the tiles
  for (int64_t tile = 0; tile < args.tiles; tile += 2) {
    const int64_t other = tile + 1 < args.tiles ? tile + 1 : tile;
    Unit unit{args.pixel + tile * kTileRows, other > tile ? 2 * kTileRows : kTileRows, 0, other > tile};
    bool any = false;
    for (int64_t i = 0; i < unit.rows; ++i) unit.whole &= unit.pixel[i] >= 0, any |= unit.pixel[i] >= 0;
    if (!any) continue;
    const uint16_t *const x0 = args.x + args.tile[tile] * args.x_row, *const x1 = args.x + args.tile[other] * args.x_row;
    const uint16_t* weight = args.weight;
    for (unit.output = 0; unit.output < args.outputs; ++unit.output) {
      const int64_t* offset = args.offsets;
      const auto next = [&](const auto& before, const auto& after) __attribute__((always_inline)) {
        multiply_block<planes>(x0 + *offset, x1 + *offset, args.x_row * 2, args.x_plane, weight, before, after);
        ++offset;
        weight += planes * kBlockValues;
      };
      if (offset < end) {
        next(exchange, wait);
      } else {
        each_tile(exchange);
      }
      if (summed.rows > 0) {
        epilogue.start(summed);
        for (int row = 0; row < 2 * kTileRows; row += kCalls * rows) {
          if (offset < end) {
            next(keep, advance);
          } else {
            for (int call = 0; call < kCalls; ++call) advance();
          }
        }
        epilogue.end();
      }
      while (offset < end) next(keep, wait);
      summed = unit;
    }
  }
  if (summed.rows == 0) return;
  store_sums(sums);
  epilogue.start(summed);
  for (int row = 0; row < 2 * kTileRows; row += rows) advance();
  epilogue.end();
}

// Three taps of a row of the kernel, whose pixels are nearly the same, by 32 output and 16 input channels: six tiles of sums
// [output channel][input channel], 6 gradients and 7 pixels, for which only half of a product's bytes are not in the first
// cache level. `half`: of the input channels.
inline void wgrad_three_taps(const WgradArgs& args, int64_t tap, int64_t half) {
  const int64_t tiles = args.positions / 32;
  const auto sum = [&](int tile) {
    return args.dweight + (tap + tile % 3) * kBlockValues + tile / 3 * (kBlockValues / 2) + half * 16;
  };
  each_tile<6>([&]<int tile>() { load_tile<tile>(args.add ? sum(tile) : kZeros, args.add ? kSumBytes : 0); });
  const uint16_t *a0 = args.dy, *a1 = a0 + tiles * 512, *const x = args.x + half * args.x_positions * kBlock;
  const uint16_t *b0 = x + args.taps[tap] * kBlock, *b1 = x + args.taps[tap + 1] * kBlock,
                 *b2 = x + args.taps[tap + 2] * kBlock;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    _tile_loadd(6, a0, 64);
    _tile_loadd(7, b0, 64);
    _tile_dpbf16ps(0, 6, 7);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 6, 7);
    _tile_loadd(7, b2, 64);
    _tile_dpbf16ps(2, 6, 7);
    _tile_loadd(6, a1, 64);
    _tile_dpbf16ps(5, 6, 7);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, b0, 64);
    _tile_dpbf16ps(3, 6, 7);
    a0 += 512, a1 += 512;
    b0 += 32 * kBlock, b1 += 32 * kBlock, b2 += 32 * kBlock;
  }
  each_tile<6>([&]<int tile>() { store_tile<tile>(sum(tile), kSumBytes); });
}

// Tiles 0 to 3 are sums [output channel][input channel], 4 and 5 gradients, 6 and 7 pixels.
template <int planes>
void wgrad(const WgradArgs& args) {
  const int64_t tiles = args.positions / 32;
  const int64_t dy_half = tiles * planes * 512;
  const int64_t x_plane = args.x_positions * kBlock, x_half = planes * x_plane;
  const int64_t x_step = (args.compact ? 16 : 32) * kBlock;
  for (int64_t t = 0; t < args.n_taps; ++t) {
    float* out = args.dweight + t * kBlockValues;
    load_sums(args.add ? out : nullptr);
    const uint16_t* a = args.dy;
    const uint16_t* b = args.x + args.taps[t] * kBlock;
    for (int64_t tile = 0; tile < tiles; ++tile, a += planes * 512, b += x_step) {
      if constexpr (planes == 1) {
        multiply(a, a + dy_half, 64, b, b + x_half);
      } else {
        const auto gradients = [&](int64_t i) { load_pixels(a + i * 512, a + dy_half + i * 512); };
        const auto pixels = [&](int64_t j) {
          _tile_loadd(6, b + j * x_plane, 64);
          _tile_loadd(7, b + x_half + j * x_plane, 64);
        };
        pixels(0);
        gradients(2);
        multiply_loaded();
        gradients(1);
        multiply_loaded();
        pixels(1);
        multiply_loaded();
        gradients(0);
        multiply_loaded();
        pixels(2);
        multiply_loaded();
        pixels(0);
        multiply_loaded();
      }
    }
    store_sums(out);
  }
}

template <int planes>
void merge(const MergeArgs& args) {
  for (int64_t k = 0; k < kBlock; ++k) {
    for (int64_t t = 0; t < args.taps; ++t) {
      for (int64_t c = 0; c < args.channels; c += kBlock) {
        const float* from = args.from + (c / kBlock * args.taps + t) * kBlockValues + k * kBlock;
        __m512 a = load(from), b = load(from + 16);
        for (int64_t group = 1; group < args.groups; ++group) {
          a = _mm512_add_ps(a, load(from + group * args.step));
          b = _mm512_add_ps(b, load(from + group * args.step + 16));
        }
        store_row<planes>(a, b, args.to, nullptr, (k * args.taps + t) * args.channels + c);
      }
    }
  }
}

}  // namespace

void conv(int planes, const ConvArgs& args) {
  const auto run = [&]<int planes, bool stream, bool moments>() {
    // An epilogue has all steps but the first.
    (args.steps - 1) * kCalls >= kTileRows ? conv_tiles<planes, stream, moments, 2>(args)
                                           : conv_tiles<planes, stream, moments, 8>(args);
  };
  const auto with = [&]<bool stream, bool moments>() {
    planes == 1 ? run.template operator()<1, stream, moments>() : run.template operator()<3, stream, moments>();
  };
  const bool moments = args.moments != nullptr;
  if (!args.stream) {
    moments ? with.template operator()<false, true>() : with.template operator()<false, false>();
    return;
  }
  moments ? with.template operator()<true, true>() : with.template operator()<true, false>();
  _mm_sfence();
}

void merge_gradients(int planes, const MergeArgs& args) { planes == 1 ? merge<1>(args) : merge<3>(args); }

void wgrad_block(int planes, const WgradArgs& args) {
  if (planes == 3) {
    wgrad<3>(args);
  } else if (args.compact || args.n_taps % 3 != 0) {
    wgrad<1>(args);
  } else {
    for (int64_t tap = 0; tap < args.n_taps; tap += 3) {
      wgrad_three_taps(args, tap, 0);
      wgrad_three_taps(args, tap, 1);
    }
  }
}

}  // namespace resnet_fast::cpu::amx::train
