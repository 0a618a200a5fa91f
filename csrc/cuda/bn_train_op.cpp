// The passes of a residual block's training step that are batch norm's, on CUDA.
#include "bn.h"

namespace resnet_fast::cuda {

namespace {

NormVectors required_norm(const Problem& p, const NormTensors& tensors, double eps) {
  const std::optional<NormVectors> norm = norm_vectors(p, tensors, eps);
  TORCH_CHECK(norm.has_value(), "norm: expected mean, var, weight and bias, got an empty list");
  return *norm;
}

}  // namespace

std::tuple<Tensor, Tensor> bn_statistics(const Tensor& conv_out) {
  const OpGuard guard(conv_out);
  return statistics(make_problem(conv_out));
}

Tensor bn_apply(
    const Tensor& conv_out, const NormTensors& norm, double eps, const OptionalTensor& residual,
    const NormTensors& residual_norm, double residual_eps, bool relu) {
  const OpGuard guard(conv_out);
  const Problem p = make_problem(conv_out);
  Tensor y = output_like_x(p);
  apply_into(p, required_norm(p, norm, eps), residual, norm_vectors(p, residual_norm, residual_eps), relu, y);
  return y;
}

std::tuple<Tensor, Tensor> bn_backward_reduce(
    const Tensor& dy, const Tensor& conv_out, const NormTensors& norm, double eps, bool relu) {
  const OpGuard guard(conv_out);
  const Problem p = make_problem(conv_out);
  const Tensor grad = like_x(p, dy, "dy");
  const NormVectors own = required_norm(p, norm, eps);
  BackwardParams params;
  params.image = p.image;
  params.dtype = p.dtype;
  params.dy = data(grad);
  params.x = data(p.x);
  params.norm = own.params();
  params.mask = relu ? Mask::from_x : Mask::none;
  const BackwardSums sums = backward_sums(p, params, false);
  return {sums.dz, sums.dzx};
}

Tensor bn_backward_apply(
    const Tensor& dy, const OptionalTensor& conv_out, const NormTensors& norm, double eps, bool relu,
    const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx) {
  const OpGuard guard(dy);
  const bool training = mean_dz.has_value() && mean_dzx.has_value();
  const bool has_x = conv_out.has_value() && conv_out->defined();
  TORCH_CHECK(has_x || !(relu || training), "conv_out: needed for the ReLU's mask and for batch statistics");
  const Problem p = make_problem(has_x ? *conv_out : dy);
  const Tensor grad = like_x(p, dy, "dy");
  const NormVectors own = required_norm(p, norm, eps);
  const Tensor dz = channel_param(p, mean_dz, "mean_dz");
  const Tensor dzx = channel_param(p, mean_dzx, "mean_dzx");
  Tensor dconv_out = output_like_x(p);
  BackwardApplyParams params;
  params.image = p.image;
  params.dtype = p.dtype;
  params.dy = data(grad);
  params.x = relu || training ? data(p.x) : nullptr;
  params.norm = own.params();
  params.mask = relu ? Mask::from_x : Mask::none;
  if (training) {
    params.sum_dz = data(dz);
    params.sum_dzx = data(dzx);
  }
  params.dx = mutable_data(dconv_out);
  launch_backward_apply(params, p.stream);
  return dconv_out;
}

Tensor relu_mask(const Tensor& dy, const Tensor& y, const Tensor& layout_like) {
  const OpGuard guard(y);
  const Problem p = make_problem(y.contiguous(layout_like.suggest_memory_format()));
  const Tensor grad = like_x(p, dy, "dy");
  Tensor dz = output_like_x(p);
  BackwardApplyParams params;
  params.image = p.image;
  params.dtype = p.dtype;
  params.dy = data(grad);
  params.y = data(p.x);
  params.mask = Mask::from_y;
  params.dz = mutable_data(dz);
  launch_backward_apply(params, p.stream);
  return dz;
}

}  // namespace resnet_fast::cuda
