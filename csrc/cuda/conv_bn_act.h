// conv_bn_act's tensor-core kernel: what it is given, and what starts it.
#pragma once

#include <cuda_runtime_api.h>

#include "bn_params.h"
#include "conv_tiles.h"

namespace resnet_fast::cuda {

// y = act(norm(conv(x) + conv_bias) + residual): x, residual and y NHWC, weight KRSC, of bfloat16 or float16 and aligned to
// 16 bytes; vectors of float. The geometry's channels are multiples of 8.
struct ConvParams {
  ConvGeometry geometry;
  DType dtype;
  const void* x;
  const void* weight;
  const void* conv_bias = nullptr;
  NormParams norm;
  const void* residual = nullptr;
  void* y;
  bool relu = false;
};

// Whether the kernel was compiled for the current device, which must have mma.sync and cp.async: sm_80 or newer.
bool has_conv_kernel();

void launch_conv(const ConvParams& params, cudaStream_t stream);

}  // namespace resnet_fast::cuda
