#include "frozen_network.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/max_pool2d.h>

#include <chrono>

#include "direct_conv.h"
#include "guards.h"
#include "max_pool.h"
#include "winograd.h"

namespace resnet_fast::cpu {

namespace {

using Conv = FrozenNetwork::Conv;

// Boxed, because PyTorch promises no C++ signature of these.
const c10::OperatorHandle& onednn_conv() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise", "");
  return op;
}
const c10::OperatorHandle& onednn_conv_onto() {
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("mkldnn::_convolution_pointwise_", "binary");
  return op;
}

at::Tensor call(const c10::OperatorHandle& op, torch::jit::Stack stack) {
  op.callBoxed(stack);
  return stack.at(0).toTensor();
}

// act(conv(x) + y) into y where there is one, else into a new tensor.
at::Tensor by_onednn(const Conv& conv, const at::Tensor& x, const at::Tensor& y) {
  const char* act = conv.relu ? "relu" : "none";
  const c10::List<std::optional<at::Scalar>> none;
  if (!y.defined()) {
    return call(onednn_conv(), {x, conv.onednn, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, act, none, ""});
  }
  return call(
      onednn_conv_onto(), {y, x, conv.onednn, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups, "add",
                           at::Scalar(1.0), act, none, ""});
}

}  // namespace

int64_t FrozenNetwork::add(Layer layer) {
  const auto number = static_cast<int64_t>(layers_.size());
  for (const std::optional<int64_t> read : {std::optional(layer.x), layer.residual}) {
    if (!read.has_value()) continue;
    TORCH_CHECK_INDEX(*read >= 0 && *read <= number, "no value ", *read, " before layer ", number);
    last_reader_[*read] = number;
  }
  layers_.push_back(std::move(layer));
  last_reader_.push_back(-1);
  return number + 1;
}

int64_t FrozenNetwork::conv(int64_t x, std::optional<int64_t> residual, Conv conv) {
  return add({x, residual, std::move(conv)});
}

int64_t FrozenNetwork::max_pool(int64_t x) { return add({x, std::nullopt, std::nullopt}); }

bool FrozenNetwork::pools(int64_t number) const {
  const auto behind = static_cast<size_t>(number) + 1;
  if (behind == layers_.size() || layers_[behind].conv.has_value() || layers_[behind].x != number + 1) return false;
  const Layer& layer = layers_[number];
  const bool alone = last_read(number + 1, number + 1) && !layer.residual.has_value();
  return alone && layer.conv.has_value() && layer.conv->direct.has_value() && layer.conv->relu;
}

at::Tensor FrozenNetwork::compute(int64_t number, const std::vector<at::Tensor>& values) const {
  const Layer& layer = layers_[number];
  const at::Tensor& x = values[layer.x];
  if (!layer.conv.has_value()) {
    const bool ours = x.is_contiguous(at::MemoryFormat::ChannelsLast) && x.numel() > 0;
    return ours ? cpu::max_pool(x) : at::max_pool2d(x, {3, 3}, {2, 2}, {1, 1});
  }
  const Conv& conv = *layer.conv;
  const at::Tensor residual = layer.residual.has_value() ? values[*layer.residual] : at::Tensor();
  const auto added = residual.defined() ? std::optional(residual) : std::nullopt;
  const bool ours = residual.defined() && last_read(*layer.residual, number) && *layer.residual != layer.x;
  if (pools(number)) {
    return direct_conv_max_pool(
        x, *conv.direct, conv.out_channels, std::nullopt, conv.bias, conv.stride, conv.padding, conv.dilation);
  }
  if (conv.direct.has_value()) {
    return direct_conv_packed(
        x, *conv.direct, conv.out_channels, conv.bias, added, conv.stride, conv.padding, conv.dilation, conv.relu, ours);
  }
  if (conv.winograd.has_value()) {
    auto [y, finite] = winograd_conv_packed(x, *conv.winograd, conv.bias, conv.out_channels, added, conv.relu);
    if (finite) return y;
  }
  if (!residual.defined()) return by_onednn(conv, x, {});
  // oneDNN's accumulating sum is faster than its out-of-place binary add, even with a copy before it
  return by_onednn(conv, x, ours ? residual : residual.clone(at::MemoryFormat::ChannelsLast));
}

at::Tensor FrozenNetwork::run_all(const at::Tensor& x, std::vector<Time>* times) const {
  using Clock = std::chrono::steady_clock;
  const OpGuard guard;
  const auto count = static_cast<int64_t>(layers_.size());
  std::vector<at::Tensor> values(count + 1);
  values[0] = x;
  for (int64_t i = 0; i < count; ++i) {
    const Layer& layer = layers_[i];
    const int64_t end = pools(i) ? i + 1 : i;  // the last layer that is computed here
    const auto start = times == nullptr ? Clock::time_point() : Clock::now();
    values[end + 1] = compute(i, values);
    if (times != nullptr) times->push_back({end + 1 - i, std::chrono::duration<double>(Clock::now() - start).count()});
    if (last_read(layer.x, i)) values[layer.x].reset();
    if (layer.residual.has_value() && last_read(*layer.residual, i)) values[*layer.residual].reset();
    i = end;
  }
  return values[count];
}

}  // namespace resnet_fast::cpu
