#include "bn.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAStream.h>

namespace resnet_fast::cuda {

namespace {

DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kHalf:
      return DType::float16;
    default:
      TORCH_CHECK_TYPE(false, "x: expected float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

// Memory for the partial sums, freed in stream order: the kernels that read it are enqueued by then.
Tensor make_partials(const Problem& p) {
  return at::empty({partial_bytes(p.image, p.dtype)}, p.x.options().dtype(at::kByte));
}

}  // namespace

Problem make_problem(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4, "x: expected a 4-D tensor, got ", x.dim(), "-D");
  TORCH_CHECK(x.device().is_cuda(), "x: expected a CUDA tensor, got ", x.device());
  TORCH_CHECK(x.numel() > 0, "x: expected a non-empty tensor, got shape ", x.sizes());
  Problem p;
  p.format = x.suggest_memory_format();
  p.x = x.contiguous(p.format);
  p.acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  p.dtype = dtype_of(x);
  // With one channel or one pixel both layouts are the same memory.
  const bool channels_last = p.x.is_contiguous(at::MemoryFormat::ChannelsLast);
  p.image = {x.size(0), x.size(1), x.size(2) * x.size(3), channels_last};
  p.stream = c10::cuda::getCurrentCUDAStream();
  return p;
}

Tensor like_x(const Problem& p, const Tensor& t, const char* name) {
  TORCH_CHECK(t.sizes() == p.x.sizes(), name, ": expected shape ", p.x.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.device() == p.x.device(), name, ": expected a tensor on ", p.x.device(), ", got ", t.device());
  return t.to(p.x.scalar_type()).contiguous(p.format);
}

Tensor like_x(const Problem& p, const OptionalTensor& t, const char* name) {
  return t.has_value() && t->defined() ? like_x(p, *t, name) : Tensor();
}

Tensor channel_param(const Problem& p, const OptionalTensor& t, const char* name) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK(t->numel() == p.image.channels, name, ": expected ", p.image.channels, " values, got ", t->sizes());
  TORCH_CHECK(t->device() == p.x.device(), name, ": expected a tensor on ", p.x.device(), ", got ", t->device());
  return t->to(p.acc).contiguous();
}

Tensor channel_output(const Problem& p) { return at::empty({p.image.channels}, p.x.options().dtype(p.acc)); }

Tensor output_like_x(const Problem& p) { return at::empty_like(p.x, p.x.options(), p.format); }

NormVectors norm_vectors(
    const Problem& p, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    double eps) {
  return {
      channel_param(p, mean, "mean"), channel_param(p, var, "var"), channel_param(p, weight, "weight"),
      channel_param(p, bias, "bias"), eps};
}

std::optional<NormVectors> norm_vectors(const Problem& p, const NormTensors& tensors, double eps) {
  if (tensors.empty()) return std::nullopt;
  TORCH_CHECK(tensors.size() == 4, "norm: expected mean, var, weight and bias, got ", tensors.size(), " tensors");
  const OptionalTensor mean = tensors.get(0), var = tensors.get(1);
  TORCH_CHECK(mean.has_value() && var.has_value(), "norm: expected a mean and a var");
  return norm_vectors(p, tensors.get(2), tensors.get(3), *mean, *var, eps);
}

std::tuple<Tensor, Tensor> statistics(const Problem& p) {
  const Tensor partials = make_partials(p);
  const Tensor mean = channel_output(p);
  const Tensor var = channel_output(p);
  launch_statistics(
      {p.image, p.dtype, data(p.x), mutable_data(partials), mutable_data(mean), mutable_data(var)}, p.stream);
  return {mean, var};
}

void apply_into(
    const Problem& p, const NormVectors& norm, const OptionalTensor& residual,
    const std::optional<NormVectors>& residual_norm, bool relu, const Tensor& y) {
  const Tensor added = like_x(p, residual, "residual");
  ApplyParams params;
  params.image = p.image;
  params.dtype = p.dtype;
  params.x = data(p.x);
  params.residual = data(added);
  params.y = mutable_data(y);
  params.norm = norm.params();
  params.join = added.defined() && residual_norm.has_value();
  if (params.join) params.residual_norm = residual_norm->params();
  params.relu = relu;
  launch_apply(params, p.stream);
}

BackwardSums backward_sums(const Problem& p, const BackwardParams& params, bool want_dweight) {
  const Tensor partials = make_partials(p);
  const BackwardSums sums{channel_output(p), channel_output(p), want_dweight ? channel_output(p) : Tensor()};
  launch_backward_reduce(
      {params, mutable_data(partials), mutable_data(sums.dz), mutable_data(sums.dzx), mutable_data(sums.dweight)},
      p.stream);
  return sums;
}

}  // namespace resnet_fast::cuda
