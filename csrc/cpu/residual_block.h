// Inference of a whole residual block, y = relu(F(x) + shortcut), of several, and of the stem before the first.
#pragma once

#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <vector>

namespace resnet_fast::cpu {

// A convolution and its batch norm; a vector that is absent is undefined.
struct BlockLayer {
  at::Tensor conv_weight, weight, bias, mean, var;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  double eps;
  bool winograd = false, direct = false;  // by these kernels, wherever they can
};

// layers: in order, the downsample's last. residual: undefined where the block's input or the downsample is the shortcut.
struct ResidualBlock {
  at::Tensor residual;
  std::vector<BlockLayer> layers;
  bool downsample;
};

// Seven numbers a layer: stride, padding and dilation in pairs, groups. Empty vectors are absent ones. winograd and direct:
// the numbers of the layers that these are faster for. unit: what multiplies the block's convolutions in one program, or "".
at::Tensor residual_block(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, at::TensorList conv_weights, at::TensorList weights,
    at::TensorList biases, at::TensorList running_means, at::TensorList running_vars, at::IntArrayRef geometry,
    at::ArrayRef<double> eps, bool downsample, at::IntArrayRef winograd, at::IntArrayRef direct,
    std::string_view unit);

// Blocks one behind another, each of so many layers and with a downsample or not; the lists hold all of their layers.
at::Tensor residual_stage(
    const at::Tensor& x, at::TensorList conv_weights, at::TensorList weights, at::TensorList biases,
    at::TensorList running_means, at::TensorList running_vars, at::IntArrayRef geometry, at::ArrayRef<double> eps,
    at::IntArrayRef layers, const c10::List<bool>& downsamples, at::IntArrayRef winograd, at::IntArrayRef direct,
    std::string_view unit);

// max_pool2d(relu(batch_norm(conv2d(x))), 3, stride 2, padding 1) in conv_weight's dtype, which x is rounded to. direct:
// whether that is faster for the convolution; unit: as above.
at::Tensor stem(
    const at::Tensor& x, const at::Tensor& conv_weight, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef geometry,
    double eps, bool direct, std::string_view unit);

}  // namespace resnet_fast::cpu
