// The tiles are cut into slabs, each transformed, multiplied and transformed back by one thread while it is in the
// core's cache. Where there are too few tiles for that, all threads share one slab, pass by pass, and its products by
// weights, so that each weight is read once. A value's sum has a fixed order whatever the slabs, so no bit depends on
// the number of threads.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <utility>

#include "guards.h"
#include "kernels.h"
#include "winograd_points.h"

namespace resnet_fast::cpu {

namespace {

// Most tiles of a slab. Where the weights stay in the second-level cache, so should the slab beside them; else it is
// larger, so that the weights are read less often.
constexpr int64_t kSmallSlab = 24, kLargeSlab = 72;
constexpr int64_t kWeightsKept = 768 * 1024;  // bytes
// Channels that are summed up in one go: long sums set the error (NOTES.md), and PyTorch's is least in narrow layers.
constexpr int64_t kSum = 32, kNarrowSum = 16, kNarrow = 128;
constexpr int64_t kLine = 16;  // floats

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return div_up(a, b) * b; }

// A thread's, or all threads', transformed input and products.
class Scratch {
 public:
  Scratch(const WinogradConv& conv, int64_t tiles, int64_t slabs)
      // A line more than the tiles need, so that the 36 elements of a tile do not fall into one set of the cache.
      : in_(tiles * round_up(conv.channels, kWinogradBlock) + kLine),
        out_(tiles * conv.panels * kWinogradPanel + kLine),
        buffer_(at::empty({slabs, kWinogradElements * (in_ + out_)}, at::kFloat)) {}

  WinogradSlab slab(int64_t number, int64_t first, int64_t tiles) const {
    float* mine = buffer_.mutable_data_ptr<float>() + number * buffer_.size(1);
    return {first, tiles, mine, in_, mine + kWinogradElements * in_, out_};
  }

 private:
  int64_t in_, out_;
  Tensor buffer_;
};

bool run_by_slab(const WinogradConv& conv, int64_t tiles, int64_t step) {
  const Kernels& k = kernels();
  const Scratch scratch(conv, step, at::get_num_threads());
  std::atomic<bool> finite{true};
  at::parallel_for(0, div_up(tiles, step), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto slab = scratch.slab(at::get_thread_num(), i * step, std::min(step, tiles - i * step));
      k.winograd_input(conv, slab, 0, slab.tiles);
      k.winograd_product(conv, slab, 0, kWinogradElements * conv.panels);
      if (!k.winograd_output(conv, slab, 0, slab.tiles)) finite = false;
    }
  });
  return finite;
}

bool run_together(const WinogradConv& conv, int64_t tiles) {
  const Kernels& k = kernels();
  const Scratch scratch(conv, tiles, 1);
  const auto slab = scratch.slab(0, 0, tiles);
  const int64_t products = kWinogradElements * conv.panels;
  std::atomic<bool> finite{true};
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) { k.winograd_input(conv, slab, begin, end); });
  at::parallel_for(0, products, 1, [&](int64_t begin, int64_t end) { k.winograd_product(conv, slab, begin, end); });
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    if (!k.winograd_output(conv, slab, begin, end)) finite = false;
  });
  return finite;
}

}  // namespace

Tensor winograd_dense(const Tensor& weight) {
  TORCH_CHECK(weight.numel() < (int64_t{1} << 31), "winograd: weight has 2^31 elements or more");
  const bool usable = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  return usable ? weight : weight.contiguous();
}

std::array<int64_t, 3> winograd_steps(const Tensor& weight) {
  const int64_t channels = weight.size(1), contiguous = weight.is_contiguous();
  return {9 * channels, contiguous ? 9 : 1, contiguous ? 1 : channels};
}

bool winograd_usable() { return std::strcmp(kernels().name, "DEFAULT") != 0; }

Tensor winograd_pack(const Tensor& weight, const OptionalTensor& scale, bool turned) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == at::kFloat,
      "winograd_pack: weight must be (K, C, 3, 3) and float32");
  const OpGuard guard;
  const Tensor w = winograd_dense(weight);
  const auto [output_step, channel_step, tap_step] = winograd_steps(w);
  WinogradWeight conv;
  conv.weight = w.const_data_ptr<float>();
  conv.outputs = w.size(0);
  conv.channels = w.size(1);
  conv.output_step = output_step;
  conv.channel_step = channel_step;
  conv.tap_step = tap_step;
  if (turned) {
    conv.weight += 8 * conv.tap_step;
    conv.tap_step = -conv.tap_step;
    std::swap(conv.outputs, conv.channels);
    std::swap(conv.output_step, conv.channel_step);
  }
  conv.panels = div_up(conv.outputs, kWinogradPanel);
  const Tensor scales = scale.has_value() ? scale->to(at::kFloat).contiguous() : Tensor();
  TORCH_CHECK(!scales.defined() || scales.numel() == conv.outputs, "winograd_pack: scale must have an element an output");
  if (scales.defined()) conv.scale = scales.const_data_ptr<float>();
  Tensor packed = at::empty({kWinogradElements, conv.panels, conv.channels, kWinogradPanel}, w.options());
  if (packed.numel() == 0) return packed;
  conv.packed = packed.mutable_data_ptr<float>();
  at::parallel_for(0, conv.channels, 1, [&](int64_t begin, int64_t end) {
    kernels().winograd_pack(conv, begin, end);
  });
  return packed;
}

std::tuple<Tensor, bool> winograd_conv(
    const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t out_channels,
    const OptionalTensor& residual, bool relu) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "winograd_conv: x must be 4-D and float32");
  TORCH_CHECK(
      packed.dim() == 4 && packed.size(2) == x.size(1) && packed.size(1) == div_up(out_channels, kWinogradPanel),
      "winograd_conv: packed is not of ", x.size(1), " -> ", out_channels, " channels");
  const OpGuard guard;
  const auto format = at::MemoryFormat::ChannelsLast;
  const Tensor input = x.contiguous(format);
  Tensor y = at::empty({x.size(0), out_channels, x.size(2), x.size(3)}, x.options().memory_format(format));
  TORCH_CHECK(
      !residual.has_value() || (residual->sizes() == y.sizes() && residual->scalar_type() == at::kFloat),
      "winograd_conv: residual must be float32 and of the output's shape");
  const Tensor added = residual.has_value() ? residual->contiguous(format) : Tensor();
  if (y.numel() == 0) return {y, true};
  const Tensor zeros = at::zeros({round_up(x.size(1), kLine)}, x.options());
  const Tensor shift = bias.has_value() ? *bias : at::zeros({out_channels}, x.options());

  WinogradConv conv;
  conv.x = input.const_data_ptr<float>();
  conv.zeros = zeros.const_data_ptr<float>();
  conv.weight = packed.const_data_ptr<float>();
  conv.bias = shift.const_data_ptr<float>();
  conv.residual = added.defined() ? added.const_data_ptr<float>() : nullptr;
  conv.y = y.mutable_data_ptr<float>();
  conv.relu = relu;
  conv.channels = x.size(1);
  conv.outputs = out_channels;
  conv.height = x.size(2);
  conv.width = x.size(3);
  conv.tile_rows = div_up(conv.height, kWinogradOut);
  conv.tile_columns = div_up(conv.width, kWinogradOut);
  conv.panels = packed.size(1);
  conv.summed = conv.channels < kNarrow ? kNarrowSum : kSum;

  const int64_t tiles = x.size(0) * conv.tile_rows * conv.tile_columns, threads = at::get_num_threads();
  const int64_t most = static_cast<int64_t>(packed.nbytes()) <= kWeightsKept ? kSmallSlab : kLargeSlab;
  if (tiles < most * threads) return {y, run_together(conv, tiles)};
  const int64_t slabs = round_up(div_up(tiles, most), threads);
  return {y, run_by_slab(conv, tiles, round_up(div_up(tiles, slabs), kWinogradRows))};
}

}  // namespace resnet_fast::cpu
