// Dense convolutions in float32 by weights that may change: see csrc/ops.cpp for the schema.
//
// oneDNN packs all of such a weight in every call, and then reads it again. Here each part is packed where it is multiplied, in
// the cache, so that memory is read once. What is not finite goes where IEEE arithmetic lets it; padding is
// zeros, which a NaN or Inf in the weight makes NaN.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// act(conv2d(x, weight) * scale + bias + residual), in channels_last. weight (K, C, R, S) of at most 64 taps, scale and
// bias (K,).
Tensor direct_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu);

}  // namespace resnet_fast::cpu
