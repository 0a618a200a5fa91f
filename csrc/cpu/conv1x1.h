// 1x1 convolutions in the Gram form (stage 4) as products of matrices, slab by slab: see csrc/ops.cpp for the schemas.
//
// x is in channels_last, so its pixels, of a strided convolution those that it reads, are the rows of a matrix.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// act(norm(conv(x)) + residual), or + residual_norm(residual)
Tensor conv1x1_join(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight, at::IntArrayRef stride,
    const NormTensors& norm, double eps, const OptionalTensor& residual, const NormTensors& residual_norm,
    double residual_eps, bool relu);

// Mean (C,) and covariance (C, C) of x
std::tuple<Tensor, Tensor> gram(const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride);

// sum of dz (outer) (x - mean), (K, C), and sum(dz), (K,)
std::tuple<Tensor, Tensor> outer(
    const Tensor& dz, const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride,
    const Tensor& mean);

// dz @ dz_matrix + (x - mean) @ x_matrix + constant, + add
Tensor gram_dgrad(
    const Tensor& dz, const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride,
    const Tensor& dz_matrix, const Tensor& x_matrix, const Tensor& mean, const Tensor& constant,
    const OptionalTensor& add);

}  // namespace resnet_fast::cpu
