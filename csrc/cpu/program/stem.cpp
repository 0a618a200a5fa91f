#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "block.h"
#include "plans.h"

namespace resnet_fast::cpu {

namespace {

bool fits(const at::Tensor& x, const BlockLayer& layer, Unit unit) {
  const at::Tensor& weight = layer.conv_weight;
  const auto dtype = weight.scalar_type();
  if (!computes(unit, dtype)) return false;
  if (x.numel() == 0 || (x.scalar_type() != dtype && x.scalar_type() != at::kFloat)) return false;
  const bool channels_last = x.suggest_memory_format() == at::MemoryFormat::ChannelsLast ||
                             weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const bool square = layer.stride[0] == layer.stride[1] && layer.dilation[0] == 1 && layer.dilation[1] == 1;
  return channels_last && square && layer.groups == 1 && weight.size(0) % amx::kVector == 0 &&
         weight.size(1) <= amx::kImageChannels && weight.size(1) * weight.size(3) <= amx::kVector;
}

// A kernel's row, pixel by pixel, as its input channels: (K, 32, R, 1), float32.
at::Tensor widened(const at::Tensor& weight) {
  const int64_t outputs = weight.size(0), rows = weight.size(2), values = weight.size(1) * weight.size(3);
  const auto options = weight.options().dtype(at::kFloat).memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor wide = at::zeros({outputs, amx::kVector, rows, 1}, options);
  wide.narrow(1, 0, values).copy_(weight.permute({0, 3, 1, 2}).reshape({outputs, values, rows, 1}));
  return wide;
}

}  // namespace

std::optional<at::Tensor> amx_stem(const at::Tensor& x, const BlockLayer& layer, Unit unit) {
  if (!fits(x, layer, unit)) return std::nullopt;
  const at::Tensor& weight = layer.conv_weight;
  const int64_t channels = weight.size(0), rows = weight.size(2), stride = layer.stride[0];
  const int64_t top = layer.padding[0], left = layer.padding[1];
  const int64_t height = (x.size(2) + 2 * top - rows) / stride + 1;
  const int64_t width = (x.size(3) + 2 * left - weight.size(3)) / stride + 1;
  const int64_t pooled_height = (height - 1) / 2 + 1, pooled_width = (width - 1) / 2 + 1;
  const auto options = weight.options().memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor y = at::empty({x.size(0), channels, pooled_height, pooled_width}, options);
  Live live;
  live.layers.push_back(live_layer(layer, widened(weight)));

  const int planes = weight.scalar_type() == at::kFloat ? 3 : 1;
  const auto build = [&](Program& program, int64_t capacity, int64_t threads, bool) {
    const bool own = capacity >= 2 * threads;
    std::vector<std::vector<int64_t>> taps;
    for (int64_t row = 0; row < rows; ++row) taps.push_back({row - top, -left});
    const Packed packed = empty_packed(0, planes, channels, rows);
    program.section(false);
    program.add(make_pack(planes, capacity, {packed}));
    program.section(own);
    const int64_t image =
        program.buffer(x.size(1), x.size(2), x.size(3), std::max(top, left), 1, own, x.size(1));
    const int64_t pooled = planes == 1 ? program.tensor(Place::kY, channels, pooled_height, pooled_width)
                                       : program.buffer(channels, pooled_height, pooled_width, 0, 1, own, amx::kVector);
    program.read(image);
    program.add(make_conv_pool(planes, unit == Unit::kTiles, "conv", program.at(image),
                               program.at(program.band(pooled, width)), program.at(pooled), height, packed, taps, weight.size(3), stride));
    if (planes == 1) {
      program.add(make_check());  // the kernel is widened by weights of zero, and Inf times zero is NaN
    } else {
      program.write(pooled);
    }
  };
  const std::vector<int64_t> key = {x.size(1), x.size(2), x.size(3), channels, rows, weight.size(3), stride, top, left};
  run_planned(key, planes, unit, build, x, y, live);
  return live.finite ? std::make_optional(y) : std::nullopt;
}

}  // namespace resnet_fast::cpu
