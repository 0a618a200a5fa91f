// A training step's convolutions by AMX tile products (amx/train.h): see csrc/ops.cpp for the schemas.
//
// x is in channels_last, bfloat16 or float32, of 32 channels or a multiple, as is the output; no groups. What is not
// finite, where float32's planes are no longer exact, goes to PyTorch's convolution.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// conv_out, mean, var (biased); the last two empty where not wanted
std::tuple<Tensor, Tensor, Tensor> conv_train(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool statistics);

// The gradients of act(norm(x)), plus `add`, and of conv_weight; empty where not wanted
std::tuple<Tensor, Tensor> conv_train_backward(
    const Tensor& dconv_out, const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    std::array<bool, 2> output_mask);

}  // namespace resnet_fast::cpu
