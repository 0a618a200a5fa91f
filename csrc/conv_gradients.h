// The gradients of a convolution, by the library of whatever device it is on.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace resnet_fast {

// dx, dconv_weight, dconv_bias: those that `wanted` names, the others empty. dconv_out: undefined if none is wanted.
std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_gradients(
    const at::Tensor& dconv_out, const at::Tensor& x, const at::Tensor& conv_weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> wanted);

}  // namespace resnet_fast
