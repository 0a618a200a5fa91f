// bn_act, bn_act_train, bn_act_backward: shapes, buffers and threads around the kernels of kernels.h.
#include "bn_act.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>

#include "guards.h"
#include "kernels.h"

namespace resnet_fast::cpu {

namespace {

using Kernel = void (*)(const Plan&, const BackwardArgs&, int64_t, int64_t);

struct Problem {
  Tensor x;  // dense in `format`
  at::MemoryFormat format;
  DType dtype;
  at::ScalarType acc;
  Plan plan;
  int64_t channels;
  double count;  // values per channel
};

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

Problem make_problem(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4, "x: expected a 4-D tensor, got ", x.dim(), "-D");
  TORCH_CHECK(x.device().is_cpu(), "x: expected a CPU tensor, got ", x.device());
  TORCH_CHECK(x.numel() > 0, "x: expected a non-empty tensor, got shape ", x.sizes());
  Problem p;
  p.format = x.suggest_memory_format();
  p.x = x.contiguous(p.format);
  p.dtype = dtype_index(x);
  p.acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  p.channels = x.size(1);
  const int64_t plane = x.size(2) * x.size(3);
  p.count = static_cast<double>(x.size(0) * plane);
  // With one channel or one pixel both layouts are the same memory, and rows are the faster way through it.
  p.plan = make_plan(x.size(0), p.channels, plane, p.x.is_contiguous(at::MemoryFormat::ChannelsLast));
  return p;
}

// t with x's dtype and element order.
Tensor like_x(const Problem& p, const Tensor& t, const char* name) {
  TORCH_CHECK(t.sizes() == p.x.sizes(), name, ": expected shape ", p.x.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got ", t.device());
  return t.to(p.x.scalar_type()).contiguous(p.format);
}

// A per-channel argument in the accumulation type; undefined if absent.
Tensor channel_param(const Problem& p, const OptionalTensor& t, const char* name) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK(t->numel() == p.channels, name, ": expected ", p.channels, " values, got shape ", t->sizes());
  TORCH_CHECK(t->device().is_cpu(), name, ": expected a CPU tensor, got ", t->device());
  return t->to(p.acc).contiguous();
}

double value_at(const Tensor& param, int64_t channel, double if_absent) {
  if (!param.defined()) return if_absent;
  return param.scalar_type() == at::kDouble ? param.const_data_ptr<double>()[channel]
                                            : param.const_data_ptr<float>()[channel];
}

template <typename T, typename F>
void fill_columns(T* column, const Plan& plan, const F& value) {
  for (int64_t c = 0; c < plan.channels; ++c) column[c] = static_cast<T>(value(c));
  int64_t filled = plan.channels;
  for (; filled < plan.width; filled += plan.channels) std::copy_n(column, plan.channels, column + filled);
  std::fill_n(column + filled, kLanePadding, T(0));
}

// The kernels' per-column arrays, in one buffer.
class Columns {
 public:
  explicit Columns(const Problem& p)
      : plan_(p.plan), buffer_(at::empty({5, p.plan.width + kLanePadding}, p.x.options().dtype(p.acc))) {}

  template <typename F>
  const void* fill(int64_t row, const F& value_of_channel) {
    const int64_t offset = row * buffer_.size(1);
    if (buffer_.scalar_type() == at::kDouble) {
      double* column = buffer_.mutable_data_ptr<double>() + offset;
      fill_columns(column, plan_, value_of_channel);
      return column;
    }
    float* column = buffer_.mutable_data_ptr<float>() + offset;
    fill_columns(column, plan_, value_of_channel);
    return column;
  }

 private:
  const Plan& plan_;
  Tensor buffer_;
};

// weight, bias, mean and var of a call, and what the kernels want to know of them.
struct Norm {
  Tensor weight, bias, mean, var;
  double eps;

  double rstd(int64_t c) const { return 1 / std::sqrt(value_at(var, c, 0) + eps); }

  ColumnParams columns(Columns& buffer) const {
    ColumnParams out;
    out.mean = buffer.fill(0, [&](int64_t c) { return value_at(mean, c, 0); });
    out.scale = buffer.fill(1, [&](int64_t c) { return rstd(c) * value_at(weight, c, 1); });
    out.bias = buffer.fill(2, [&](int64_t c) { return value_at(bias, c, 0); });
    return out;
  }
};

Norm make_norm(
    const Problem& p, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    double eps) {
  return {channel_param(p, weight, "weight"), channel_param(p, bias, "bias"), channel_param(p, mean, "mean"),
          channel_param(p, var, "var"), eps};
}

template <typename F>
void for_items(const Plan& plan, const F& f) {
  at::parallel_for(0, plan.items, plan.grain, f);
}

void apply(const Problem& p, const Norm& norm, const OptionalTensor& residual, bool relu, const Tensor& y) {
  Columns columns(p);
  ApplyArgs args;
  args.x = p.x.const_data_ptr();
  args.y = y.mutable_data_ptr();
  args.params = norm.columns(columns);
  args.relu = relu;
  Tensor residual_like_x;
  if (residual.has_value() && residual->defined()) {
    residual_like_x = like_x(p, *residual, "residual");
    args.residual = residual_like_x.const_data_ptr();
  }
  const auto kernel = kernels().apply[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
}

// f(values in the chunk, repeats of the channels in it, its offset in the partial sums) for every chunk, in order.
template <typename F>
void for_chunks(const Plan& plan, const F& f) {
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t offset = chunk * plan.width;
    if (!plan.rows_layout) {
      const int64_t image = (chunk / plan.plane_blocks) * plan.batch_block;
      const int64_t pixel = (chunk % plan.plane_blocks) * plan.plane_block;
      f(std::min(plan.batch_block, plan.batch - image) * std::min(plan.plane_block, plan.plane - pixel), 1, offset);
    } else if (chunk == plan.row_blocks) {
      f(plan.tail_rows, 1, offset);
    } else {
      f(std::min(plan.row_block, plan.rows - chunk * plan.row_block), plan.repeat, offset);
    }
  }
}

// out[c] = sum of term(values, index of a partial of channel c, c) in fixed order, in double.
template <typename F>
void merge(const Plan& plan, double* out, const F& term) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (plan.chunks * plan.repeat));
  at::parallel_for(0, plan.channels, grain, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0);
    for_chunks(plan, [&](int64_t values, int64_t repeats, int64_t offset) {
      for (int64_t r = 0; r < repeats; ++r) {
        const int64_t partial = offset + r * plan.channels;
        for (int64_t c = begin; c < end; ++c) out[c] += term(static_cast<double>(values), partial + c, c);
      }
    });
  });
}

// Partial sums [2, chunks, width] and merged ones [2, channels].
struct Reduction {
  Tensor partials, merged;

  explicit Reduction(const Problem& p)
      : partials(at::empty({2, p.plan.chunks, p.plan.width}, p.x.options().dtype(at::kDouble))),
        merged(at::empty({2, p.channels}, p.x.options().dtype(at::kDouble))) {}

  double* partial(int64_t i) const { return partials.mutable_data_ptr<double>() + i * partials.stride(0); }
  double* result(int64_t i) const { return merged.mutable_data_ptr<double>() + i * merged.stride(0); }
};

// mean and biased variance per channel, in the accumulation type.
std::tuple<Tensor, Tensor> batch_stats(const Problem& p) {
  const Reduction sums(p);
  StatsArgs args;
  args.x = p.x.const_data_ptr();
  args.mean = sums.partial(0);
  args.m2 = sums.partial(1);
  const auto kernel = kernels().stats[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });

  double* mean = sums.result(0);
  double* m2 = sums.result(1);
  merge(p.plan, mean, [&](double values, int64_t i, int64_t) { return values * args.mean[i]; });
  for (int64_t c = 0; c < p.channels; ++c) mean[c] /= p.count;
  merge(p.plan, m2, [&](double values, int64_t i, int64_t c) {
    const double off = args.mean[i] - mean[c];
    return args.m2[i] + values * off * off;
  });
  for (int64_t c = 0; c < p.channels; ++c) m2[c] /= p.count;
  const Tensor stats = sums.merged.to(p.acc);
  return {stats.select(0, 0).clone(), stats.select(0, 1).clone()};
}

}  // namespace

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  Tensor y = at::empty_like(p.x);
  apply(p, make_norm(p, weight, bias, mean, var, eps), residual, relu, y);
  return y;
}

Tensor bn_act_into(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  apply(p, make_norm(p, weight, bias, mean, var, eps), residual, relu, p.x);
  return p.x;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  auto [mean, var] = batch_stats(p);
  Tensor y = at::empty_like(p.x);
  apply(p, make_norm(p, weight, bias, mean, var, eps), residual, relu, y);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps, bool relu, bool training,
    std::array<bool, 4> output_mask) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  const Norm norm = make_norm(p, weight, bias, mean, var, eps);
  const auto [want_dx, want_dweight, want_dbias, want_dresidual] = output_mask;
  const bool want_sums = want_dweight || want_dbias || (want_dx && training);

  const Tensor none = at::empty({0}, p.x.options());
  Tensor dx = want_dx ? at::empty_like(p.x) : none;
  Tensor dresidual = want_dresidual ? at::empty_like(p.x) : at::empty({0}, p.x.options());
  const auto channel_grad = [&](bool wanted) {
    return wanted ? at::empty({p.channels}, p.x.options().dtype(p.acc)) : at::empty({0}, p.x.options());
  };
  Tensor dweight = channel_grad(want_dweight);
  Tensor dbias = channel_grad(want_dbias);

  Columns columns(p);
  BackwardArgs args;
  const Tensor dy_like_x = like_x(p, dy, "dy");
  args.dy = dy_like_x.const_data_ptr();
  args.x = p.x.const_data_ptr();
  args.params = norm.columns(columns);
  Tensor y_like_x;
  if (relu && y.has_value() && y->defined()) {
    y_like_x = like_x(p, *y, "y");
    args.y = y_like_x.const_data_ptr();
    args.mask = Mask::from_y;
  } else {
    args.mask = relu ? Mask::from_x : Mask::none;
  }
  if (want_dresidual) args.dz = dresidual.mutable_data_ptr();
  if (want_dx && !training) args.dx = dx.mutable_data_ptr();

  const auto run = [&](Kernel kernel) {
    for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
  };
  if (!want_sums) {
    if (want_dx || want_dresidual) run(kernels().backward_apply_eval[p.dtype]);
    return {dx, dweight, dbias, dresidual};
  }

  const Reduction sums(p);
  args.sum_dz = sums.partial(0);
  args.sum_dzx = sums.partial(1);
  run(kernels().backward_reduce[p.dtype]);
  double* sum_dz = sums.result(0);
  double* sum_dzx = sums.result(1);
  merge(p.plan, sum_dz, [&](double, int64_t i, int64_t) { return args.sum_dz[i]; });
  merge(p.plan, sum_dzx, [&](double, int64_t i, int64_t) { return args.sum_dzx[i]; });

  if (want_dx && training) {
    args.params.mean_dz = columns.fill(3, [&](int64_t c) { return sum_dz[c] / p.count; });
    args.params.mean_dzx = columns.fill(4, [&](int64_t c) {
      const double rstd = norm.rstd(c);
      return rstd * rstd * sum_dzx[c] / p.count;
    });
    if (args.dz != nullptr) {
      args.dy = args.dz;
      args.dz = nullptr;
      args.mask = Mask::none;
    }
    args.dx = dx.mutable_data_ptr();
    run(kernels().backward_apply_train[p.dtype]);
  }
  if (want_dweight) {
    for (int64_t c = 0; c < p.channels; ++c) sum_dzx[c] *= norm.rstd(c);
    dweight.copy_(sums.merged.select(0, 1));
  }
  if (want_dbias) dbias.copy_(sums.merged.select(0, 0));
  return {dx, dweight, dbias, dresidual};
}

}  // namespace resnet_fast::cpu
