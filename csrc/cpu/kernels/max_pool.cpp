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

// [first, last) of the pixels in window `at`.
struct Reach {
  int64_t first, last;
};

C10_ALWAYS_INLINE Reach pixels_of(int64_t window, int64_t size) {
  const int64_t first = window * kStride - kPadding;
  return {first < 0 ? 0 : first, smaller(first + kWindow, size)};
}

C10_ALWAYS_INLINE int64_t place_in(int64_t window, int64_t pixel) { return pixel - (window * kStride - kPadding); }

template <typename scalar_t>
C10_ALWAYS_INLINE void store_index(const Lanes<scalar_t>& places, uint8_t* to, int64_t count) {
  acc_type<scalar_t> lanes[Lanes<scalar_t>::size];
  places.store_acc(lanes);
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<uint8_t>(lanes[i]);
}

// Of one window: its gradient, and the place of its maximum; of none, a place that no pixel has.
template <typename scalar_t>
struct Window {
  using L = Lanes<scalar_t>;
  using Vec = typename L::Vec;
  L grad, index;

  template <typename Span>
  C10_ALWAYS_INLINE Window(const MaxPoolArgs& args, int64_t row, int64_t column, int64_t channel, Span span) {
    if (row >= args.pooled_height || column >= args.pooled_width) {
      grad = L::fill(0), index = L::fill(-1);
      return;
    }
    const int64_t at = (row * args.pooled_width + column) * args.channels + channel;
    grad = L::load(static_cast<const scalar_t*>(args.y) + at, span);
    acc_type<scalar_t> places[L::size];
    for (int64_t i = 0; i < count_of<L>(span); ++i) places[i] = args.index[at + i];
    index = L::load_acc(places);
  }

  // Its gradient where the maximum is at `place`, else zero.
  C10_ALWAYS_INLINE L of(int place) const {
    L out;
    for (int part = 0; part < L::parts; ++part) {
      const Vec here = index.v[part] == Vec(static_cast<acc_type<scalar_t>>(place));
      out.v[part] = Vec::blendv(Vec(0), grad.v[part], here);
    }
    return out;
  }
};

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
              if constexpr (with_index) {
                const Vec taken = (value.v[part] > best.v[part]) | (value.v[part] != value.v[part]);
                best.v[part] = Vec::blendv(best.v[part], value.v[part], taken);
                places.v[part] = Vec::blendv(places.v[part], place, taken);
              } else {
                best.v[part] = at::vec::maximum(best.v[part], value.v[part]);
              }
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

// By twos of rows and columns: of such four pixels the first is in the middle of one window, the last in a corner of four.
template <typename scalar_t>
void max_unpool(const MaxPoolArgs& args, int64_t begin, int64_t end) {
  using L = Lanes<scalar_t>;
  const int64_t channels = args.channels, row_step = args.width * channels;
  for (int64_t row = begin; row < end; row += kStride) {
    const bool below = row + 1 < end;
    for (int64_t column = 0; column < args.width; column += kStride) {
      const bool beside = column + 1 < args.width;
      scalar_t* out = static_cast<scalar_t*>(args.x) + (row - args.first_row) * row_step + column * channels;
      for_each_vector<L::size>(channels, [&](int64_t channel, auto span) RF_INLINE_LAMBDA {
        const int64_t i = row / kStride, j = column / kStride;
        const Window<scalar_t> own(args, i, j, channel, span), right(args, i, j + 1, channel, span);
        const Window<scalar_t> under(args, i + 1, j, channel, span), across(args, i + 1, j + 1, channel, span);
        scalar_t* to = out + channel;
        own.of(4).store(to, span);
        if (beside) (own.of(5) + right.of(3)).store(to + channels, span);
        if (below) (own.of(7) + under.of(1)).store(to + row_step, span);
        if (below && beside) {
          (own.of(8) + right.of(6) + under.of(2) + across.of(0)).store(to + row_step + channels, span);
        }
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
