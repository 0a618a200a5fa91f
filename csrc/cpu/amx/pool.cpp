// Pooling of blocked activations.
#include "amx.h"
#include "vectors.h"

namespace resnet_fast::cpu::amx {
namespace {

// The bits of values that are not negative order as integers do, NaN above infinity; -0 counts as 0.
inline __m512i magnitude(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
}

template <int planes>
void max_pool_block(const MaxPoolArgs& args) {
  for (int64_t row = 0; row < args.height; ++row) {
    for (int64_t column = 0; column < args.width; ++column) {
      const uint16_t* corner = args.x + (2 * row - 1) * args.x_pitch + (2 * column - 1) * args.x_pixel;
      uint16_t* y = args.y + row * args.y_pitch + column * args.y_pixel;
      for (int64_t half = 0; half < kVector; half += 16) {
        __m512i most = _mm512_setzero_si512();
        for (int64_t r = 0; r < 3; ++r) {
          for (int64_t s = 0; s < 3; ++s) {
            const uint16_t* x = corner + r * args.x_pitch + s * args.x_pixel + half;
            most = _mm512_max_epi32(most, magnitude(load<planes>(x, args.x_plane)));
          }
        }
        store<planes>(y + half, args.y_plane, _mm512_castsi512_ps(most));
      }
    }
  }
}

template <>
void max_pool_block<1>(const MaxPoolArgs& args) {
  const __m512i magnitudes = _mm512_set1_epi16(0x7fff);
  for (int64_t row = 0; row < args.height; ++row) {
    for (int64_t column = 0; column < args.width; ++column) {
      const uint16_t* corner = args.x + (2 * row - 1) * args.x_pitch + (2 * column - 1) * args.x_pixel;
      __m512i most = _mm512_setzero_si512();
      for (int64_t r = 0; r < 3; ++r) {
        for (int64_t s = 0; s < 3; ++s) {
          const __m512i x = _mm512_loadu_si512(corner + r * args.x_pitch + s * args.x_pixel);
          most = _mm512_max_epi16(most, _mm512_and_si512(x, magnitudes));
        }
      }
      _mm512_storeu_si512(args.y + row * args.y_pitch + column * args.y_pixel, most);
    }
  }
}

template <int planes>
void average_pool_row(const AveragePoolArgs& args) {
  const __m512 count = _mm512_set1_ps(static_cast<float>(args.height * args.width));
  for (int64_t half = 0; half < kVector; half += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t row = 0; row < args.height; ++row) {
      for (int64_t column = 0; column < args.width; ++column) {
        const uint16_t* x = args.x + row * args.x_pitch + column * args.x_pixel + half;
        sum = _mm512_add_ps(sum, load<planes>(x, args.x_plane));
      }
    }
    store<planes>(args.y + half, args.y_plane, _mm512_div_ps(sum, count));
  }
}

}  // namespace

void max_pool(const MaxPoolArgs& args) { args.planes == 3 ? max_pool_block<3>(args) : max_pool_block<1>(args); }

void average_pool(const AveragePoolArgs& args) {
  args.planes == 3 ? average_pool_row<3>(args) : average_pool_row<1>(args);
}

}  // namespace resnet_fast::cpu::amx
