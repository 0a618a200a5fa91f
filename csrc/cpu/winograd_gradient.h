// The gradient of a 3x3 kernel with stride and padding 1 by Winograd in float32: see csrc/ops.cpp for the schema.
//
// 24 products where the convolution's gradient has 72.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace resnet_fast::cpu {

// The gradient of weight (K, C, 3, 3), in its memory format, for x and dy in channels_last; and whether it is finite.
// Where not, it is of no use.
std::tuple<at::Tensor, bool> winograd_weight_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight);

}  // namespace resnet_fast::cpu
