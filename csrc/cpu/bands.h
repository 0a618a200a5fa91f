// Images cut into bands of rows, which threads share out: for max-pooling by windows of 3x3 with stride 2 and padding 1, and
// for convolutions of images.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>

#include "integers.h"
#include "shared_items.h"

namespace resnet_fast::cpu {

// Rows, or columns, of so many pixels pooled.
inline int64_t pooled_size(int64_t size) { return (size - 1) / 2 + 1; }

// Rows [first, last) of an image; the number counts the bands of all. follows: whether its thread's band before was the one
// above.
struct Band {
  int64_t number, image, first, last;
  bool follows;
};

// Of images of so many rows, `step` at a time.
struct Bands {
  int64_t rows, step, in_image;

  Bands(int64_t rows, int64_t step) : rows(rows), step(step), in_image(div_up(rows, step)) {}

  // f(band), of some neighbours in order by one thread.
  template <typename F>
  void each(int64_t images, const F& f) const {
    const int64_t bands = images * in_image, a_thread = div_up(bands, at::get_num_threads());
    // An image, where there are enough: what follows nothing computes some rows again.
    share_pieces(bands, piece_of(bands, std::min(in_image, a_thread)), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % in_image * step;
        f(Band{i, i / in_image, first, std::min(first + step, rows), i > begin && first > 0});
      }
    });
  }
};

}  // namespace resnet_fast::cpu
