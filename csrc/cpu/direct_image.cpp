// Threads share out bands of rows, whose pixels stay in the cache from their copying to the last output. A value's sum has
// a fixed order, so no bit depends on bands or threads.
#include "direct_image.h"

#include <algorithm>
#include <cstring>

#include "bands.h"
#include "direct_sizes.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kMostRows = 8;  // of y that a band adds

// What the kernel copies for so many rows of y.
Scratch room(const DirectConv& conv, int64_t rows) {
  return Scratch(((rows - 1) * conv.stride[0] + conv.kernel_rows) * direct_image_row(conv), at::kFloat);
}

// At most `most` rows at a time, and fewer where there are threads for them.
Bands bands_of(int64_t images, int64_t rows, int64_t most) {
  return {rows, std::clamp<int64_t>(images * rows / at::get_num_threads(), 1, most)};
}

}  // namespace

bool is_of_image(const DirectConv& conv) {
  return conv.channels <= kDirectFewChannels && conv.dilation[0] == 1 && conv.dilation[1] == 1;
}

void image_conv(const DirectConv& conv, int64_t images, const float* packed) {
  const Scratch copied = room(conv, kMostRows);
  bands_of(images, conv.out_height, kMostRows).each(images, [&](const Band& band) {
    const int64_t pixel = (band.image * conv.out_height + band.first) * conv.out_width;
    float* const rows = static_cast<float*>(copied.mine());
    conv_kernels().direct_conv_image(conv, packed, band.image, band.first, band.last, pixel, rows);
  });
}

void image_conv_max_pool(const DirectConv& conv, int64_t images, const float* packed, float* pooled) {
  const int64_t row = conv.out_width * conv.outputs;  // of y
  MaxPoolArgs pool{
      conv.outputs, conv.out_height, conv.out_width, pooled_size(conv.out_height), pooled_size(conv.out_width)};
  const Scratch copied = room(conv, kMostRows + 1), convolved((kMostRows + 1) * row, at::kFloat);
  bands_of(images, pool.pooled_height, kMostRows / 2).each(images, [&](const Band& band) {
    // Of y, in `convolved`: the row above the middle of the first window, which is there if the band follows, and so on.
    const int64_t above = 2 * band.first - 1, end = std::min(2 * band.last, conv.out_height);
    const int64_t begin = std::max<int64_t>(band.follows ? above + 1 : above, 0);
    float* const y = static_cast<float*>(convolved.mine());
    DirectConv part = conv;
    part.y = y;
    const int64_t pixel = (begin - above) * conv.out_width;
    conv_kernels().direct_conv_image(part, packed, band.image, begin, end, pixel, static_cast<float*>(copied.mine()));
    MaxPoolArgs here = pool;
    here.x = y;
    here.first_row = above;
    here.y = pooled + band.image * here.pooled_height * here.pooled_width * here.channels;
    kernels().max_pool[kFloat32](here, band.first, band.last);
    std::memcpy(y, y + (end - 1 - above) * row, row * sizeof(float));
  });
}

}  // namespace resnet_fast::cpu
