// Schemas and registrations of the native ops, torch.ops.resnet_fast_native.*
//
// One function per op and device; validation for users is in resnet_fast/functional.py. x is 4-D and dense, in
// channels_last or contiguous memory format, which the outputs follow; per-channel tensors are (C,). SymInt in a schema
// matches the public ops; kernels take plain integers.
#include <torch/library.h>

#include "cpu/bn_act.h"
#include "cpu/conv_bn_act.h"
#ifdef WITH_CUDA
#include "cuda/bn_act.h"
#endif

TORCH_LIBRARY(resnet_fast_native, m) {
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
}

TORCH_LIBRARY_IMPL(resnet_fast_native, CPU, m) {
  m.impl("bn_act", &resnet_fast::cpu::bn_act);
  m.impl("bn_act_train", &resnet_fast::cpu::bn_act_train);
  m.impl("bn_act_backward", &resnet_fast::cpu::bn_act_backward);
  m.impl("conv_bn_act", &resnet_fast::cpu::conv_bn_act);
  m.impl("conv_bn_act_train", &resnet_fast::cpu::conv_bn_act_train);
  m.impl("conv_bn_act_backward", &resnet_fast::cpu::conv_bn_act_backward);
}

#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(resnet_fast_native, CUDA, m) {
  m.impl("bn_act", &resnet_fast::cuda::bn_act);
  m.impl("bn_act_train", &resnet_fast::cuda::bn_act_train);
  m.impl("bn_act_backward", &resnet_fast::cuda::bn_act_backward);
}
#endif
