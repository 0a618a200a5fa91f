// Threads share out bands of rows, whose pixels stay in the cache from their copying to the last output. A value's sum has
// a fixed order, so no bit depends on bands or threads.
#include "direct_image.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "direct_sizes.h"
#include "integers.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kMostRows = 8;  // of y that a band adds

int64_t pooled_size(int64_t size) { return (size - 1) / 2 + 1; }

// What the kernel copies for so many rows of y.
Scratch room(const DirectConv& conv, int64_t rows) {
  return Scratch(((rows - 1) * conv.stride[0] + conv.kernel_rows) * direct_image_row(conv), at::kFloat);
}

// `rows` of each image cut into bands of at most `most`; each(image, first, last, follows) in a thread, in order. follows:
// whether the thread's band before was the one above.
template <typename F>
void bands(int64_t images, int64_t rows, int64_t most, const F& each) {
  const int64_t step = std::clamp<int64_t>(images * rows / at::get_num_threads(), 1, most), in_image = div_up(rows, step);
  at::parallel_for(0, images * in_image, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % in_image * step;
      each(i / in_image, first, std::min(first + step, rows), i > begin && first > 0);
    }
  });
}

}  // namespace

bool is_of_image(const DirectConv& conv) {
  return conv.channels <= kDirectFewChannels && conv.dilation[0] == 1 && conv.dilation[1] == 1;
}

void image_conv(const DirectConv& conv, int64_t images, const float* packed) {
  const Scratch copied = room(conv, kMostRows);
  bands(images, conv.out_height, kMostRows, [&](int64_t image, int64_t first, int64_t last, bool) {
    const int64_t pixel = (image * conv.out_height + first) * conv.out_width;
    kernels().direct_conv_image(conv, packed, image, first, last, pixel, static_cast<float*>(copied.mine()));
  });
}

void image_conv_max_pool(const DirectConv& conv, int64_t images, const float* packed, float* pooled) {
  const int64_t row = conv.out_width * conv.outputs;  // of y
  MaxPoolArgs pool{
      conv.outputs, conv.out_height, conv.out_width, pooled_size(conv.out_height), pooled_size(conv.out_width)};
  const Scratch copied = room(conv, kMostRows + 1), convolved((kMostRows + 1) * row, at::kFloat);
  bands(images, pool.pooled_height, kMostRows / 2, [&](int64_t image, int64_t first, int64_t last, bool follows) {
    // Of y, in `convolved`: the row above the middle of the first window, which is there if the band follows, and so on.
    const int64_t above = 2 * first - 1, end = std::min(2 * last, conv.out_height);
    const int64_t begin = std::max<int64_t>(follows ? above + 1 : above, 0);
    float* const y = static_cast<float*>(convolved.mine());
    DirectConv band = conv;
    band.y = y;
    const int64_t pixel = (begin - above) * conv.out_width;
    kernels().direct_conv_image(band, packed, image, begin, end, pixel, static_cast<float*>(copied.mine()));
    MaxPoolArgs here = pool;
    here.x = y;
    here.first_row = above;
    here.y = pooled + image * here.pooled_height * here.pooled_width * here.channels;
    kernels().max_pool[kFloat32](here, first, last);
    std::memcpy(y, y + (end - 1 - above) * row, row * sizeof(float));
  });
}

}  // namespace resnet_fast::cpu
