// 3x3s of bfloat16 with stride and padding 1, and their gradients, by Winograd's F(2x2, 3x3) in dot products: see
// csrc/ops.cpp for the schemas. They raise where the CPU, or this build, has none.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// conv2d(x, weight, padding=1) + add, and whether all of it is finite: where not, y is of no use. weight (K, C, 3, 3) of
// multiples of 32 channels, bfloat16 or float32; x and add bfloat16 in channels_last. turned: the convolution with the
// kernels turned by 180 degrees and from K channels to C, which gives the gradient of x for that of y.
std::tuple<Tensor, bool> winograd_dots_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& add, bool turned);

// The gradient of weight (K, C, 3, 3), in its memory format, all of it bfloat16, dy and x in channels_last; as above.
std::tuple<Tensor, bool> winograd_dots_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight);

}  // namespace resnet_fast::cpu
