#include "conv_gradients.h"

#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>

namespace resnet_fast {

std::tuple<at::Tensor, at::Tensor, at::Tensor> conv_gradients(
    const at::Tensor& dconv_out, const at::Tensor& x, const at::Tensor& conv_weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, std::array<bool, 3> wanted) {
  at::Tensor dx, dconv_weight, dconv_bias;
  if (wanted[0] || wanted[1] || wanted[2]) {
    const std::array<int64_t, 1> bias_sizes = {dconv_out.size(1)};
    std::tie(dx, dconv_weight, dconv_bias) = at::convolution_backward(
        dconv_out, x, conv_weight, at::IntArrayRef(bias_sizes), stride, padding, dilation, /*transposed=*/false,
        /*output_padding=*/{0, 0}, groups, wanted);
  }
  const auto or_empty = [&](const at::Tensor& t) { return t.defined() ? t : at::empty({0}, x.options()); };
  return {or_empty(dx), or_empty(dconv_weight), or_empty(dconv_bias)};
}

}  // namespace resnet_fast
