#include "bn_train.h"

#include <ATen/ops/empty_like.h>

#include "guards.h"

namespace resnet_fast::cpu {

std::tuple<Tensor, Tensor> bn_statistics(const Tensor& conv_out) {
  const OpGuard guard;
  return batch_stats(make_problem(conv_out));
}

Tensor bn_apply(
    const Tensor& conv_out, const NormTensors& norm, double eps, const OptionalTensor& residual,
    const NormTensors& residual_norm, double residual_eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(conv_out);
  Tensor y = at::empty_like(p.x);
  apply(
      p, required_norm(p.channels, p.acc, norm, eps), residual, make_norm(p.channels, p.acc, residual_norm, residual_eps), relu, y);
  return y;
}

std::tuple<Tensor, Tensor> bn_backward_reduce(
    const Tensor& dy, const Tensor& conv_out, const NormTensors& norm, double eps, bool relu) {
  const OpGuard guard;
  const Problem p = make_problem(conv_out);
  Columns columns(p.plan, Norm::kColumns, p.acc);
  const Tensor dy_like_x = like_x(p, dy, "dy");
  BackwardArgs args;
  args.dy = dy_like_x.const_data_ptr();
  args.x = p.x.const_data_ptr();
  args.params = required_norm(p.channels, p.acc, norm, eps).columns(columns);
  args.mask = relu ? Mask::from_x : Mask::none;
  const Reduction sums(p);
  backward_sums(p, args, sums);
  const Tensor merged = sums.merged.to(p.acc);
  return {merged.select(0, 0).clone(), merged.select(0, 1).clone()};
}

Tensor bn_backward_apply(
    const Tensor& dy, const OptionalTensor& conv_out, const NormTensors& norm, double eps, bool relu,
    const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx) {
  const OpGuard guard;
  const bool training = mean_dz.has_value() && mean_dzx.has_value();
  const bool has_x = conv_out.has_value() && conv_out->defined();
  TORCH_CHECK(has_x || !(relu || training), "conv_out: needed for the ReLU's mask and for batch statistics");
  const Problem p = make_problem(has_x ? *conv_out : dy);
  Columns columns(p.plan, kBackwardColumns, p.acc);
  const Tensor dy_like_x = like_x(p, dy, "dy");
  Tensor dconv_out = at::empty_like(p.x);
  BackwardArgs args;
  args.dy = dy_like_x.const_data_ptr();
  args.x = p.x.const_data_ptr();
  args.dx = dconv_out.mutable_data_ptr();
  args.params = backward_params(required_norm(p.channels, p.acc, norm, eps), columns, mean_dz, mean_dzx);
  args.mask = relu ? Mask::from_x : Mask::none;
  const auto kernel = training ? kernels().backward_apply_train[p.dtype] : kernels().backward_apply_eval[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
  return dconv_out;
}

Tensor relu_mask(const Tensor& dy, const Tensor& y, const Tensor& layout_like) {
  const OpGuard guard;
  const Problem p = make_problem(y.contiguous(layout_like.suggest_memory_format()));
  Columns columns(p.plan, 1, p.acc);
  const Tensor dy_like_y = like_x(p, dy, "dy");
  Tensor dz = at::empty_like(p.x);
  BackwardArgs args;
  args.dy = dy_like_y.const_data_ptr();
  args.x = args.dy;  // not read
  args.y = p.x.const_data_ptr();
  args.dz = dz.mutable_data_ptr();
  args.params.mean = args.params.scale = columns.fill(0, [](int64_t) { return 0.0; });  // read, not used
  args.mask = Mask::from_y;
  const auto kernel = kernels().backward_apply_eval[p.dtype];
  for_items(p.plan, [&](int64_t begin, int64_t end) { kernel(p.plan, args, begin, end); });
  return dz;
}

}  // namespace resnet_fast::cpu
