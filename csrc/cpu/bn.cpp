#include "bn.h"

namespace resnet_fast::cpu {

DType dtype_index(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return kFloat32;
    case at::kDouble:
      return kFloat64;
    case at::kBFloat16:
      return kBFloat16;
    case at::kHalf:
      return kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "x: expected float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
}

at::ScalarType acc_type_of(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Problem make_problem(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4, "x: expected a 4-D tensor, got ", x.dim(), "-D");
  TORCH_CHECK(x.device().is_cpu(), "x: expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.numel() > 0, "x: expected a non-empty tensor, got shape ", x.sizes());
  Problem p;
  p.format = x.suggest_memory_format();
  p.x = x.contiguous(p.format);
  p.dtype = dtype_index(x);
  p.acc = acc_type_of(x);
  p.channels = x.size(1);
  const int64_t plane = x.size(2) * x.size(3);
  p.count = static_cast<double>(x.size(0) * plane);
  // With one channel or one pixel both layouts are the same memory, and rows are the faster way through it.
  p.plan = make_plan(x.size(0), p.channels, plane, p.x.is_contiguous(at::MemoryFormat::ChannelsLast));
  return p;
}

Tensor like_x(const Problem& p, const Tensor& t, const char* name) {
  TORCH_CHECK(t.sizes() == p.x.sizes(), name, ": expected shape ", p.x.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got ", t.device());
  return t.to(p.x.scalar_type()).contiguous(p.format);
}

Tensor channel_param(int64_t channels, at::ScalarType acc, const OptionalTensor& t, const char* name) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK(t->numel() == channels, name, ": expected ", channels, " values, got shape ", t->sizes());
  TORCH_CHECK(t->device().is_cpu(), name, ": expected a CPU tensor, got ", t->device());
  return t->to(acc).contiguous();
}

Norm make_norm(
    int64_t channels, at::ScalarType acc, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& var, double eps) {
  return {channel_param(channels, acc, weight, "weight"), channel_param(channels, acc, bias, "bias"),
          channel_param(channels, acc, mean, "mean"), channel_param(channels, acc, var, "var"), eps};
}

std::optional<Norm> make_norm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps) {
  if (tensors.empty()) return std::nullopt;
  TORCH_CHECK(tensors.size() == 4, "norm: expected mean, var, weight and bias, got ", tensors.size(), " tensors");
  const OptionalTensor mean = tensors.get(0), var = tensors.get(1);
  TORCH_CHECK(mean.has_value() && var.has_value(), "norm: expected a mean and a var");
  return make_norm(channels, acc, tensors.get(2), tensors.get(3), *mean, *var, eps);
}

Norm required_norm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps) {
  const std::optional<Norm> norm = make_norm(channels, acc, tensors, eps);
  TORCH_CHECK(norm.has_value(), "norm: expected mean, var, weight and bias, got an empty list");
  return *norm;
}

PendingNorm::PendingNorm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps) {
  const std::optional<Norm> norm = make_norm(channels, acc, tensors, eps);
  if (!norm.has_value()) return;
  columns_.emplace(make_plan(1, channels, 1, true), Norm::kColumns, acc);
  params = norm->columns(*columns_);
}

ColumnParams backward_params(
    const Norm& norm, Columns& columns, const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx) {
  ColumnParams out = norm.columns(columns);
  if (!mean_dz.has_value() || !mean_dzx.has_value()) return out;
  const int64_t channels = norm.mean.numel();
  const Tensor dz = channel_param(channels, norm.mean.scalar_type(), mean_dz, "mean_dz");
  const Tensor dzx = channel_param(channels, norm.mean.scalar_type(), mean_dzx, "mean_dzx");
  out.mean_dz = columns.fill(Norm::kColumns, [&](int64_t c) { return value_at(dz, c, 0); });
  out.mean_dzx = columns.fill(Norm::kColumns + 1, [&](int64_t c) {
    const double rstd = norm.rstd(c);
    return rstd * rstd * value_at(dzx, c, 0);
  });
  return out;
}

void apply(
    const Problem& p, const Norm& norm, const OptionalTensor& residual, const std::optional<Norm>& residual_norm,
    bool relu, const Tensor& y) {
  Columns columns(p.plan, 2 * Norm::kColumns, p.acc);
  ApplyArgs args;
  args.x = p.x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.params = norm.columns(columns);
  args.relu = relu;
  Tensor residual_like_x;
  if (residual.has_value() && residual->defined()) {
    residual_like_x = like_x(p, *residual, "residual");
    args.residual = residual_like_x.const_data_ptr();
    if (residual_norm.has_value()) args.residual_params = residual_norm->columns(columns, Norm::kColumns);
  }
  const auto kernel = kernels().apply[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
}

void merge_moments(
    const Plan& plan, double count, const double* part_mean, const double* part_m2, double* mean, double* m2) {
  merge(plan, mean, [&](double values, int64_t i, int64_t) { return values * part_mean[i]; });
  for (int64_t c = 0; c < plan.channels; ++c) mean[c] /= count;
  merge(plan, m2, [&](double values, int64_t i, int64_t c) {
    const double off = part_mean[i] - mean[c];
    return part_m2[i] + values * off * off;
  });
}

void backward_sums(const Problem& p, BackwardArgs& args, const Reduction& sums) {
  args.sum_dz = sums.partial(0);
  args.sum_dzx = sums.partial(1);
  const auto kernel = kernels().backward_reduce[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
  merge(p.plan, sums.result(0), [&](double, int64_t i, int64_t) { return args.sum_dz[i]; });
  merge(p.plan, sums.result(1), [&](double, int64_t i, int64_t) { return args.sum_dzx[i]; });
}

std::tuple<Tensor, Tensor> batch_stats(const Problem& p) {
  const Reduction sums(p);
  StatsArgs args;
  args.x = p.x.const_data_ptr();
  args.mean = sums.partial(0);
  args.m2 = sums.partial(1);
  const auto kernel = kernels().stats[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });

  double* m2 = sums.result(1);
  merge_moments(p.plan, p.count, args.mean, args.m2, sums.result(0), m2);
  for (int64_t c = 0; c < p.channels; ++c) m2[c] /= p.count;
  const Tensor stats = sums.merged.to(p.acc);
  return {stats.select(0, 0).clone(), stats.select(0, 1).clone()};
}

}  // namespace resnet_fast::cpu
