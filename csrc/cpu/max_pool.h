// A stem's max-pool, 3x3 with stride 2 and padding 1, and the batch norm and ReLU before it, forward and backward without
// the activation between them in memory: see csrc/ops.cpp for the schemas. All tensors are in channels_last.
#pragma once

#include "bn.h"

namespace resnet_fast::cpu {

// Of any dtype; no gradient
Tensor max_pool(const Tensor& x);

// max_pool(relu(norm(conv_out))) and where in its window each maximum is, uint8, in y's shape; that is empty where it is
// not wanted
std::tuple<Tensor, Tensor> bn_max_pool(const Tensor& conv_out, const NormTensors& norm, double eps, bool wants_index);

// As bn_backward_reduce and bn_backward_apply (bn_train.h), of dy behind the pool
std::tuple<Tensor, Tensor> bn_max_pool_backward_reduce(
    const Tensor& dy, const Tensor& index, const Tensor& conv_out, const NormTensors& norm, double eps);
Tensor bn_max_pool_backward_apply(
    const Tensor& dy, const Tensor& index, const Tensor& conv_out, const NormTensors& norm, double eps,
    const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx);

}  // namespace resnet_fast::cpu
