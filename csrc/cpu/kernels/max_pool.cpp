// Max-pooling and its gradient, a vector of channels at a time. See kernels.h for what they read and write.
//
// The gradient gathers: a pixel is in four windows at most, and in which of them it is the maximum their indices say.
#include <limits>

#include "blocks.h"
#include "kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

constexpr int64_t kWindow = 3, kStride = 2, kPadding = 1;

// [first, last) of the pixels in window `at`, or of the windows with pixel `at`.
struct Reach {
  int64_t first, last;
};

C10_ALWAYS_INLINE Reach pixels_of(int64_t window, int64_t size) {
  const int64_t first = window * kStride - kPadding;
  return {first < 0 ? 0 : first, smaller(first + kWindow, size)};
}

C10_ALWAYS_INLINE Reach windows_of(int64_t pixel, int64_t windows) {
  return {(pixel + kPadding - kWindow + kStride) / kStride, smaller((pixel + kPadding) / kStride + 1, windows)};
}

C10_ALWAYS_INLINE int64_t place_in(int64_t window, int64_t pixel) { return pixel - (window * kStride - kPadding); }

template <typename scalar_t>
C10_ALWAYS_INLINE void store_index(const Lanes<scalar_t>& places, uint8_t* to, int64_t count) {
  acc_type<scalar_t> lanes[Lanes<scalar_t>::size];
  places.store_acc(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
}

template <typename scalar_t>
C10_ALWAYS_INLINE Lanes<scalar_t> load_index(const uint8_t* from, int64_t count) {
  acc_type<scalar_t> lanes[Lanes<scalar_t>::size] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = from[i];
  return Lanes<scalar_t>::load_acc(lanes);
}

template <typename L>
constexpr int64_t count_of(Full) {
  return L::size;
}
template <typename L>
C10_ALWAYS_INLINE int64_t count_of(Part part) {
  return part.count;
}

template <typename scalar_t, bool with_index>
void pool_rows(const MaxPoolArgs& args, int64_t begin, int64_t end) {
  using L = Lanes<scalar_t>;
  using Vec = typename L::Vec;
  const int64_t channels = args.channels, row_step = args.width * channels;
  const auto* x = static_cast<const scalar_t*>(args.x);
  auto* y = static_cast<scalar_t*>(args.y);
  for (int64_t row = begin; row < end; ++row) {
    const Reach down = pixels_of(row, args.height);
    for (int64_t column = 0; column < args.pooled_width; ++column) {
      const Reach right = pixels_of(column, args.width);
      const int64_t out = (row * args.pooled_width + column) * channels;
      for_each_vector<L::size>(channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
        L best = L::fill(-std::numeric_limits<acc_type<scalar_t>>::infinity()), places = L::fill(0);
        for (int64_t i = down.first; i < down.last; ++i) {
          for (int64_t j = right.first; j < right.last; ++j) {
            const L value = L::load(x + (i - args.first_row) * row_step + j * channels + channel, span);
            const Vec place(static_cast<acc_type<scalar_t>>(place_in(row, i) * kWindow + place_in(column, j)));
            for (int part = 0; part < L::parts; ++part) {
              const Vec taken = (value.v[part] > best.v[part]) | (value.v[part] != value.v[part]);
              best.v[part] = Vec::blendv(best.v[part], value.v[part], taken);
              if constexpr (with_index) places.v[part] = Vec::blendv(places.v[part], place, taken);
            }
          }
        }
        best.store(y + out + channel, span);
        if constexpr (with_index) store_index<scalar_t>(places, args.index + out + channel, count_of<L>(span));
      });
    }
  }
}

}  // namespace

template <typename scalar_t>
void max_pool(const MaxPoolArgs& args, int64_t begin, int64_t end) {
  if (args.index != nullptr) {
    pool_rows<scalar_t, true>(args, begin, end);
  } else {
    pool_rows<scalar_t, false>(args, begin, end);
  }
}

template <typename scalar_t>
void max_unpool(const MaxPoolArgs& args, int64_t begin, int64_t end) {
  using L = Lanes<scalar_t>;
  using Vec = typename L::Vec;
  const int64_t channels = args.channels, row_step = args.width * channels;
  auto* dx = static_cast<scalar_t*>(args.x);
  const auto* dy = static_cast<const scalar_t*>(args.y);
  for (int64_t row = begin; row < end; ++row) {
    const Reach down = windows_of(row, args.pooled_height);
    for (int64_t column = 0; column < args.width; ++column) {
      const Reach right = windows_of(column, args.pooled_width);
      scalar_t* out = dx + (row - args.first_row) * row_step + column * channels;
      for_each_vector<L::size>(channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
        L sum = L::fill(0);
        for (int64_t i = down.first; i < down.last; ++i) {
          for (int64_t j = right.first; j < right.last; ++j) {
            const int64_t at = (i * args.pooled_width + j) * channels + channel;
            const Vec place(static_cast<acc_type<scalar_t>>(place_in(i, row) * kWindow + place_in(j, column)));
            const L grad = L::load(dy + at, span), index = load_index<scalar_t>(args.index + at, count_of<L>(span));
            for (int part = 0; part < L::parts; ++part) {
              sum.v[part] = sum.v[part] + Vec::blendv(Vec(0), grad.v[part], index.v[part] == place);
            }
          }
        }
        sum.store(out + channel, span);
      });
    }
  }
}

#define RF_INSTANTIATE(scalar_t)                                              \
  template void max_pool<scalar_t>(const MaxPoolArgs&, int64_t, int64_t);     \
  template void max_unpool<scalar_t>(const MaxPoolArgs&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(c10::BFloat16)
RF_INSTANTIATE(c10::Half)

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
