// The direct convolution of few channels: of an image, whose rows are copied with their padding.
#pragma once

#include <cstdint>

#include "conv_kernels.h"

namespace resnet_fast::cpu {

// Whether its kernel computes `conv`.
bool is_of_image(const DirectConv& conv);

// y of all images, by the packed weight.
void image_conv(const DirectConv& conv, int64_t images, const float* packed);

// pooled = max_pool(y, 3, stride 2, padding 1); y, of which only a few rows exist at a time, is not read from conv.
void image_conv_max_pool(const DirectConv& conv, int64_t images, const float* packed, float* pooled);

}  // namespace resnet_fast::cpu
