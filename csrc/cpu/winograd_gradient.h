// The gradient of a 3x3 kernel with stride and padding 1 by Winograd in float32: see csrc/ops.cpp for the schema.
//
// 24 products where the convolution's gradient has 72.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// The gradient of weight (K, C, 3, 3), in its memory format, for act(norm(x)) and dy in channels_last; and whether it is
// finite. Where not, it is of no use.
std::tuple<Tensor, bool> winograd_weight_gradient(
    const Tensor& dy, const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& weight);

}  // namespace resnet_fast::cpu
