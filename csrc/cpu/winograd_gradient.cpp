// Slab after slab of tiles, which all threads share: first by tiles, then by blocks of the sums. A value's sum has a fixed
// order whatever the threads. Slabs stay in the caches, and are no smaller than what is worth a pass over the sums.
#include "winograd_gradient.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>

#include "guards.h"
#include "conv_kernels.h"
#include "shared_items.h"
#include "winograd_points.h"
#include "winograd_shapes.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSlab = 4 << 20;  // bytes
constexpr int64_t kFewestTiles = 128;

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
  const ConvKernels& k = conv_kernels();
  const int64_t blocks = div_up(conv.channels, kWinogradBlock);
  const int64_t tile_floats = kWinogradGradientElements * (blocks * kWinogradBlock + conv.panels * kWinogradPanel);
  const int64_t most = std::max(kFewestTiles, kSlab / (tile_floats * static_cast<int64_t>(sizeof(float))));
  const int64_t step = div_up(tiles, div_up(tiles, most));
  const WinogradScratch scratch(conv, kWinogradGradientElements, step, 1);
  for (int64_t first = 0; first < tiles; first += step) {
    const auto slab = scratch.slab(0, first, std::min(step, tiles - first));
    share_pieces(slab.tiles, piece_of(slab.tiles, 1), [&](int64_t begin, int64_t end) {
      k.winograd_gradient_input(conv, slab, begin, end);
    });
    const int64_t products = kWinogradGradientElements * conv.panels * blocks;
    share_pieces(products, piece_of(products, 1), [&](int64_t begin, int64_t end) {
      k.winograd_gradient_product(conv, slab, begin, end);
    });
  }
}

}  // namespace

std::tuple<Tensor, bool> winograd_weight_gradient(
    const Tensor& dy, const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& weight) {
  check(dy, x, weight);
  const OpGuard guard;
  Tensor dweight = at::empty_like(winograd_dense(weight));
  if (dy.numel() == 0 || x.numel() == 0) return {dweight.zero_(), true};
  const Tensor input = x.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor gradient = dy.contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor zeros = winograd_zeros(x);
  WinogradGradient conv{winograd_shape(input, zeros, dy.size(1), kWinogradWideOut), winograd_steps(dweight)};
  const PendingNorm pending(x.size(1), at::kFloat, x_norm, x_eps);
  conv.norm = pending.params;
  conv.dy = gradient.const_data_ptr<float>();
  conv.dweight = dweight.mutable_data_ptr<float>();
  const Tensor sums = at::empty({kWinogradGradientElements, conv.panels, conv.channels, kWinogradPanel}, x.options());
  conv.sums = sums.mutable_data_ptr<float>();

  sum_up(conv, x.size(0) * conv.tile_rows * conv.tile_columns);
  std::atomic<bool> finite{true};
  at::parallel_for(0, conv.channels, 1, [&](int64_t begin, int64_t end) {
    if (!conv_kernels().winograd_gradient_output(conv, begin, end)) finite = false;
  });
  return {dweight, finite};
}

}  // namespace resnet_fast::cpu
