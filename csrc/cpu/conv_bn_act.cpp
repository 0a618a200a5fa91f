// conv_bn_act and its gradient. Convolutions are PyTorch's, that is oneDNN's; what is ours is what surrounds them.
#include "conv_bn_act.h"

#include <ATen/ops/convolution.h>

#include "../conv_gradients.h"
#include "guards.h"

namespace resnet_fast::cpu {

namespace {

OptionalTensor as_dtype(const OptionalTensor& t, at::ScalarType dtype) {
  if (!t.has_value() || !t->defined()) return std::nullopt;
  return t->to(dtype);
}

Tensor convolve(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups) {
  return at::convolution(
      x, conv_weight, as_dtype(conv_bias, x.scalar_type()), stride, padding, dilation, /*transposed=*/false,
      /*output_padding=*/{0, 0}, groups);
}

}  // namespace

Tensor conv_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu) {
  const OpGuard guard;
  // The convolution's output is nobody else's, so the epilogue works in place. Folding batch norm into the weight for
  // oneDNN's fused ReLU instead gains 0-5 % on most layers of ResNet-50, and that ReLU turns NaN into 0.
  return bn_act_into(
      convolve(x, conv_weight, conv_bias, stride, padding, dilation, groups), weight, bias, mean, var, residual, eps,
      relu);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_train(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double eps, bool relu) {
  const OpGuard guard;
  Tensor conv_out = convolve(x, conv_weight, conv_bias, stride, padding, dilation, groups);
  auto [y, mean, var] = bn_act_train(conv_out, weight, bias, residual, eps, relu);
  return {y, conv_out, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& conv_weight, const Tensor& conv_out, const OptionalTensor& y,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu,
    bool training, std::array<bool, 6> output_mask) {
  const OpGuard guard;
  const auto [want_dx, want_dconv_weight, want_dconv_bias, want_dweight, want_dbias, want_dresidual] = output_mask;
  const bool want_conv = want_dx || want_dconv_weight || want_dconv_bias;
  auto [dconv_out, dweight, dbias, dresidual] = bn_act_backward(
      dy, conv_out, y, weight, bias, mean, var, eps, relu, training,
      {want_conv, want_dweight, want_dbias, want_dresidual});
  const auto [dx, dconv_weight, dconv_bias] = conv_gradients(
      dconv_out, x, conv_weight, stride, padding, dilation, groups, {want_dx, want_dconv_weight, want_dconv_bias});
  return {dx, dconv_weight, dconv_bias, dweight, dbias, dresidual};
}

}  // namespace resnet_fast::cpu
