// One convolution of a training step, or its data gradient, by Winograd in dot products: what the step in winograd.cpp is
// for whole networks, between tensors.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "../activation_pool.h"
#include "plans.h"
#include "winograd_conv.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSmallPixels = 128;  // images of no more lie side by side, so that a weight serves several
constexpr int64_t kMostValues = 1 << 30;  // of an image

constexpr int64_t kKind = -1;  // of programs: blocks' and stems' keys begin otherwise

}  // namespace

std::tuple<at::Tensor, bool> dots_winograd_conv(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& add, bool turned) {
  const int64_t channels = x.size(1), outputs = weight.size(turned ? 1 : 0), height = x.size(2), width = x.size(3);
  TORCH_CHECK(is_rows(x) && x.numel() > 0, "winograd_dots_conv: x must be bfloat16 in channels_last, and not empty");
  TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3 && weight.size(turned ? 0 : 1) == channels,
              "winograd_dots_conv: weight must be of a 3x3 of x's channels");
  TORCH_CHECK(channels % amx::kVector == 0 && outputs % amx::kVector == 0 &&
                  std::max(channels, outputs) * height * width < kMostValues,
              "winograd_dots_conv: only multiples of ", amx::kVector, " channels, and images of less than 2^30 values");
  TORCH_CHECK(!add.defined() || (is_rows(add) && add.sizes() == at::IntArrayRef({x.size(0), outputs, height, width})),
              "winograd_dots_conv: add must be bfloat16 in channels_last, and of the output's shape");
  const PoolGuard pool;
  const at::Tensor y = at::empty(
      {x.size(0), outputs, height, width}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  Live live;
  live.layers.push_back({weight, {}, {}, {}, {}, 0.0, turned});
  live.residual = add;

  const auto build = [&](Program& program, int64_t capacity, int64_t threads, bool) {
    const bool small = height * width <= kSmallPixels, own = capacity >= 2 * threads && !small;
    const auto buffer = [&](int64_t of, int64_t halo) {
      return program.buffer(of, height, width, halo, small ? std::min(capacity, kGroup) : 1, own, amx::kVector);
    };
    Packed packed = empty_winograd(0, channels, outputs);
    packed.scale = at::Tensor();
    packed.bias = at::zeros({outputs}, at::kFloat);
    program.section(false);
    program.add(make_pack(1, capacity, {packed}));
    program.section(own);
    const int64_t from = buffer(channels, 1);
    program.add(make_read(1, program.at(from)));
    const int64_t to = small ? buffer(outputs, 0) : program.tensor(Place::kY, outputs, height, width);
    int64_t added = -1;
    if (add.defined()) {
      added = small ? to : program.tensor(Place::kResidual, outputs, height, width);
      if (small) program.add(make_read(1, program.at(to), Place::kResidual));
    }
    program.add(make_winograd(threads, own ? 1 : threads, "conv", program.at(from), program.at(to),
                              added < 0 ? nullptr : &program.at(added), packed, /*relu=*/false));
    if (small) program.write(to);
  };
  const std::vector<int64_t> key = {kKind, channels, outputs, height, width, add.defined()};
  run_planned(key, 1, Unit::kDots, build, x, y, live);
  return {y, live.finite.load()};
}

}  // namespace resnet_fast::cpu
