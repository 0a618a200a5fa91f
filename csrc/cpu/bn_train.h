// The passes of a residual block's training step that are batch norm's: see csrc/ops.cpp for the schemas.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

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

}  // namespace resnet_fast::cpu
