// Dense convolutions in float32 without transforms: see csrc/ops.cpp for the schemas.
//
// By weights that may change, all of which oneDNN packs in every call, and then reads again: here each part is packed where
// it is multiplied, in the cache, so that memory is read once. And by weights that are packed once. Few channels without
// dilation are an image's (direct_image.h). What is not finite goes where IEEE arithmetic lets it; padding is zeros, which a
// NaN or Inf in the weight makes NaN.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// act(conv2d(x, weight) * scale + bias + residual), in channels_last. weight (K, C, R, S) of at most 64 taps, scale and
// bias (K,).
Tensor direct_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu);

// (K, C, R, S) -> [panel of 64 outputs][R][S][C][64], within a panel in the order of this CPU's kernel.
Tensor direct_pack(const Tensor& weight);

// act(conv2d(x, weight) + bias + residual) by a packed weight. onto: into the residual, if it is in channels_last.
Tensor direct_conv_packed(
    const Tensor& x, const Tensor& packed, int64_t out_channels, const OptionalTensor& bias, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu, bool onto);

// max_pool2d(relu(conv2d(x, weight) * scale + bias), 3, stride 2, padding 1) by a packed weight; with few channels and no
// dilation in one pass.
Tensor direct_conv_max_pool(
    const Tensor& x, const Tensor& packed, int64_t out_channels, const OptionalTensor& scale, const OptionalTensor& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation);

}  // namespace resnet_fast::cpu
