// Batch norm + residual + ReLU on the CPU: see csrc/ops.cpp for the schemas.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace resnet_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu);

// The same, overwriting x where its memory is dense. For an x that nobody else holds.
Tensor bn_act_into(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu);

// y, mean, var (biased)
std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps, bool relu);

// dx, dweight, dbias, dresidual
std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps, bool relu, bool training,
    std::array<bool, 4> output_mask);

}  // namespace resnet_fast::cpu
