// bn_act, bn_act_train, bn_act_backward on CUDA: each op's tensors, and its launches in order.
#include <ATen/ops/empty.h>

#include "bn.h"

namespace resnet_fast::cuda {

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  Tensor y = output_like_x(p);
  apply_into(p, norm_vectors(p, weight, bias, mean, var, eps), residual, std::nullopt, relu, y);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    bool relu) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  auto [mean, var] = statistics(p);
  Tensor y = output_like_x(p);
  apply_into(p, norm_vectors(p, weight, bias, mean, var, eps), residual, std::nullopt, relu, y);
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, std::array<bool, 4> output_mask) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  const NormVectors norm = norm_vectors(p, weight, bias, mean, var, eps);
  const Tensor grad = like_x(p, dy, "dy");
  const Tensor kept = relu ? like_x(p, y, "y") : Tensor();
  const auto [want_dx, want_dweight, want_dbias, want_dresidual] = output_mask;

  BackwardParams params;
  params.image = p.image;
  params.dtype = p.dtype;
  params.dy = data(grad);
  params.x = data(p.x);
  params.y = data(kept);
  params.norm = norm.params();
  params.mask = !relu ? Mask::none : kept.defined() ? Mask::from_y : Mask::from_x;

  BackwardSums sums;
  if (want_dweight || want_dbias || (training && want_dx)) sums = backward_sums(p, params, want_dweight);
  const Tensor dx = want_dx ? output_like_x(p) : Tensor();
  const Tensor dresidual = want_dresidual ? output_like_x(p) : Tensor();
  if (want_dx || want_dresidual) {
    BackwardApplyParams apply{params};
    if (training && want_dx) {
      apply.sum_dz = data(sums.dz);
      apply.sum_dzx = data(sums.dzx);
      apply.inv_count = 1.0 / static_cast<double>(p.image.count());
    }
    apply.dx = mutable_data(dx);
    apply.dz = mutable_data(dresidual);
    launch_backward_apply(apply, p.stream);
  }
  const auto wanted = [&](bool want, const Tensor& t) { return want ? t : at::empty({0}, x.options()); };
  return {
      wanted(want_dx, dx), wanted(want_dweight, sums.dweight), wanted(want_dbias, sums.dz),
      wanted(want_dresidual, dresidual)};
}

}  // namespace resnet_fast::cuda
