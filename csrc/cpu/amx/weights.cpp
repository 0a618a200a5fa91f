// A call's own weights and batch norm, as conv() takes them.
#include "amx.h"
#include "vectors.h"
#include "winograd_transforms.h"

namespace resnet_fast::cpu::amx {
namespace {

// Up to 32 channels of one output channel and tap, of which channel `at` is first; those outside of `wanted` are zero.
class Channels {
 public:
  static constexpr int64_t kAhead = 128;  // weights that are fetched early, of 16 rows at once

  explicit Channels(const WeightArgs& args) : args_(args) {
    for (int lane = 0; lane < 16; ++lane) steps_[lane] = static_cast<int32_t>(lane * args.channel_step);
  }

  __m512 floats(int64_t at, uint32_t wanted, int64_t half) const {
    const auto mask = static_cast<__mmask16>(wanted >> (16 * half));
    const float* weight = static_cast<const float*>(args_.weight) + at + 16 * half * args_.channel_step;
    if (args_.channel_step == 1) {
      _mm_prefetch(reinterpret_cast<const char*>(weight + kAhead), _MM_HINT_T0);
      return _mm512_maskz_loadu_ps(mask, weight);
    }
    return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, _mm512_load_si512(steps_), weight, 4);
  }

  __m512 widened(int64_t at, int64_t half) const {
    const __m512i both = bfloat16s(at + 16 * half * args_.channel_step, 0xffff);
    return widen(_mm512_castsi512_si256(both));
  }

  __m512i bfloat16s(int64_t at, uint32_t wanted) const {
    const uint16_t* weight = static_cast<const uint16_t*>(args_.weight) + at;
    if (args_.channel_step == 1) return _mm512_maskz_loadu_epi16(wanted, weight);
    alignas(64) uint16_t values[kVector] = {};
    for (int64_t i = 0; i < kVector; ++i) {
      if (wanted >> i & 1) values[i] = weight[i * args_.channel_step];
    }
    return _mm512_load_si512(values);
  }

 private:
  const WeightArgs& args_;
  alignas(64) int32_t steps_[16];
};

inline __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// 16 output channels by 32 input channels of a tap: half a block.
template <int planes>
void pack_half(const WeightArgs& args, const Channels& channels, int64_t half, int64_t tap, uint16_t* packed) {
  __m512i rows[planes][16];
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t output = 16 * half + i;
    int64_t at = tap + output * args.output_step;
    uint32_t wanted = 0xffffffff;
    if (args.channels < kVector) {
      const int64_t first = output / args.channels * args.channels;
      at -= first * args.channel_step;
      wanted = ((1u << args.channels) - 1) << first;
    }
    if (!args.float32) {
      rows[0][i] = channels.bfloat16s(at, wanted);
      continue;
    }
    const __m512 low = channels.floats(at, wanted, 0), high = channels.floats(at, wanted, 1);
    __m256i low_parts[planes], high_parts[planes];
    split<planes>(low, low_parts);
    split<planes>(high, high_parts);
    for (int plane = 0; plane < planes; ++plane) rows[plane][i] = join(low_parts[plane], high_parts[plane]);
  }
  for (int plane = 0; plane < planes; ++plane) {
    transpose(rows[plane]);
    uint16_t* to = packed + plane * kBlockValues + half * kBlockValues / 2;
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, rows[plane][i]);
  }
}

template <int planes>
void pack(const WeightArgs& args) {
  const Channels channels(args);
  const int64_t blocks = args.channels < kVector ? 1 : args.channels / kVector, taps = args.rows * args.columns;
  const auto pack_step = [&](int64_t block, int64_t tap, int64_t half) {
    const int64_t at = tap / args.columns * args.row_step + tap % args.columns * args.column_step;
    pack_half<planes>(args, channels, half, at + block * kVector * args.channel_step,
                      args.packed + (block * taps + tap) * planes * kBlockValues);
  };
  // In the order of memory, whose lines then come before they are asked for.
  for (int64_t half = 0; half < 2; ++half) {
    if (args.channel_step == 1) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        for (int64_t block = 0; block < blocks; ++block) pack_step(block, tap, half);
      }
    } else {
      for (int64_t block = 0; block < blocks; ++block) {
        for (int64_t tap = 0; tap < taps; ++tap) pack_step(block, tap, half);
      }
    }
  }
}

// 16 output channels by 32 input channels at the 16 points: half a block of each, `point_step` values apart.
void pack_winograd_half(
    const WeightArgs& args, const Channels& channels, int64_t half, int64_t first, uint16_t* packed, int64_t point_step) {
  __m512i rows[kWinogradPoints][16];
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t at = first + (16 * half + i) * args.output_step;
    __m256i parts[kWinogradPoints][2];
    for (int64_t lanes = 0; lanes < 2; ++lanes) {
      __m512 w[9], points[kWinogradPoints];
      for (int64_t tap = 0; tap < 9; ++tap) {
        const int64_t from = at + tap / 3 * args.row_step + tap % 3 * args.column_step;
        w[tap] = args.float32 ? channels.floats(from, ~0u, lanes) : channels.widened(from, lanes);
      }
      transform_square<transform_weight, kWinogradTaps, kWinogradIn>(w, points);
      for (int64_t point = 0; point < kWinogradPoints; ++point) parts[point][lanes] = narrow(points[point]);
    }
    for (int64_t point = 0; point < kWinogradPoints; ++point) rows[point][i] = join(parts[point][0], parts[point][1]);
  }
  for (int64_t point = 0; point < kWinogradPoints; ++point) {
    transpose(rows[point]);
    uint16_t* to = packed + point * point_step + half * kBlockValues / 2;
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(to + 32 * i, rows[point][i]);
  }
}

// The same where output channels lie one behind another: they are the lanes, and nothing is turned.
template <typename Value>
void pack_winograd_columns(
    const WeightArgs& args, int64_t half, int64_t first, uint16_t* packed, int64_t point_step) {
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    __m512i parts[2][kWinogradPoints];
    for (int64_t i = 0; i < 2; ++i) {
      const Value* weight = static_cast<const Value*>(args.weight) + first + 16 * half + (2 * pair + i) * args.channel_step;
      __m512 w[9], points[kWinogradPoints];
      for (int64_t tap = 0; tap < 9; ++tap) w[tap] = load(weight + tap / 3 * args.row_step + tap % 3 * args.column_step);
      transform_square<transform_weight, kWinogradTaps, kWinogradIn>(w, points);
      for (int64_t point = 0; point < kWinogradPoints; ++point) {
        parts[i][point] = _mm512_cvtepu16_epi32(narrow(points[point]));
      }
    }
    for (int64_t point = 0; point < kWinogradPoints; ++point) {
      const __m512i both = _mm512_or_si512(parts[0][point], _mm512_slli_epi32(parts[1][point], 16));
      _mm512_storeu_si512(packed + point * point_step + half * kBlockValues / 2 + pair * kVector, both);
    }
  }
}

}  // namespace

void pack_winograd_weights(const WeightArgs& args) {
  const Channels channels(args);
  const int64_t blocks = args.channels / kVector;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = block * kVector * args.channel_step, point_step = blocks * kBlockValues;
      uint16_t* packed = args.packed + block * kBlockValues;
      if (args.output_step != 1) {
        pack_winograd_half(args, channels, half, first, packed, point_step);
      } else if (args.float32) {
        pack_winograd_columns<float>(args, half, first, packed, point_step);
      } else {
        pack_winograd_columns<uint16_t>(args, half, first, packed, point_step);
      }
    }
  }
}

void pack_weights(const WeightArgs& args) { args.planes == 3 ? pack<3>(args) : pack<1>(args); }

void fold_norm(const NormArgs& args) {
  for (int64_t c = 0; c < args.channels; ++c) {
    const float rstd = 1.0f / __builtin_sqrtf(args.var[c] + args.eps);
    args.scale[c] = args.weight == nullptr ? rstd : rstd * args.weight[c];
    args.bias[c] = (args.norm_bias == nullptr ? 0.0f : args.norm_bias[c]) - args.mean[c] * args.scale[c];
  }
}

bool all_finite(const uint16_t* values, int64_t count) {
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 infinite = 0;
  for (int64_t i = 0; i < count; i += 32) {
    const __mmask32 mask = count - i >= 32 ? 0xffffffff : (1u << (count - i)) - 1;
    const __m512i x = _mm512_and_si512(_mm512_maskz_loadu_epi16(mask, values + i), exponent);
    infinite |= _mm512_cmpeq_epi16_mask(x, exponent);
  }
  return infinite == 0;
}

}  // namespace resnet_fast::cpu::amx
