// Schemas and registrations of the native ops, torch.ops.resnet_fast_native.*
//
// One function per op and device; validation for users is in resnet_fast/functional.py. x is 4-D and dense, in
// channels_last or contiguous memory format, which the outputs follow; per-channel tensors are (C,). SymInt in a schema
// matches the public ops; kernels take plain integers.
//
// Those from bn_statistics on are the primitives of resnet_fast/backends/primitives/native.py. A norm is the list of mean,
// var, weight and bias, empty for none; those of convolutions take x in channels_last.
#include <torch/library.h>

#include "autocast.h"
#include "cpu/bn_act.h"
#include "cpu/bn_train.h"
#include "cpu/conv1x1.h"
#include "cpu/conv_bn_act.h"
#include "cpu/conv_train.h"
#include "cpu/direct_conv.h"
#include "cpu/max_pool.h"
#include "cpu/residual_block.h"
#include "cpu/winograd.h"
#include "cpu/winograd_bfloat16.h"
#include "cpu/winograd_gradient.h"
#ifdef WITH_CUDA
#include "cuda/ops.h"
#endif

TORCH_LIBRARY(resnet_fast_native, m) {
  m.def("autocast_cast(Tensor weight, ScalarType dtype) -> Tensor");
  m.def(
      "bn_act(Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, Tensor? residual, float eps, bool relu) "
      "-> Tensor");
  m.def(
      "bn_act_train(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, bool relu) "
      "-> (Tensor y, Tensor mean, Tensor var)");
  m.def(
      "bn_act_backward(Tensor dy, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, "
      "float eps, bool relu, bool training, bool[4] output_mask) "
      "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)");
  m.def(
      "conv_bn_act(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, Tensor mean, "
      "Tensor var, Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
      "float eps, bool relu) -> Tensor");
  m.def(
      "conv_bn_act_train(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor? weight, Tensor? bias, "
      "Tensor? residual, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, float eps, bool relu) "
      "-> (Tensor y, Tensor conv_out, Tensor mean, Tensor var)");
  m.def(
      "conv_bn_act_backward(Tensor dy, Tensor x, Tensor conv_weight, Tensor conv_out, Tensor? y, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor var, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, "
      "float eps, bool relu, bool training, bool[6] output_mask) "
      "-> (Tensor dx, Tensor dconv_weight, Tensor dconv_bias, Tensor dweight, Tensor dbias, Tensor dresidual)");
  // CUDA only: act(norm(conv2d(x) + conv_bias) + residual) by a path of cuda/conv_bn_act_op.cpp
  m.def(
      "conv_epilogue(Tensor x, Tensor conv_weight, Tensor? conv_bias, Tensor?[] norm, float eps, Tensor? residual, "
      "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups, bool relu, str path) -> Tensor");
  m.def(
      "residual_block(Tensor x, Tensor? residual, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, "
      "Tensor[] running_means, Tensor[] running_vars, SymInt[] geometry, float[] eps, bool downsample, int[] winograd, "
      "int[] direct, str unit) -> Tensor");
  m.def(
      "residual_stage(Tensor x, Tensor[] conv_weights, Tensor[] weights, Tensor[] biases, Tensor[] running_means, "
      "Tensor[] running_vars, SymInt[] geometry, float[] eps, int[] layers, bool[] downsamples, int[] winograd, "
      "int[] direct, str unit) -> Tensor");
  m.def(
      "stem(Tensor x, Tensor conv_weight, Tensor? weight, Tensor? bias, Tensor running_mean, Tensor running_var, "
      "SymInt[] geometry, float eps, bool direct, str unit) -> Tensor");
  // CPU only, float32: a 3x3 convolution with stride and padding 1, by its weight packed once or not, and the weight's
  // gradient; false where NaN or Inf arose
  m.def("winograd_pack(Tensor weight) -> Tensor");
  m.def(
      "winograd_conv_packed(Tensor x, Tensor packed, Tensor? bias, int out_channels, Tensor? residual, bool relu) "
      "-> (Tensor y, bool finite)");
  m.def(
      "winograd_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, bool relu, bool turned) "
      "-> (Tensor y, bool finite)");
  m.def(
      "winograd_conv_train(Tensor x, Tensor?[] x_norm, float x_eps, Tensor weight, bool statistics) "
      "-> (Tensor conv_out, Tensor mean, Tensor var, bool finite)");
  m.def(
      "winograd_weight_gradient(Tensor dy, Tensor x, Tensor?[] x_norm, float x_eps, Tensor weight) "
      "-> (Tensor dweight, bool finite)");
  // Winograd's of bfloat16, on CPUs with its dot products in AVX-512
  m.def("winograd_dots_conv(Tensor x, Tensor weight, Tensor? add, bool turned) -> (Tensor y, bool finite)");
  m.def("winograd_dots_weight_gradient(Tensor dy, Tensor x, Tensor weight) -> (Tensor dweight, bool finite)");
  // CPU only, float32: a dense convolution by a weight that may change, or by one that is packed once
  m.def(
      "direct_conv(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, int[2] dilation, bool relu) -> Tensor");
  m.def("direct_pack(Tensor weight) -> Tensor");
  m.def(
      "direct_conv_packed(Tensor x, Tensor packed, int out_channels, Tensor? bias, Tensor? residual, int[2] stride, "
      "int[2] padding, int[2] dilation, bool relu) -> Tensor");
  m.def(
      "direct_conv_max_pool(Tensor x, Tensor packed, int out_channels, Tensor? scale, Tensor? bias, int[2] stride, "
      "int[2] padding, int[2] dilation) -> Tensor");

  m.def("bn_statistics(Tensor conv_out) -> (Tensor mean, Tensor var)");
  m.def(
      "bn_apply(Tensor conv_out, Tensor?[] norm, float eps, Tensor? residual, Tensor?[] residual_norm, "
      "float residual_eps, bool relu) -> Tensor");
  m.def(
      "bn_backward_reduce(Tensor dy, Tensor conv_out, Tensor?[] norm, float eps, bool relu) "
      "-> (Tensor sum_dz, Tensor sum_dzx)");
  m.def(
      "bn_backward_apply(Tensor dy, Tensor? conv_out, Tensor?[] norm, float eps, bool relu, Tensor? mean_dz, "
      "Tensor? mean_dzx) -> Tensor");
  m.def("relu_mask(Tensor dy, Tensor y, Tensor layout_like) -> Tensor");

  // CPU only, channels_last: 3x3 windows with stride 2 and padding 1
  m.def("max_pool(Tensor x) -> Tensor");
  m.def(
      "bn_max_pool(Tensor conv_out, Tensor?[] norm, float eps, bool wants_index) -> (Tensor y, Tensor index)");
  m.def(
      "bn_max_pool_backward_reduce(Tensor dy, Tensor index, Tensor conv_out, Tensor?[] norm, float eps) "
      "-> (Tensor sum_dz, Tensor sum_dzx)");
  m.def(
      "bn_max_pool_backward_apply(Tensor dy, Tensor index, Tensor conv_out, Tensor?[] norm, float eps, "
      "Tensor? mean_dz, Tensor? mean_dzx) -> Tensor");

  m.def(
      "conv1x1_join(Tensor x, Tensor?[] x_norm, float x_eps, Tensor conv_weight, int[2] stride, Tensor?[] norm, "
      "float eps, Tensor? residual, Tensor?[] residual_norm, float residual_eps, bool relu) -> Tensor");
  m.def("gram(Tensor x, Tensor?[] x_norm, float x_eps, int[2] stride) -> (Tensor mean, Tensor cov)");
  m.def(
      "outer(Tensor dz, Tensor x, Tensor?[] x_norm, float x_eps, int[2] stride, Tensor mean) "
      "-> (Tensor outer, Tensor sum_dz)");
  m.def(
      "gram_dgrad(Tensor dz, Tensor x, Tensor?[] x_norm, float x_eps, int[2] stride, Tensor dz_matrix, "
      "Tensor x_matrix, Tensor mean, Tensor constant, Tensor? add) -> Tensor");
  m.def(
      "conv_train(Tensor x, Tensor?[] x_norm, float x_eps, Tensor conv_weight, int[2] stride, int[2] padding, "
      "int[2] dilation, bool statistics) -> (Tensor conv_out, Tensor mean, Tensor var)");
  m.def(
      "conv_train_backward(Tensor dconv_out, Tensor x, Tensor?[] x_norm, float x_eps, Tensor conv_weight, "
      "int[2] stride, int[2] padding, int[2] dilation, Tensor? add, bool[2] output_mask) "
      "-> (Tensor dx, Tensor dconv_weight)");
}

// No kernel of its own: autograd sees the cast inside, which may be one that was made before.
TORCH_LIBRARY_IMPL(resnet_fast_native, CompositeImplicitAutograd, m) {
  m.impl("autocast_cast", &resnet_fast::autocast_cast);
}

namespace {

at::Tensor direct_conv_packed(
    const at::Tensor& x, const at::Tensor& packed, int64_t out_channels, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    bool relu) {
  return resnet_fast::cpu::direct_conv_packed(
      x, packed, out_channels, bias, residual, stride, padding, dilation, relu, /*onto=*/false);
}

}  // namespace

TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("bn_act", &resnet_fast::cpu::bn_act);
  m.impl("bn_act_train", &resnet_fast::cpu::bn_act_train);
  m.impl("bn_act_backward", &resnet_fast::cpu::bn_act_backward);
  m.impl("conv_bn_act", &resnet_fast::cpu::conv_bn_act);
  m.impl("conv_bn_act_train", &resnet_fast::cpu::conv_bn_act_train);
  m.impl("conv_bn_act_backward", &resnet_fast::cpu::conv_bn_act_backward);
  m.impl("residual_block", &resnet_fast::cpu::residual_block);
  m.impl("residual_stage", &resnet_fast::cpu::residual_stage);
  m.impl("stem", &resnet_fast::cpu::stem);
  m.impl("direct_conv", &resnet_fast::cpu::direct_conv);
  m.impl("direct_pack", &resnet_fast::cpu::direct_pack);
  m.impl("direct_conv_packed", &direct_conv_packed);
  m.impl("direct_conv_max_pool", &resnet_fast::cpu::direct_conv_max_pool);
  m.impl("winograd_pack", &resnet_fast::cpu::winograd_pack);
  m.impl("winograd_conv_packed", &resnet_fast::cpu::winograd_conv_packed);
  m.impl("winograd_conv", &resnet_fast::cpu::winograd_conv);
  m.impl("winograd_dots_weight_gradient", &resnet_fast::cpu::winograd_dots_weight_gradient);
  m.impl("winograd_dots_conv", &resnet_fast::cpu::winograd_dots_conv);
  m.impl("winograd_conv_train", &resnet_fast::cpu::winograd_conv_train);
  m.impl("winograd_weight_gradient", &resnet_fast::cpu::winograd_weight_gradient);
  m.impl("bn_statistics", &resnet_fast::cpu::bn_statistics);
  m.impl("bn_apply", &resnet_fast::cpu::bn_apply);
  m.impl("bn_backward_reduce", &resnet_fast::cpu::bn_backward_reduce);
  m.impl("bn_backward_apply", &resnet_fast::cpu::bn_backward_apply);
  m.impl("relu_mask", &resnet_fast::cpu::relu_mask);
  m.impl("max_pool", &resnet_fast::cpu::max_pool);
  m.impl("bn_max_pool", &resnet_fast::cpu::bn_max_pool);
  m.impl("bn_max_pool_backward_reduce", &resnet_fast::cpu::bn_max_pool_backward_reduce);
  m.impl("bn_max_pool_backward_apply", &resnet_fast::cpu::bn_max_pool_backward_apply);
  m.impl("conv1x1_join", &resnet_fast::cpu::conv1x1_join);
  m.impl("gram", &resnet_fast::cpu::gram);
  m.impl("outer", &resnet_fast::cpu::outer);
  m.impl("gram_dgrad", &resnet_fast::cpu::gram_dgrad);
  m.impl("conv_train", &resnet_fast::cpu::conv_train);
  m.impl("conv_train_backward", &resnet_fast::cpu::conv_train_backward);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("bn_act", &resnet_fast::cuda::bn_act);
  m.impl("bn_act_train", &resnet_fast::cuda::bn_act_train);
  m.impl("bn_act_backward", &resnet_fast::cuda::bn_act_backward);
  m.impl("conv_bn_act", &resnet_fast::cuda::conv_bn_act);
  m.impl("conv_bn_act_train", &resnet_fast::cuda::conv_bn_act_train);
  m.impl("conv_bn_act_backward", &resnet_fast::cuda::conv_bn_act_backward);
  m.impl("conv_epilogue", &resnet_fast::cuda::conv_epilogue);
  m.impl("bn_statistics", &resnet_fast::cuda::bn_statistics);
  m.impl("bn_apply", &resnet_fast::cuda::bn_apply);
  m.impl("bn_backward_reduce", &resnet_fast::cuda::bn_backward_reduce);
  m.impl("bn_backward_apply", &resnet_fast::cuda::bn_backward_apply);
  m.impl("relu_mask", &resnet_fast::cuda::relu_mask);
}
#endif
