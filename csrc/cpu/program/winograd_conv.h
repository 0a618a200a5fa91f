// A 3x3 of bfloat16 and its gradients by Winograd's F(2x2, 3x3) in dot products, from tensor to tensor.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace resnet_fast::cpu {

// conv2d(x, weight, padding=1) + add, and whether all of it is finite: where not, y is of no use. weight (K, C, 3, 3) of
// multiples of 32 channels, bfloat16 or float32; x and add bfloat16 in channels_last, add may be undefined. turned: the
// convolution with the kernels turned by 180 degrees and from K channels to C, which gives the gradient of x for that of y.
std::tuple<at::Tensor, bool> dots_winograd_conv(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& add, bool turned);

// The gradient of weight (K, C, 3, 3), in its memory format, all of it bfloat16, dy and x in channels_last; as above.
std::tuple<at::Tensor, bool> dots_winograd_weight_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight);

}  // namespace resnet_fast::cpu
