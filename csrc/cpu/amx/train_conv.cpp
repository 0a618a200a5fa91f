// Implicit GEMM: two tiles of positions by 32 output channels, summed up over taps and input channels in four tiles.
// A tap is an offset into the packed pixels; which pixel a row becomes is in a table, so padding, strides and the
// gradient's parities are the host's affair.
#include "tiles.h"
#include "train_vectors.h"

namespace resnet_fast::cpu::amx::train {
namespace {

constexpr int64_t kFlush = 32;  // rows; bounds the rounding of the moments' float sums

// Tiles 0 to 3 are sums, 4 and 5 pixels, 6 and 7 weights.
inline void load_pixels(const uint16_t* a0, const uint16_t* a1) {
  _tile_loadd(4, a0, 64);
  _tile_loadd(5, a1, 64);
}
inline void load_weight(const uint16_t* weight) {
  _tile_loadd(6, weight, 64);
  _tile_loadd(7, weight + kBlockValues / 2, 64);
}
inline void multiply_loaded() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <int planes>
inline void step(const uint16_t* a0, const uint16_t* a1, int64_t bytes, int64_t plane, const uint16_t* weight) {
  if constexpr (planes == 1) {
    multiply(a0, a1, bytes, weight, weight + kBlockValues / 2);
  } else {  // planes (i, j), i + j <= 2, the smallest products first
    load_weight(weight);
    load_pixels(a0 + 2 * plane, a1 + 2 * plane);
    multiply_loaded();
    load_pixels(a0 + plane, a1 + plane);
    multiply_loaded();
    load_weight(weight + kBlockValues);
    multiply_loaded();
    load_pixels(a0, a1);
    multiply_loaded();
    load_weight(weight + 2 * kBlockValues);
    multiply_loaded();
    load_weight(weight);
    multiply_loaded();
  }
}

// A row of 32 output channels, left in a and b as it was stored. stream: past the caches, which y does not fit in.
template <int planes, bool stream = false>
inline void store_row(__m512& a, __m512& b, void* y, const void* add, int64_t at) {
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

// What two tiles summed up, [32][32], on its way to y.
struct Sums {
  alignas(64) float values[32 * 32];
  int64_t output, rows, stored = 0;
  const int32_t* pixel;
  bool whole;  // all 32 rows are pixels
};

template <int planes, bool stream, bool moments, bool whole>
inline void store_rows(const ConvArgs& args, const Sums& sums, int64_t begin, int64_t end) {
  const int64_t offset = sums.output * kBlock * (planes == 1 ? 2 : 4);
  void* y = static_cast<char*>(args.y) + offset;
  const void* add = args.add == nullptr ? nullptr : static_cast<const char*>(args.add) + offset;
  Moments* m = nullptr;
  int64_t count = 0;
  __m512 shift0, shift1, sum0, sum1, square0, square1;
  if constexpr (moments) {
    m = args.moments + sums.output;
    shift0 = load(m->shift), shift1 = load(m->shift + 16);
    sum0 = load(m->sum), sum1 = load(m->sum + 16);
    square0 = load(m->square), square1 = load(m->square + 16);
  }
  for (int64_t i = begin; i < end; ++i) {
    if (!whole && sums.pixel[i] < 0) continue;
    __m512 a = load(sums.values + i * 32), b = load(sums.values + i * 32 + 16);
    store_row<planes, stream>(a, b, y, add, sums.pixel[i] * args.y_channels);
    if constexpr (moments) {
      a = _mm512_sub_ps(a, shift0);
      b = _mm512_sub_ps(b, shift1);
      sum0 = _mm512_add_ps(sum0, a);
      sum1 = _mm512_add_ps(sum1, b);
      square0 = _mm512_fmadd_ps(a, a, square0);
      square1 = _mm512_fmadd_ps(b, b, square1);
      ++count;
    }
  }
  if constexpr (moments) {
    _mm512_storeu_ps(m->sum, sum0), _mm512_storeu_ps(m->sum + 16, sum1);
    _mm512_storeu_ps(m->square, square0), _mm512_storeu_ps(m->square + 16, square1);
    m->rows += count;
    m->pending += count;
    if (m->pending >= kFlush) flush(*m);
  }
}

// The mean of the first rows, as a shift that keeps sums small and squares from cancelling; rounded as what is stored, so
// that a constant channel's variance is zero.
template <int planes>
inline void set_shift(Moments& m, const Sums& sums) {
  __m512 a = _mm512_setzero_ps(), b = a, count = a;
  for (int64_t i = 0; i < sums.rows; ++i) {
    if (sums.pixel[i] < 0) continue;
    a = _mm512_add_ps(a, load(sums.values + i * 32));
    b = _mm512_add_ps(b, load(sums.values + i * 32 + 16));
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

// The rows before `end` that are not yet stored.
template <int planes, bool stream, bool moments>
inline void store_until(const ConvArgs& args, Sums& sums, int64_t end) {
  end = end < sums.rows ? end : sums.rows;
  if (sums.stored >= end) return;
  if constexpr (moments) {
    if (sums.stored == 0 && args.moments[sums.output].rows == 0) set_shift<planes>(args.moments[sums.output], sums);
  }
  sums.whole ? store_rows<planes, stream, moments, true>(args, sums, sums.stored, end)
             : store_rows<planes, stream, moments, false>(args, sums, sums.stored, end);
  sums.stored = end;
}

// The rows of one product are stored while the next is being multiplied: the two run on different units.
template <int planes, bool stream, bool moments>
void conv_tiles(const ConvArgs& args) {
  Sums buffers[2];
  Sums *now = &buffers[0], *before = &buffers[1];
  before->rows = 0;
  const int64_t steps = args.blocks * args.n_taps, interval = steps >= 8 ? steps / 8 : 1;
  const int64_t rows_a_time = steps >= 8 ? 4 : 32 / (steps > 4 ? 4 : steps > 0 ? steps : 1);
  for (int64_t tile = 0; tile < args.tiles; tile += 2) {
    const int64_t other = tile + 1 < args.tiles ? tile + 1 : tile;
    const int64_t rows = other > tile ? 32 : 16;
    const int32_t* pixel = args.pixel + tile * 16;
    bool whole = rows == 32, any = false;
    for (int64_t i = 0; i < rows; ++i) whole &= pixel[i] >= 0, any |= pixel[i] >= 0;
    if (!any) continue;
    const uint16_t* weight = args.weight;
    for (int64_t output = 0; output < args.outputs; ++output) {
      const uint16_t* x0 = args.x + args.tile[tile] * args.x_row;
      const uint16_t* x1 = args.x + args.tile[other] * args.x_row;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      int64_t wait = interval, stored = 0;
      for (int64_t b = 0; b < args.blocks; ++b, x0 += args.x_block, x1 += args.x_block) {
        for (int64_t t = 0; t < args.n_taps; ++t, weight += planes * kBlockValues) {
          const int64_t offset = args.taps[t] * args.x_row;
          step<planes>(x0 + offset, x1 + offset, args.x_row * 2, args.x_plane, weight);
          if (--wait == 0) {
            wait = interval;
            stored += rows_a_time;
            store_until<planes, stream, moments>(args, *before, stored);
          }
        }
      }
      store_until<planes, stream, moments>(args, *before, 32);
      now->output = output, now->rows = rows, now->stored = 0, now->pixel = pixel, now->whole = whole;
      _tile_stored(0, now->values, 128);
      _tile_stored(1, now->values + 16, 128);
      _tile_stored(2, now->values + 16 * 32, 128);
      _tile_stored(3, now->values + 16 * 32 + 16, 128);
      Sums* const free = before;
      before = now;
      now = free;
    }
  }
  store_until<planes, stream, moments>(args, *before, 32);
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
    float* lower = out + kBlockValues / 2;
    if (args.add) {
      _tile_loadd(0, out, 128);
      _tile_loadd(1, out + 16, 128);
      _tile_loadd(2, lower, 128);
      _tile_loadd(3, lower + 16, 128);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
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
    _tile_stored(0, out, 128);
    _tile_stored(1, out + 16, 128);
    _tile_stored(2, lower, 128);
    _tile_stored(3, lower + 16, 128);
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

void flush(Moments& m) {
  for (int i = 0; i < kBlock; ++i) {
    m.sums[i] += m.sum[i];
    m.squares[i] += m.square[i];
    m.sum[i] = m.square[i] = 0;
  }
  m.pending = 0;
}

void conv(int planes, const ConvArgs& args) {
  const auto run = [&]<bool stream, bool moments>() {
    planes == 1 ? conv_tiles<1, stream, moments>(args) : conv_tiles<3, stream, moments>(args);
  };
  const bool moments = args.moments != nullptr;
  if (!args.stream) {
    moments ? run.template operator()<false, true>() : run.template operator()<false, false>();
    return;
  }
  moments ? run.template operator()<true, true>() : run.template operator()<true, false>();
  _mm_sfence();
}

void merge_gradients(int planes, const MergeArgs& args) { planes == 1 ? merge<1>(args) : merge<3>(args); }

void wgrad_block(int planes, const WgradArgs& args) { planes == 1 ? wgrad<1>(args) : wgrad<3>(args); }

}  // namespace resnet_fast::cpu::amx::train
