// What every CUDA op around a batch norm shares: tensors as the kernels of bn_act.h want them.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>

#include "bn_act.h"
#include "ops.h"

namespace resnet_fast::cuda {

// Below autograd (the op has its own formula) and autocast (dtypes were settled by the caller), on x's device.
struct OpGuard {
  explicit OpGuard(const Tensor& x) : device(x.device()) {}

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCUDA};
  c10::cuda::CUDAGuard device;
};

struct Problem {
  Tensor x;  // dense in `format`
  at::MemoryFormat format;
  at::ScalarType acc;  // of statistics and sums: double for double, else float
  DType dtype;
  Image image;
  cudaStream_t stream;
};

Problem make_problem(const Tensor& x);

// t with x's dtype and element order.
Tensor like_x(const Problem& p, const Tensor& t, const char* name);
Tensor like_x(const Problem& p, const OptionalTensor& t, const char* name);  // undefined if absent

// A per-channel argument in the accumulation type; undefined if absent.
Tensor channel_param(const Problem& p, const OptionalTensor& t, const char* name);

Tensor channel_output(const Problem& p);
Tensor output_like_x(const Problem& p);

// Null for an undefined tensor.
inline const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline void* mutable_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// The vectors of one norm in the accumulation type; they must outlive the launches that take params().
struct NormVectors {
  Tensor mean;
  Tensor var;
  Tensor weight;
  Tensor bias;
  double eps;

  NormParams params() const { return {data(mean), data(var), data(weight), data(bias), eps}; }
};

NormVectors norm_vectors(
    const Problem& p, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    double eps);

// From the ops' list of mean, var, weight, bias; none from an empty list.
std::optional<NormVectors> norm_vectors(const Problem& p, const NormTensors& tensors, double eps);

// mean and biased variance per channel.
std::tuple<Tensor, Tensor> statistics(const Problem& p);

// act(norm(x) + residual), or + residual_norm(residual), into `y`, which may be x; residual: undefined for none.
void apply_into(
    const Problem& p, const NormVectors& norm, const OptionalTensor& residual,
    const std::optional<NormVectors>& residual_norm, bool relu, const Tensor& y);

// sum(dz) and sum(dz * (x - mean)); and the latter times rstd, where that is wanted.
struct BackwardSums {
  Tensor dz;
  Tensor dzx;
  Tensor dweight;
};

BackwardSums backward_sums(const Problem& p, const BackwardParams& params, bool want_dweight);

}  // namespace resnet_fast::cuda
