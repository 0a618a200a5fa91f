#include "residual_block.h"

#include <ATen/TensorOperators.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/rsqrt.h>

#include "conv_bn_act.h"
#include "direct_conv.h"
#include "guards.h"
#include "max_pool.h"
#include "winograd.h"
#ifdef WITH_AMX
#include "program/block.h"
#endif

namespace resnet_fast::cpu {

namespace {

at::Tensor or_undefined(const at::Tensor& t) { return t.numel() == 0 ? at::Tensor() : t; }

std::optional<at::Tensor> optional(const at::Tensor& t) { return t.defined() ? std::make_optional(t) : std::nullopt; }

// Batch norm as what a convolution's output is multiplied with and what is added then.
std::pair<at::Tensor, at::Tensor> scale_and_shift(const BlockLayer& layer) {
  at::Tensor scale = at::rsqrt(layer.var.to(at::kFloat) + layer.eps);
  if (layer.weight.defined()) scale = scale * layer.weight.to(at::kFloat);
  at::Tensor shift = -layer.mean.to(at::kFloat) * scale;
  if (layer.bias.defined()) shift = shift + layer.bias.to(at::kFloat);
  return {scale, shift};
}

// The layer by kernels that have batch norm inside; none where a NaN or Inf arose, which Winograd's spread.
std::optional<at::Tensor> by_own_kernel(
    const BlockLayer& layer, const at::Tensor& x, const at::Tensor& residual, bool relu) {
  const auto [scale, shift] = scale_and_shift(layer);
  if (!layer.winograd) {
    return direct_conv(
        x, layer.conv_weight, scale, shift, optional(residual), layer.stride, layer.padding, layer.dilation, relu);
  }
  auto [y, finite] = winograd_conv(x, layer.conv_weight, scale, shift, optional(residual), relu, /*turned=*/false);
  return finite ? std::make_optional(y) : std::nullopt;
}

at::Tensor apply(const BlockLayer& layer, const at::Tensor& x, const at::Tensor& residual, bool relu) {
  const bool rows = x.scalar_type() == at::kFloat && x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  if (rows && (layer.winograd || layer.direct)) {
    if (auto y = by_own_kernel(layer, x, residual, relu)) return *y;
  }
  return conv_bn_act(
      x, layer.conv_weight.to(x.scalar_type()), std::nullopt, optional(layer.weight), optional(layer.bias), layer.mean,
      layer.var, optional(residual), layer.stride, layer.padding, layer.dilation, layer.groups, layer.eps, relu);
}

BlockLayer make_layer(
    const at::Tensor& conv_weight, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& mean,
    const at::Tensor& var, at::IntArrayRef geometry, double eps) {
  return {conv_weight, weight, bias, mean, var, geometry.slice(0, 2), geometry.slice(2, 2), geometry.slice(4, 2),
          geometry[6], eps};
}

at::Tensor layer_by_layer(const at::Tensor& x, const ResidualBlock& block) {
  const size_t last = block.layers.size() - 1 - (block.downsample ? 1 : 0);
  at::Tensor value = x;
  for (size_t i = 0; i < last; ++i) value = apply(block.layers[i], value, {}, true);
  const at::Tensor shortcut = block.downsample           ? apply(block.layers.back(), x, {}, false)
                              : block.residual.defined() ? block.residual
                                                         : x;
  return apply(block.layers[last], value, shortcut, true);
}

// As one program, or else one by one, or else layer by layer.
at::Tensor run(const at::Tensor& x, at::ArrayRef<ResidualBlock> blocks, Unit unit) {
#ifdef WITH_AMX
  if (auto y = amx_residual_blocks(x, blocks, unit)) return *y;
#endif
  if (blocks.size() == 1) return layer_by_layer(x, blocks[0]);
  at::Tensor value = x;
  for (const ResidualBlock& block : blocks) value = run(value, block, unit);
  return value;
}

std::vector<BlockLayer> make_layers(
    at::TensorList conv_weights, at::TensorList weights, at::TensorList biases, at::TensorList running_means,
    at::TensorList running_vars, at::IntArrayRef geometry, at::ArrayRef<double> eps, at::IntArrayRef winograd,
    at::IntArrayRef direct) {
  std::vector<BlockLayer> layers;
  for (size_t i = 0; i < conv_weights.size(); ++i) {
    layers.push_back(make_layer(conv_weights[i], or_undefined(weights[i]), or_undefined(biases[i]), running_means[i],
                                running_vars[i], geometry.slice(7 * i, 7), eps[i]));
  }
  for (const int64_t number : winograd) layers.at(number).winograd = true;
  for (const int64_t number : direct) layers.at(number).direct = true;
  return layers;
}

}  // namespace

at::Tensor residual_block(
    const at::Tensor& x, const std::optional<at::Tensor>& residual, at::TensorList conv_weights, at::TensorList weights,
    at::TensorList biases, at::TensorList running_means, at::TensorList running_vars, at::IntArrayRef geometry,
    at::ArrayRef<double> eps, bool downsample, at::IntArrayRef winograd, at::IntArrayRef direct,
    std::string_view unit) {
  const OpGuard guard;
  auto layers = make_layers(
      conv_weights, weights, biases, running_means, running_vars, geometry, eps, winograd, direct);
  return run(x, ResidualBlock{residual.value_or(at::Tensor()), std::move(layers), downsample}, unit_named(unit));
}

at::Tensor residual_stage(
    const at::Tensor& x, at::TensorList conv_weights, at::TensorList weights, at::TensorList biases,
    at::TensorList running_means, at::TensorList running_vars, at::IntArrayRef geometry, at::ArrayRef<double> eps,
    at::IntArrayRef layers, const c10::List<bool>& downsamples, at::IntArrayRef winograd, at::IntArrayRef direct,
    std::string_view unit) {
  const OpGuard guard;
  const std::vector<BlockLayer> all = make_layers(
      conv_weights, weights, biases, running_means, running_vars, geometry, eps, winograd, direct);
  std::vector<ResidualBlock> blocks;
  auto first = all.begin();
  for (size_t i = 0; i < layers.size(); first += layers[i++]) {
    blocks.push_back({at::Tensor(), {first, first + layers[i]}, downsamples[i]});
  }
  return run(x, blocks, unit_named(unit));
}

at::Tensor stem(
    const at::Tensor& x, const at::Tensor& conv_weight, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, const at::Tensor& mean, const at::Tensor& var, at::IntArrayRef geometry,
    double eps, bool direct, std::string_view unit) {
  const OpGuard guard;
  const at::Tensor none;
  const BlockLayer layer =
      make_layer(conv_weight, weight.value_or(none), bias.value_or(none), mean, var, geometry, eps);
#ifdef WITH_AMX
  if (auto y = amx_stem(x, layer, unit_named(unit))) return *y;
#endif
  const at::MemoryFormat rows = at::MemoryFormat::ChannelsLast;
  at::Tensor input = x.to(conv_weight.scalar_type());
  // as PyTorch has the convolution's output
  const bool in_rows = input.suggest_memory_format() == rows || conv_weight.suggest_memory_format() == rows;
  if (!in_rows || input.numel() == 0) return at::max_pool2d(apply(layer, input, {}, true), {3, 3}, {2, 2}, {1, 1});
  input = input.contiguous(rows);
  if (direct) {
    const auto [scale, shift] = scale_and_shift(layer);
    return direct_conv_max_pool(
        input, direct_pack(conv_weight), conv_weight.size(0), scale, shift, layer.stride, layer.padding, layer.dilation);
  }
  const at::Tensor conv_out = at::convolution(
      input, conv_weight, std::nullopt, layer.stride, layer.padding, layer.dilation, /*transposed=*/false,
      /*output_padding=*/{0, 0}, layer.groups);
  const NormTensors norm({mean, var, weight, bias});
  return std::get<0>(bn_max_pool(conv_out.contiguous(rows), norm, eps, /*wants_index=*/false));
}

}  // namespace resnet_fast::cpu
