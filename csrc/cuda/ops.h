// The native ops on CUDA: see csrc/ops.cpp for the schemas, csrc/cpu for the CPU's twins.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>

namespace resnet_fast::cuda {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using NormTensors = c10::List<OptionalTensor>;  // mean, var, weight, bias; empty for no norm

// ---- bn_act_op.cpp ----

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu);

// y, mean, var (biased)
std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    bool relu);

// dx, dweight, dbias, dresidual
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, std::array<bool, 4> output_mask);

// ---- bn_train_op.cpp ----

// mean, var (biased)
std::tuple<Tensor, Tensor> bn_statistics(const Tensor& conv_out);

Tensor bn_apply(
    const Tensor& conv_out, const NormTensors& norm, double eps, const OptionalTensor& residual,
    const NormTensors& residual_norm, double residual_eps, bool relu);

// sum(dz), sum(dz * (conv_out - mean))
std::tuple<Tensor, Tensor> bn_backward_reduce(
    const Tensor& dy, const Tensor& conv_out, const NormTensors& norm, double eps, bool relu);

// The gradient of conv_out
Tensor bn_backward_apply(
    const Tensor& dy, const OptionalTensor& conv_out, const NormTensors& norm, double eps, bool relu,
    const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx);

// dy where y, a ReLU's output, is not <= 0; in layout_like's memory format
Tensor relu_mask(const Tensor& dy, const Tensor& y, const Tensor& layout_like);

// ---- conv_bn_act_op.cpp ----

Tensor conv_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu);

// y, conv_out, mean, var
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

// act(norm(conv2d(x) + conv_bias) + residual) by a path named: see conv_bn_act_op.cpp
Tensor conv_epilogue(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const NormTensors& norm, double eps,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t groups, bool relu, std::string_view path);

}  // namespace resnet_fast::cuda
