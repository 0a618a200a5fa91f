// Between tensors and blocked activations.
#include <algorithm>

#include "amx.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

inline __m512 load_masked(const void* tensor, bool float32, int64_t at, __mmask16 mask) {
  if (float32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(tensor) + at);
  return widen(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(tensor) + at));
}

inline __mmask16 lanes(int64_t wanted) {
  return wanted >= 16 ? 0xffff : static_cast<__mmask16>((1u << (wanted < 0 ? 0 : wanted)) - 1);
}

// 16 pixels by 4 channels, one vector a channel, as 4 vectors of 4 pixels by 4 channels.
inline void interleave(const __m512 (&channel)[4], __m512 (&pixels)[4]) {
  const __m512 low01 = _mm512_unpacklo_ps(channel[0], channel[1]), high01 = _mm512_unpackhi_ps(channel[0], channel[1]);
  const __m512 low23 = _mm512_unpacklo_ps(channel[2], channel[3]), high23 = _mm512_unpackhi_ps(channel[2], channel[3]);
  const auto join = [](__m512 a, __m512 b, bool high) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_castpd_ps(high ? _mm512_unpackhi_pd(x, y) : _mm512_unpacklo_pd(x, y));
  };
  // q[i] holds pixel i of every 128-bit lane: pixels i, 4 + i, 8 + i, 12 + i.
  const __m512 q[4] = {join(low01, low23, false), join(low01, low23, true), join(high01, high23, false),
                       join(high01, high23, true)};
  const __m512 a = _mm512_shuffle_f32x4(q[0], q[1], 0x44), b = _mm512_shuffle_f32x4(q[2], q[3], 0x44);
  const __m512 c = _mm512_shuffle_f32x4(q[0], q[1], 0xee), d = _mm512_shuffle_f32x4(q[2], q[3], 0xee);
  pixels[0] = _mm512_shuffle_f32x4(a, b, 0x88);
  pixels[1] = _mm512_shuffle_f32x4(a, b, 0xdd);
  pixels[2] = _mm512_shuffle_f32x4(c, d, 0x88);
  pixels[3] = _mm512_shuffle_f32x4(c, d, 0xdd);
}

// The first `count` of 16 values.
template <int planes>
inline void store_first(uint16_t* y, int64_t plane, __m512 values, int64_t count) {
  __m256i parts[planes];
  split<planes>(values, parts);
  for (int64_t i = 0; i < planes; ++i) _mm256_mask_storeu_epi16(y + i * plane, lanes(count), parts[i]);
}

// A row whose channels are planes, or anyhow else: 16 pixels at a time.
template <int planes>
void pack_planar_row(const ImageArgs& args, int64_t from, uint16_t* y) {
  const __mmask16 real = lanes(args.channels) * 0x1111;
  for (int64_t column = 0; column < args.width; column += 16) {
    const int64_t wanted = args.width - column < 16 ? args.width - column : 16;
    __m512 channel[4], pixels[4];
    for (int64_t c = 0; c < 4; ++c) {
      const int64_t at = from + c * args.channel_step + column * args.pixel_step;
      if (c >= args.channels) {
        channel[c] = _mm512_setzero_ps();
      } else if (args.pixel_step == 1) {
        channel[c] = load_masked(args.x, args.float32, at, lanes(wanted));
      } else {
        alignas(64) float values[16] = {};
        for (int64_t i = 0; i < wanted; ++i) {
          values[i] = _mm512_cvtss_f32(load_masked(args.x, args.float32, at + i * args.pixel_step, 1));
        }
        channel[c] = _mm512_load_ps(values);
      }
    }
    interleave(channel, pixels);
    for (int64_t i = 0; 4 * i < wanted; ++i) {
      const int64_t count = wanted - 4 * i < 4 ? wanted - 4 * i : 4;
      store_first<planes>(y + (column + 4 * i) * args.channels, args.y_plane, _mm512_maskz_compress_ps(real, pixels[i]),
                          count * args.channels);
    }
  }
}

// A row whose pixels are `channels` values in a row, as in channels_last.
template <int planes>
void pack_interleaved_row(const ImageArgs& args, int64_t from, uint16_t* y) {
  const int64_t values = args.width * args.channels;
  if (planes == 1 && !args.float32) {
    std::copy_n(static_cast<const uint16_t*>(args.x) + from, values, y);
    return;
  }
  for (int64_t i = 0; i < values; i += 16) {
    store_first<planes>(y + i, args.y_plane, load_masked(args.x, args.float32, from + i, lanes(values - i)), values - i);
  }
}

template <int planes>
void pack_image_rows(const ImageArgs& args) {
  const bool interleaved = args.channel_step == 1 && args.pixel_step == args.channels;
  for (int64_t row = 0; row < args.height; ++row) {
    uint16_t* y = args.y + row * args.y_pitch;
    if (interleaved) {
      pack_interleaved_row<planes>(args, row * args.row_step, y);
    } else {
      pack_planar_row<planes>(args, row * args.row_step, y);
    }
  }
}

// f(blocked values, their number in the tensor, their channel), for every `step` channels of every row.
template <int64_t step, typename Args, typename F>
void each(const Args& args, const F& f) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t channel = 0; channel < args.channels; channel += step) {
      f(args.blocked + row * args.row + channel / kVector * args.block + channel % kVector,
        row * args.tensor_row + channel, channel);
    }
  }
}

// Whether values stay as they are, whole vectors of them.
template <int planes, typename Args>
bool are_copied(const Args& args) {
  return planes == 1 && !args.float32 && args.channels % kVector == 0;
}

template <int planes>
bool unpack(const RowsArgs& args) {
  if (are_copied<planes>(args)) {
    each<kVector>(args, [&](const uint16_t* from, int64_t at, int64_t) {
      std::copy_n(from, kVector, static_cast<uint16_t*>(args.tensor) + at);
    });
    return true;
  }
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  __mmask16 finite = 0xffff;
  each<16>(args, [&](const uint16_t* from, int64_t at, int64_t channel) {
    const __m512 value = load<planes>(from, args.plane);
    const __mmask16 mask = lanes(args.channels - channel);
    if constexpr (planes == 3) finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(value), infinity, _CMP_LT_OQ);
    if (args.float32) {
      _mm512_mask_storeu_ps(static_cast<float*>(args.tensor) + at, mask, value);
    } else {
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(args.tensor) + at, mask, narrow(value));
    }
  });
  return finite == 0xffff;
}

template <int planes>
void pack(const PackRowsArgs& args) {
  if (are_copied<planes>(args)) {
    each<kVector>(args, [&](uint16_t* to, int64_t at, int64_t) {
      std::copy_n(static_cast<const uint16_t*>(args.tensor) + at, kVector, to);
    });
    return;
  }
  each<16>(args, [&](uint16_t* to, int64_t at, int64_t channel) {
    store<planes>(to, args.plane, load_masked(args.tensor, args.float32, at, lanes(args.channels - channel)));
  });
}

}  // namespace

void pack_image(const ImageArgs& args) { args.planes == 3 ? pack_image_rows<3>(args) : pack_image_rows<1>(args); }

bool unpack_rows(const RowsArgs& args) { return args.planes == 3 ? unpack<3>(args) : unpack<1>(args); }

void pack_rows(const PackRowsArgs& args) { args.planes == 3 ? pack<3>(args) : pack<1>(args); }

}  // namespace resnet_fast::cpu::amx
