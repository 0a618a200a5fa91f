// Slab after slab of tiles, which all threads share: first by tiles, then by blocks of the sums. A value's sum has a fixed
// order whatever the threads. Slabs stay in the caches, and are no smaller than what is worth a pass over the sums.
#include "winograd_gradient.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "guards.h"
#include "kernels.h"
#include "winograd.h"
#include "winograd_points.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSlab = 4 << 20;  // bytes
constexpr int64_t kFewestTiles = 128;
constexpr int64_t kLine = 16;  // floats: see winograd.cpp

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

void check(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  const char* name = "winograd_weight_gradient";
  for (const Tensor& t : {dy, x, weight}) {
    TORCH_CHECK(t.dim() == 4 && t.scalar_type() == at::kFloat, name, ": all tensors must be 4-D and float32");
  }
  TORCH_CHECK(
      dy.sizes() == at::IntArrayRef({x.size(0), weight.size(0), x.size(2), x.size(3)}) &&
          weight.sizes() == at::IntArrayRef({dy.size(1), x.size(1), 3, 3}),
      name, ": dy, x and weight are not of one 3x3 convolution with stride and padding 1");
}

// All slabs' products, summed up.
void sum_up(const WinogradGradient& conv, int64_t tiles) {
  const Kernels& k = kernels();
  const int64_t blocks = div_up(conv.channels, kWinogradBlock);
  const int64_t in = blocks * kWinogradBlock, out = conv.panels * kWinogradPanel;  // floats of a tile, each of the 24
  const int64_t tile_bytes = kWinogradGradientElements * (in + out) * sizeof(float);
  const int64_t step = div_up(tiles, div_up(tiles, std::max(kFewestTiles, kSlab / tile_bytes)));
  const int64_t in_step = step * in + kLine, out_step = step * out + kLine;
  const Tensor buffer = at::empty({kWinogradGradientElements, in_step + out_step}, at::kFloat);
  float* transformed = buffer.mutable_data_ptr<float>();
  float* products = transformed + kWinogradGradientElements * in_step;
  for (int64_t first = 0; first < tiles; first += step) {
    const WinogradSlab slab = {first, std::min(step, tiles - first), transformed, in_step, products, out_step};
    at::parallel_for(0, slab.tiles, 1, [&](int64_t begin, int64_t end) {
      k.winograd_gradient_input(conv, slab, begin, end);
    });
    at::parallel_for(0, kWinogradGradientElements * conv.panels * blocks, 1, [&](int64_t begin, int64_t end) {
      k.winograd_gradient_product(conv, slab, begin, end);
    });
  }
}

}  // namespace

std::tuple<Tensor, bool> winograd_weight_gradient(const Tensor& dy, const Tensor& x, const Tensor& weight) {
  check(dy, x, weight);
  const OpGuard guard;
  Tensor dweight = at::empty_like(winograd_dense(weight));
  if (dy.numel() == 0 || x.numel() == 0) return {dweight.zero_(), true};
  const Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor gradient = dy.contiguous(at::MemoryFormat::ChannelsLast);
  const auto [output_step, channel_step, tap_step] = winograd_steps(dweight);
  const Tensor zeros = at::zeros({x.size(1) + kLine}, x.options());

  WinogradGradient conv;
  conv.x = input.const_data_ptr<float>();
  conv.dy = gradient.const_data_ptr<float>();
  conv.zeros = zeros.const_data_ptr<float>();
  conv.dweight = dweight.mutable_data_ptr<float>();
  conv.output_step = output_step;
  conv.channel_step = channel_step;
  conv.tap_step = tap_step;
  conv.channels = x.size(1);
  conv.outputs = dy.size(1);
  conv.height = x.size(2);
  conv.width = x.size(3);
  conv.tile_rows = div_up(conv.height, kWinogradOut);
  conv.tile_columns = div_up(conv.width, kWinogradWideOut);
  conv.panels = div_up(conv.outputs, kWinogradPanel);
  const Tensor sums = at::empty({kWinogradGradientElements, conv.panels, conv.channels, kWinogradPanel}, x.options());
  conv.sums = sums.mutable_data_ptr<float>();

  sum_up(conv, x.size(0) * conv.tile_rows * conv.tile_columns);
  std::atomic<bool> finite{true};
  at::parallel_for(0, conv.channels, 1, [&](int64_t begin, int64_t end) {
    if (!kernels().winograd_gradient_output(conv, begin, end)) finite = false;
  });
  return {dweight, finite};
}

}  // namespace resnet_fast::cpu
