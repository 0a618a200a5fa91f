// Batch norm + residual + ReLU kernels: what starts them.
#pragma once

#include <cuda_runtime_api.h>

#include "bn_params.h"

namespace resnet_fast::cuda {

// Of the partial sums of either reduction.
int64_t partial_bytes(const Image& image, DType dtype);

void launch_statistics(const StatisticsParams& params, cudaStream_t stream);
void launch_apply(const ApplyParams& params, cudaStream_t stream);
void launch_backward_reduce(const BackwardReduceParams& params, cudaStream_t stream);
void launch_backward_apply(const BackwardApplyParams& params, cudaStream_t stream);

}  // namespace resnet_fast::cuda
