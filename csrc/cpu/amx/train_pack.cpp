// Operands of the products of train.h: a pass over pixels or weights each, in which what is pending is done.
#include <type_traits>

#include "train_vectors.h"

namespace resnet_fast::cpu::amx::train {
namespace {

template <int planes>
using scalar_type = std::conditional_t<planes == 1, uint16_t, float>;

template <int planes, bool norm>
uint32_t pixels(const Pixels& from, uint16_t* to, int64_t block) {
  using scalar_t = scalar_type<planes>;
  const auto* data = static_cast<const scalar_t*>(from.data);
  const int64_t plane = from.positions * kBlock;
  Largest largest;
  for (int64_t position = 0; position < from.positions; ++position) {
    uint16_t* row = to + position * kBlock;
    if (from.table[position] < 0) {
      for (int64_t c = 0; c < from.channels; c += kBlock, row += block) {
        for (int i = 0; i < planes; ++i) _mm512_storeu_si512(row + i * plane, _mm512_setzero_si512());
      }
      continue;
    }
    const scalar_t* pixel = data + from.table[position] * from.channels;
    for (int64_t c = 0; c < from.channels; c += kBlock, row += block) {
      __m512 a = load(pixel + c), b = load(pixel + c + 16);
      if constexpr (norm) {
        largest.see(a);
        largest.see(b);
        a = Norm(from, c)(a);
        b = Norm(from, c + 16)(b);
      }
      largest.see(a);
      largest.see(b);
      store_planes<planes>(a, b, row, plane);
    }
  }
  return largest.result();
}

// 16 channels of a position.
template <int planes, bool norm>
struct Reader {
  using scalar_t = scalar_type<planes>;
  const Pixels& from;
  Largest largest;

  const scalar_t* pixel(int64_t position) const {
    const bool none = position >= from.positions || from.table[position] < 0;
    return none ? nullptr : static_cast<const scalar_t*>(from.data) + from.table[position] * from.channels;
  }
  __m512 operator()(const scalar_t* pixel, int64_t channel) {
    if (pixel == nullptr) return _mm512_setzero_ps();
    __m512 v = load(pixel + channel);
    largest.see(v);
    if constexpr (norm) {
      v = Norm(from, channel)(v);
      largest.see(v);
    }
    return v;
  }
};

template <int planes, bool norm>
uint32_t pairs_of(const Pixels& from, int64_t begin, int64_t end, bool compact, uint16_t* to) {
  const int64_t positions = compact ? from.positions / 2 : from.positions;
  Reader<planes, norm> read{from, {}};
  uint16_t* row = to;
  for (int64_t first = 0; first < from.positions; first += compact ? 32 : 16) {
    for (int64_t position = first; position < first + 16; ++position, row += kBlock) {
      const auto* lower = read.pixel(position);
      const auto* upper = read.pixel(position + 16);
      uint16_t* out = row;
      for (int64_t channel = begin; channel < end; channel += 16) {
        __m512 a = read(lower, channel), b = read(upper, channel);
        for (int i = 0; i < planes; ++i, out += positions * kBlock) _mm512_storeu_si512(out, pairs(a, b));
      }
    }
  }
  return read.largest.result();
}

template <int planes>
uint32_t transposed(const Pixels& from, int64_t begin, int64_t end, uint16_t* to) {
  Reader<planes, false> read{from, {}};
  const int64_t step = from.positions / 32 * planes * 512;
  for (int64_t first = 0; first < from.positions; first += 32, to += planes * 512) {
    uint16_t* out = to;
    for (int64_t channel = begin; channel < end; channel += 16, out += step) {
      if (channel % 32 == 0) {  // a column of lines is no pattern that the hardware foresees
        for (int i = 0; i < 32; ++i) {
          if (const auto* next = read.pixel(first + 32 + i)) __builtin_prefetch(next + channel);
        }
      }
      __m512i rows[planes][16];
      for (int i = 0; i < 16; ++i) {
        __m512 a = read(read.pixel(first + i), channel), b = read(read.pixel(first + 16 + i), channel);
        for (int p = 0; p < planes; ++p) rows[p][i] = pairs(a, b);
      }
      for (int p = 0; p < planes; ++p) {
        transpose(rows[p]);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + p * 512 + i * kBlock, rows[p][i]);
      }
    }
  }
  return read.largest.result();
}

template <int planes>
uint32_t weight(const WeightArgs& args, int64_t output, uint16_t* to) {
  using scalar_t = scalar_type<planes>;
  const auto* data = static_cast<const scalar_t*>(args.data);
  const int64_t sums = args.transposed ? args.out_channels : args.channels;
  Largest largest;
  for (int64_t block = 0; block < sums; block += kBlock) {
    for (int64_t tap = 0; tap < args.n_taps; ++tap, to += planes * kBlockValues) {
      const auto value = [&](int64_t k, int64_t c) {
        return data + (k * args.taps + args.tap[tap]) * args.channels + c;
      };
      for (int half = 0; half < 2; ++half) {
        const int64_t out = output * kBlock + 16 * half;
        uint16_t* tile = to + 512 * half;
        __m512i rows[planes][16];
        for (int i = 0; i < 16; ++i) {
          if (args.transposed) {  // row i: output channels block + 2 i and the next, of 16 input channels
            __m512 a = load(value(block + 2 * i, out)), b = load(value(block + 2 * i + 1, out));
            largest.see(a);
            largest.see(b);
            for (int p = 0; p < planes; ++p) rows[p][i] = pairs(a, b);
          } else {  // column i: 32 input channels of one output channel, as they lie
            __m512 a = load(value(out + i, block)), b = load(value(out + i, block + 16));
            largest.see(a);
            largest.see(b);
            for (int p = 0; p < planes; ++p) {
              rows[p][i] = narrow(a, b);
              a = _mm512_sub_ps(a, low_half(rows[p][i]));
              b = _mm512_sub_ps(b, high_half(rows[p][i]));
            }
          }
        }
        for (int p = 0; p < planes; ++p) {
          if (!args.transposed) transpose(rows[p]);
          for (int i = 0; i < 16; ++i) _mm512_storeu_si512(tile + p * kBlockValues + i * kBlock, rows[p][i]);
        }
      }
    }
  }
  return largest.result();
}

}  // namespace

uint32_t pack_pixels(int planes, const Pixels& from, uint16_t* to, int64_t block) {
  if (planes == 1) return from.mean ? pixels<1, true>(from, to, block) : pixels<1, false>(from, to, block);
  return from.mean ? pixels<3, true>(from, to, block) : pixels<3, false>(from, to, block);
}

uint32_t pack_pairs(int planes, const Pixels& from, int64_t begin, int64_t end, bool compact, uint16_t* to) {
  const auto run = [&]<bool norm>() {
    return planes == 1 ? pairs_of<1, norm>(from, begin, end, compact, to)
                       : pairs_of<3, norm>(from, begin, end, compact, to);
  };
  return from.mean != nullptr ? run.template operator()<true>() : run.template operator()<false>();
}

uint32_t pack_transposed(int planes, const Pixels& from, int64_t begin, int64_t end, uint16_t* to) {
  return planes == 1 ? transposed<1>(from, begin, end, to) : transposed<3>(from, begin, end, to);
}

uint32_t pack_weight(int planes, const WeightArgs& args, int64_t output, uint16_t* to) {
  return planes == 1 ? weight<1>(args, output, to) : weight<3>(args, output, to);
}

}  // namespace resnet_fast::cpu::amx::train
