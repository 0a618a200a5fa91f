// The tiles are cut into slabs, each transformed, multiplied and transformed back by one thread while it is in the
// core's cache. Where there are too few tiles for that, all threads share one slab, pass by pass, and its products by
// weights, so that each weight is read once; and where it is not packed yet, each part as it is needed, which memory
// never sees. A value's sum has a fixed order whatever the slabs, so no bit depends on the number of threads.
#include "winograd.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "guards.h"
#include "conv_kernels.h"
#include "moments.h"
#include "scratch.h"
#include "shared_items.h"
#include "winograd_points.h"
#include "winograd_shapes.h"

namespace resnet_fast::cpu {

namespace {

// Most tiles of a slab. Where the weights stay in the second-level cache, so should the slab beside them; else it is
// larger, so that the weights are read less often.
constexpr int64_t kSmallSlab = 24, kLargeSlab = 72;
constexpr int64_t kWeightsKept = 768 * 1024;  // bytes
// Channels that are summed up in one go: long sums set the error (NOTES.md), and PyTorch's is least in narrow layers.
constexpr int64_t kSum = 32, kNarrowSum = 16, kNarrow = 128;
// Tiles that are so few that each has statistics of its own, so that threads can share them.
constexpr int64_t kFewTiles = 64;

bool run_by_slab(const WinogradConv& conv, int64_t tiles, int64_t step) {
  const ConvKernels& k = conv_kernels();
  const WinogradScratch scratch(conv, kWinogradElements, step, at::get_num_threads());
  std::atomic<bool> finite{true};
  share_pieces(tiles, step, [&](int64_t begin, int64_t end) {
    const auto slab = scratch.slab(at::get_thread_num(), begin, end - begin);
    k.winograd_input(conv, slab, 0, slab.tiles);
    k.winograd_product(conv, slab, 0, kWinogradElements * conv.panels);
    if (!k.winograd_output(conv, slab, 0, slab.tiles)) finite = false;
  });
  return finite;
}

// All tiles as one slab that all threads share; `multiply` makes its products of its transformed input.
template <typename F>
bool run_together(const WinogradConv& conv, int64_t tiles, const F& multiply) {
  const ConvKernels& k = conv_kernels();
  const WinogradScratch scratch(conv, kWinogradElements, tiles, 1);
  const auto slab = scratch.slab(0, 0, tiles);
  std::atomic<bool> finite{true};
  at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) { k.winograd_input(conv, slab, begin, end); });
  multiply(slab);
  at::parallel_for(0, div_up(tiles, conv.chunk), 1, [&](int64_t begin, int64_t end) {
    if (!k.winograd_output(conv, slab, begin * conv.chunk, std::min(end * conv.chunk, tiles))) finite = false;
  });
  return finite;
}

// Products by a weight that is packed part by part.
void multiply_packing(const WinogradConv& conv, const WinogradWeight& weight, const WinogradSlab& slab) {
  const ConvKernels& k = conv_kernels();
  const Scratch parts(kWinogradElements * kWinogradBlock * kWinogradPanel, at::kFloat);
  at::parallel_for(0, conv.panels, 1, [&](int64_t begin, int64_t end) {
    auto* packed = static_cast<float*>(parts.mine());
    for (int64_t panel = begin; panel < end; ++panel) {
      for (int64_t channel = 0; channel < conv.channels; channel += kWinogradBlock) {
        WinogradWeight part = weight;
        const int64_t output = panel * kWinogradPanel;
        part.weight += output * weight.output_step + channel * weight.channel_step;
        part.scale += weight.scale == nullptr ? 0 : output;
        part.packed = packed;
        part.outputs = std::min(kWinogradPanel, weight.outputs - output);
        part.channels = std::min(kWinogradBlock, weight.channels - channel);
        part.panels = 1;
        k.winograd_pack(part, 0, part.channels);
        WinogradConv product = conv;
        product.weight = packed;
        product.channels = part.channels;
        product.panels = 1;
        product.continues = channel > 0;
        WinogradSlab of = slab;
        of.transformed += channel * slab.tiles;
        of.products += output * slab.tiles;
        k.winograd_product(product, of, 0, kWinogradElements);
      }
    }
  });
}

// The convolution's tensors, kept while it runs.
struct Operands {
  Tensor x, y, bias, residual, zeros;
  WinogradConv conv;
  int64_t tiles;
};

Operands operands(
    const Tensor& x, int64_t outputs, const OptionalTensor& bias, const OptionalTensor& residual, bool relu) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "winograd_conv: x must be 4-D and float32");
  const auto format = at::MemoryFormat::ChannelsLast;
  Operands out;
  out.x = x.contiguous(format);
  out.y = at::empty({x.size(0), outputs, x.size(2), x.size(3)}, x.options().memory_format(format));
  TORCH_CHECK(
      !residual.has_value() || (residual->sizes() == out.y.sizes() && residual->scalar_type() == at::kFloat),
      "winograd_conv: residual must be float32 and of the output's shape");
  if (residual.has_value()) out.residual = residual->contiguous(format);
  out.zeros = winograd_zeros(x);
  out.bias = bias.has_value() ? *bias : at::zeros({outputs}, x.options());

  WinogradConv& conv = out.conv;
  static_cast<WinogradShape&>(conv) = winograd_shape(out.x, out.zeros, outputs, kWinogradOut);
  conv.bias = out.bias.const_data_ptr<float>();
  conv.residual = out.residual.defined() ? out.residual.const_data_ptr<float>() : nullptr;
  conv.y = out.y.mutable_data_ptr<float>();
  conv.relu = relu;
  conv.summed = conv.channels < kNarrow ? kNarrowSum : kSum;
  out.tiles = x.size(0) * conv.tile_rows * conv.tile_columns;
  return out;
}

int64_t packed_bytes(const WinogradConv& conv) {
  return kWinogradElements * conv.panels * conv.channels * kWinogradPanel * static_cast<int64_t>(sizeof(float));
}

int64_t largest_slab(const WinogradConv& conv) { return packed_bytes(conv) <= kWeightsKept ? kSmallSlab : kLargeSlab; }

// Whether there are too few tiles for a slab a thread.
bool is_small(const Operands& of) { return of.tiles < largest_slab(of.conv) * at::get_num_threads(); }

// By a packed weight.
bool run(const Operands& of) {
  const WinogradConv& conv = of.conv;
  if (is_small(of)) {
    return run_together(conv, of.tiles, [&](const WinogradSlab& slab) {
      at::parallel_for(0, kWinogradElements * conv.panels, 1, [&](int64_t begin, int64_t end) {
        conv_kernels().winograd_product(conv, slab, begin, end);
      });
    });
  }
  const int64_t slabs = round_up(div_up(of.tiles, largest_slab(conv)), at::get_num_threads());
  return run_by_slab(conv, of.tiles, round_up(div_up(of.tiles, slabs), kWinogradRows));
}

// A dense weight, straight or turned.
WinogradWeight describe(const Tensor& weight, const Tensor& scale, bool turned) {
  WinogradWeight out{winograd_steps(weight)};
  out.weight = weight.const_data_ptr<float>();
  out.outputs = weight.size(0);
  out.channels = weight.size(1);
  if (turned) {
    out.weight += 8 * out.tap_step;
    out.tap_step = -out.tap_step;
    std::swap(out.outputs, out.channels);
    std::swap(out.output_step, out.channel_step);
  }
  out.panels = div_up(out.outputs, kWinogradPanel);
  TORCH_CHECK(!scale.defined() || scale.numel() == out.outputs, "winograd: scale must have an element an output");
  if (scale.defined()) out.scale = scale.const_data_ptr<float>();
  return out;
}

Tensor pack(WinogradWeight weight) {
  Tensor packed = at::empty({kWinogradElements, weight.panels, weight.channels, kWinogradPanel}, at::kFloat);
  if (packed.numel() == 0) return packed;
  weight.packed = packed.mutable_data_ptr<float>();
  at::parallel_for(0, weight.channels, 1, [&](int64_t begin, int64_t end) {
    conv_kernels().winograd_pack(weight, begin, end);
  });
  return packed;
}

// By a weight that is not packed.
bool run(Operands& of, const WinogradWeight& weight) {
  TORCH_CHECK(of.conv.channels == weight.channels, "winograd_conv: x and weight are not of one convolution");
  if (of.y.numel() == 0) return true;
  if (is_small(of) && packed_bytes(of.conv) > kWeightsKept && of.conv.panels >= at::get_num_threads()) {
    return run_together(of.conv, of.tiles, [&](const WinogradSlab& slab) { multiply_packing(of.conv, weight, slab); });
  }
  const Tensor packed = pack(weight);
  of.conv.weight = packed.const_data_ptr<float>();
  return run(of);
}

// Outputs of each chunk of tiles that are in the image.
std::vector<int64_t> pixels_in_chunks(const WinogradConv& conv, int64_t tiles) {
  std::vector<int64_t> out(div_up(tiles, conv.chunk));
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile / conv.tile_columns % conv.tile_rows * kWinogradOut;
    const int64_t column = tile % conv.tile_columns * kWinogradOut;
    out[tile / conv.chunk] += std::min(kWinogradOut, conv.height - row) * std::min(kWinogradOut, conv.width - column);
  }
  return out;
}

}  // namespace

Tensor winograd_pack(const Tensor& weight) {
  const OpGuard guard;
  const Tensor w = winograd_dense(weight);
  return pack(describe(w, {}, /*turned=*/false));
}

std::tuple<Tensor, bool> winograd_conv_packed(
    const Tensor& x, const Tensor& packed, const OptionalTensor& bias, int64_t out_channels,
    const OptionalTensor& residual, bool relu) {
  const OpGuard guard;
  Operands of = operands(x, out_channels, bias, residual, relu);
  TORCH_CHECK(
      packed.dim() == 4 && packed.size(2) == of.conv.channels && packed.size(1) == of.conv.panels,
      "winograd_conv: packed is not of ", x.size(1), " -> ", out_channels, " channels");
  of.conv.weight = packed.const_data_ptr<float>();
  return {of.y, of.y.numel() == 0 || run(of)};
}

std::tuple<Tensor, bool> winograd_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, bool relu, bool turned) {
  const OpGuard guard;
  const Tensor w = winograd_dense(weight), scales = scale.has_value() ? scale->contiguous() : Tensor();
  const WinogradWeight described = describe(w, scales, turned);
  Operands of = operands(x, described.outputs, bias, residual, relu);
  const bool finite = run(of, described);
  return {of.y, finite};
}

std::tuple<Tensor, Tensor, Tensor, bool> winograd_conv_train(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& weight, bool statistics) {
  const OpGuard guard;
  const Tensor w = winograd_dense(weight), none = at::empty({0}, at::kFloat);
  const WinogradWeight described = describe(w, {}, /*turned=*/false);
  Operands of = operands(x, described.outputs, std::nullopt, std::nullopt, /*relu=*/false);
  const PendingNorm pending(x.size(1), at::kFloat, x_norm, x_eps);
  of.conv.norm = pending.params;
  if (!statistics) return {of.y, none, none, run(of, described)};

  // Slabs consist of whole chunks: both are multiples of kWinogradRows, or chunks of one tile.
  of.conv.chunk = of.tiles < kFewTiles ? 1 : kWinogradRows;
  const std::vector<int64_t> pixels = pixels_in_chunks(of.conv, of.tiles);
  const auto chunks = static_cast<int64_t>(pixels.size());
  const Tensor sums = at::empty({chunks, 3, of.conv.outputs}, at::kFloat);
  of.conv.moments = sums.mutable_data_ptr<float>();
  if (!run(of, described)) return {of.y, none, none, false};
  ChunkMoments moments(chunks, of.conv.outputs);
  for (int64_t i = 0; i < chunks; ++i) {
    const float* shift = of.conv.moments + i * 3 * of.conv.outputs;
    moments.put(i, 0, of.conv.outputs, pixels[i], shift, shift + of.conv.outputs, shift + 2 * of.conv.outputs);
  }
  auto [mean, var] = moments.merged();
  return {of.y, mean, var, true};
}

}  // namespace resnet_fast::cpu
