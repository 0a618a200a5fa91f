// What each batch norm kernel is given: plain pointers and numbers; the tensors are in bn.h. Vectors are in the accumulation
// type: double for double, else float.
#pragma once

#include "bn_ops.h"
#include "launch.h"

namespace resnet_fast::cuda {

enum class DType { float32, float64, bfloat16, float16 };

// Null vectors change nothing: mean 0, var so that rstd is 1, weight 1, bias 0.
struct NormParams {
  const void* mean = nullptr;
  const void* var = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  double eps = 0;
};

struct StatisticsParams {
  Image image;
  DType dtype;
  const void* x;
  void* partials;  // partial_bytes() of them
  void* mean;
  void* var;  // biased
};

struct ApplyParams {
  Image image;
  DType dtype;
  const void* x;
  const void* residual = nullptr;
  void* y;  // may be x
  NormParams norm;
  NormParams residual_norm;
  bool join = false;  // whether residual_norm counts
  bool relu = false;
};

struct BackwardParams {
  Image image;
  DType dtype;
  const void* dy;
  const void* x = nullptr;
  const void* y = nullptr;
  NormParams norm;
  Mask mask = Mask::none;
};

struct BackwardReduceParams : BackwardParams {
  void* partials;
  void* sum_dz;
  void* sum_dzx;
  void* dweight = nullptr;
};

struct BackwardApplyParams : BackwardParams {
  const void* sum_dz = nullptr;  // null where the statistics were fixed
  const void* sum_dzx = nullptr;
  double inv_count = 1;
  void* dx = nullptr;
  void* dz = nullptr;
};

}  // namespace resnet_fast::cuda
