// A convolution, or its data gradient, is a Program of one step (program/winograd.cpp) between tensors. The weight's
// gradient goes slab by slab of tiles, which all threads share: first by tiles, then by blocks of the sums. A value's sum
// has a fixed order whatever the threads.
#include "winograd_bfloat16.h"

#ifdef WITH_AMX
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "amx/amx.h"
#include "guards.h"
#include "integers.h"
#include "program/plans.h"
#include "unit.h"
#endif

namespace resnet_fast::cpu {

#ifdef WITH_AMX

namespace {

constexpr int64_t kKind = -1;             // of programs: blocks' and stems' keys begin otherwise
constexpr int64_t kSmallPixels = 128;     // images of no more lie side by side, so that a weight serves several
constexpr int64_t kMostValues = 1 << 30;  // of an image
constexpr int64_t kSlabBytes = 4 << 20;
constexpr int64_t kFewestPairs = 64;  // of tiles, that are worth a pass over the sums

bool is_rows(const Tensor& t) {
  return t.scalar_type() == at::kBFloat16 && t.dim() == 4 && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

uint16_t* values(const Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<Tensor, bool> winograd_dots_conv(const Tensor& x, const Tensor& weight, const OptionalTensor& add, bool turned) {
  const OpGuard guard;
  unit_named("dots");  // raises where there are none
  const int64_t channels = x.size(1), outputs = weight.size(turned ? 1 : 0), height = x.size(2), width = x.size(3);
  TORCH_CHECK(is_rows(x) && x.numel() > 0, "winograd_dots_conv: x must be bfloat16 in channels_last, and not empty");
  TORCH_CHECK(weight.size(2) == 3 && weight.size(3) == 3 && weight.size(turned ? 0 : 1) == channels,
              "winograd_dots_conv: weight must be of a 3x3 of x's channels");
  TORCH_CHECK(channels % amx::kVector == 0 && outputs % amx::kVector == 0 &&
                  std::max(channels, outputs) * height * width < kMostValues,
              "winograd_dots_conv: only multiples of ", amx::kVector, " channels, and images of less than 2^30 values");
  TORCH_CHECK(!add || (is_rows(*add) && add->sizes() == at::IntArrayRef({x.size(0), outputs, height, width})),
              "winograd_dots_conv: add must be bfloat16 in channels_last, and of the output's shape");
  const Tensor y = at::empty(
      {x.size(0), outputs, height, width}, x.options().memory_format(at::MemoryFormat::ChannelsLast));
  Live live;
  live.layers.push_back({weight, {}, {}, {}, {}, 0.0, turned});
  live.residual = add.value_or(Tensor());

  const auto build = [&](Program& program, int64_t capacity, int64_t threads, bool) {
    const bool small = height * width <= kSmallPixels, own = capacity >= 2 * threads && !small;
    const auto buffer = [&](int64_t of, int64_t halo) {
      return program.buffer(of, height, width, halo, small ? std::min(capacity, kGroup) : 1, own, amx::kVector);
    };
    Packed packed = empty_winograd(0, channels, outputs);
    packed.scale = Tensor();
    packed.bias = at::zeros({outputs}, at::kFloat);
    program.section(false);
    program.add(make_pack(1, capacity, {packed}));
    program.section(own);
    const int64_t from = buffer(channels, 1);
    program.add(make_read(1, program.at(from)));
    const int64_t to = small ? buffer(outputs, 0) : program.tensor(Place::kY, outputs, height, width);
    int64_t added = -1;
    if (add) {
      added = small ? to : program.tensor(Place::kResidual, outputs, height, width);
      if (small) program.add(make_read(1, program.at(to), Place::kResidual));
    }
    program.add(make_winograd(threads, own ? 1 : threads, "conv", program.at(from), program.at(to),
                              added < 0 ? nullptr : &program.at(added), packed, /*relu=*/false));
    if (small) program.write(to);
  };
  const std::vector<int64_t> key = {kKind, channels, outputs, height, width, add.has_value()};
  run_planned(key, 1, Unit::kDots, build, x, y, live);
  return {y, live.finite.load()};
}

std::tuple<Tensor, bool> winograd_dots_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const OpGuard guard;
  unit_named("dots");
  const int64_t outputs = dy.size(1), channels = x.size(1);
  TORCH_CHECK(is_rows(dy) && is_rows(x) && x.numel() > 0 && weight.scalar_type() == at::kBFloat16,
              "winograd_dots_weight_gradient: all must be bfloat16, dy and x in channels_last and not empty");
  TORCH_CHECK(dy.sizes() == at::IntArrayRef({x.size(0), outputs, x.size(2), x.size(3)}) &&
                  weight.sizes() == at::IntArrayRef({outputs, channels, 3, 3}),
              "winograd_dots_weight_gradient: dy, x and weight are not of one 3x3 with stride and padding 1");
  TORCH_CHECK(channels % amx::kVector == 0 && outputs % amx::kVector == 0,
              "winograd_dots_weight_gradient: only multiples of ", amx::kVector, " channels");
  const bool dense = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor dweight = at::empty_like(dense ? weight : weight.contiguous());

  amx::WinogradGradientArgs args{};
  args.channels = channels, args.outputs = outputs, args.height = x.size(2), args.width = x.size(3);
  args.tiles = x.size(0) * div_up(args.height, 2) * div_up(args.width, 2);
  const int64_t pair_values = 2 * amx::kWinogradPoints * (channels + outputs), all = div_up(args.tiles, 2);
  const int64_t most = std::max<int64_t>(kFewestPairs, kSlabBytes / (2 * pair_values));
  args.pairs = div_up(all, div_up(all, most));
  const Tensor zeros = at::zeros({std::max(channels, outputs)}, at::kBFloat16);
  const Tensor slab = at::empty({args.pairs * pair_values}, at::kBFloat16);
  const Tensor sums = at::empty({amx::kWinogradPoints * outputs * channels}, at::kFloat);
  args.x = values(x), args.dy = values(dy), args.zeros = values(zeros);
  args.x_values = values(slab);
  args.dy_values = args.x_values + 2 * amx::kWinogradPoints * channels * args.pairs;
  args.sums = sums.mutable_data_ptr<float>();
  args.dweight = values(dweight);
  args.output_step = dweight.stride(0), args.channel_step = dweight.stride(1), args.tap_step = dweight.stride(3);

  const int64_t blocks = sums.numel() / amx::kBlockValues;
  for (int64_t first = 0; first < all; first += args.pairs) {
    const int64_t pairs = std::min(args.pairs, all - first);
    at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      amx::winograd_gradient_transform(args, 2 * first, begin, end);
    });
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      amx::winograd_gradient_multiply(args, pairs, first == 0, begin, end);
    });
  }
  std::atomic<bool> finite{true};
  at::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
    if (!amx::winograd_gradient_finish(args, begin, end)) finite = false;
  });
  return {dweight, finite.load()};
}

#else

std::tuple<Tensor, bool> winograd_dots_conv(const Tensor&, const Tensor&, const OptionalTensor&, bool) {
  TORCH_CHECK(false, "built without AMX");
}

std::tuple<Tensor, bool> winograd_dots_weight_gradient(const Tensor&, const Tensor&, const Tensor&) {
  TORCH_CHECK(false, "built without AMX");
}

#endif

}  // namespace resnet_fast::cpu
