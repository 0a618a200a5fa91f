// 3x3 convolutions by Winograd's F(4x4, 3x3) in float32: see csrc/ops.cpp for the schemas.
//
// 36 products where the convolution has 144. x is in channels_last; packing makes 36 values of each kernel's nine.
// An output's error follows the largest values of its tile of 6x6 pixels, not of its own 3x3.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// (K, C, 3, 3) -> G w G', [36][panel of 64 output channels][C][64], within a panel in the order of this CPU's kernel;
// beyond K, in the last panel, the last is repeated.
Tensor winograd_pack(const Tensor& weight);

// act(conv2d(x, weight, padding=1) + bias + residual) by a packed weight, and whether every value of the convolution was
// finite. Where not, y is of no use: the transforms spread NaN and Inf over a tile.
std::tuple<Tensor, bool> winograd_conv_packed(
    const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t out_channels,
    const OptionalTensor& residual, bool relu);

// The same by a weight (K, C, 3, 3) times `scale` (K,), bit for bit. turned: the convolution with the kernels turned by
// 180 degrees and from K channels to C, which gives the gradient of x for that of y.
std::tuple<Tensor, bool> winograd_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, bool relu, bool turned);

// A training step's: conv2d(act(norm(x)), weight, padding=1), its mean and biased variance (K,), which are empty where not
// wanted, and whether all of it was finite.
std::tuple<Tensor, Tensor, Tensor, bool> winograd_conv_train(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& weight, bool statistics);

}  // namespace resnet_fast::cpu
