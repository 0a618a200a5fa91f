// Convolution + batch norm + residual + ReLU on the CPU: see csrc/ops.cpp for the schemas.
#pragma once

#include "bn_act.h"

namespace resnet_fast::cpu {

Tensor conv_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu);

// y, conv_out, mean, var (biased)
std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_train(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double eps, bool relu);

// dx, dconv_weight, dconv_bias, dweight, dbias, dresidual
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& conv_weight, const Tensor& conv_out, const OptionalTensor& y,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu,
    bool training, std::array<bool, 6> output_mask);

}  // namespace resnet_fast::cpu
