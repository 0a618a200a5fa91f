// bn_act, bn_act_train, bn_act_backward: each op's buffers, and its passes in order.
#include "bn_act.h"

#include <ATen/ops/empty_like.h>

#include "bn.h"
#include "guards.h"

namespace resnet_fast::cpu {

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  Tensor y = at::empty_like(p.x);
  apply(p, make_norm(p.channels, p.acc, weight, bias, mean, var, eps), residual, std::nullopt, relu, y);
  return y;
}

Tensor bn_act_into(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  apply(p, make_norm(p.channels, p.acc, weight, bias, mean, var, eps), residual, std::nullopt, relu, p.x);
  return p.x;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
    double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  auto [mean, var] = batch_stats(p);
  Tensor y = at::empty_like(p.x);
  apply(p, make_norm(p.channels, p.acc, weight, bias, mean, var, eps), residual, std::nullopt, relu, y);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, double eps, bool relu, bool training,
    std::array<bool, 4> output_mask) {
  const OpGuard guard;
  const Problem p = make_problem(x);
  const Norm norm = make_norm(p.channels, p.acc, weight, bias, mean, var, eps);
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

  Columns columns(p.plan, Norm::kColumns + 2, p.acc);
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

  const auto run = [&](auto kernel) {
    for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
  };
  if (!want_sums) {
    if (want_dx || want_dresidual) run(kernels().backward_apply_eval[p.dtype]);
    return {dx, dweight, dbias, dresidual};
  }

  const Reduction sums(p);
  backward_sums(p, args, sums);
  const double* sum_dz = sums.result(0);
  double* sum_dzx = sums.result(1);

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
