// The weight's gradient of a 3x3 by Winograd in dot products. Slab after slab of tiles, which all threads share: first by
// tiles, then by blocks of the sums. A value's sum has a fixed order whatever the threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>

#include "../activation_pool.h"
#include "../amx/amx.h"
#include "../integers.h"
#include "winograd_conv.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSlabBytes = 4 << 20;
constexpr int64_t kFewestPairs = 64;  // that are worth a pass over the sums

uint16_t* values(const at::Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

}  // namespace

std::tuple<at::Tensor, bool> dots_winograd_weight_gradient(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight) {
  const int64_t outputs = dy.size(1), channels = x.size(1);
  TORCH_CHECK(is_rows(dy) && is_rows(x) && x.numel() > 0 && weight.scalar_type() == at::kBFloat16,
              "winograd_dots_weight_gradient: all must be bfloat16, dy and x in channels_last and not empty");
  TORCH_CHECK(dy.sizes() == at::IntArrayRef({x.size(0), outputs, x.size(2), x.size(3)}) &&
                  weight.sizes() == at::IntArrayRef({outputs, channels, 3, 3}),
              "winograd_dots_weight_gradient: dy, x and weight are not of one 3x3 with stride and padding 1");
  TORCH_CHECK(channels % amx::kVector == 0 && outputs % amx::kVector == 0,
              "winograd_dots_weight_gradient: only multiples of ", amx::kVector, " channels");
  const bool dense = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  const at::Tensor dweight = at::empty_like(dense ? weight : weight.contiguous());
  const PoolGuard pool;

  amx::WinogradGradientArgs args{};
  args.channels = channels, args.outputs = outputs, args.height = x.size(2), args.width = x.size(3);
  args.tiles = x.size(0) * div_up(args.height, 2) * div_up(args.width, 2);
  const int64_t pair_values = 2 * amx::kWinogradPoints * (channels + outputs), all = div_up(args.tiles, 2);
  const int64_t most = std::max<int64_t>(kFewestPairs, kSlabBytes / (2 * pair_values));
  args.pairs = div_up(all, div_up(all, most));
  const at::Tensor zeros = at::zeros({std::max(channels, outputs)}, at::kBFloat16);
  const at::Tensor slab = at::empty({args.pairs * pair_values}, at::kBFloat16);
  const at::Tensor sums = at::empty({amx::kWinogradPoints * outputs * channels}, at::kFloat);
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

}  // namespace resnet_fast::cpu
