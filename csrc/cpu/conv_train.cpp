// Threads take chunks of pixels: each is packed, with the batch norm and ReLU before it, into memory that stays in the
// second cache level, and multiplied from there; statistics are summed up while the output is in registers. Chunks and
// the groups whose partial weight gradients are added up depend on shapes only, and their order is fixed, so no bit
// depends on the number of threads.
#include "conv_train.h"

#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty_like.h>

#include <atomic>

#include "amx/amx.h"
#include "amx/train.h"
#include "bn_train.h"
#include "conv_geometry.h"
#include "guards.h"
#include "moments.h"
#include "shared_items.h"

namespace resnet_fast::cpu {

#ifdef WITH_AMX

namespace {

using amx::train::kBlock;
using amx::kBlockValues;

// Of 2 MB of second-level cache:
constexpr int64_t kChunkBytes = 1024 * 1024;   // a chunk's packed pixels, used for every tap and output block
constexpr int64_t kColumnBytes = 1024 * 1024;  // a 1x1's packed pixels and output
constexpr int64_t kGradientBytes = 1024 * 1024;  // a chunk's packed gradients and pixels
constexpr int64_t kWeightBytes = 384 * 1024;   // of the output blocks that are multiplied with a tile in turn
constexpr size_t kStreamBytes = 8 << 20;  // of an output that is written past the caches
constexpr int64_t kPartialBytes = 32 << 20;    // of the groups' partial weight gradients
constexpr int64_t kMostGroups = 8;

struct Shape {
  int64_t images, channels, out_channels, kernel_rows, kernel_columns;
  AxisGeometry down, right;

  // A 1x1's pixels are in one column: where images and rows end is nothing to it.
  void flatten() {
    const auto plain = [](const AxisGeometry& g) { return g.kernel == 1 && g.stride == 1 && g.padding == 0; };
    if (!plain(down) || !plain(right)) return;
    down.size = down.out_size = images * down.size * right.size;
    right.size = right.out_size = images = 1;
  }
  Grid grid(const Axis& rows, const Axis& columns) const { return {images, rows, columns, kernel_columns}; }
  Grid forward() const { return grid(forward_axis(down), forward_axis(right)); }
  Grid gradient() const { return grid(gradient_axis(down), gradient_axis(right)); }
  int64_t taps() const { return kernel_rows * kernel_columns; }
  int64_t pixels() const { return images * down.out_size * right.out_size; }
};

Shape shape_of(
    const Tensor& x, const Tensor& conv_weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  TORCH_CHECK(amx::usable(), "this CPU, or its system, has no AMX with bfloat16");
  TORCH_CHECK(
      x.dim() == 4 && x.numel() > 0 && x.is_contiguous(at::MemoryFormat::ChannelsLast),
      "x: expected a 4-D tensor in channels_last that is not empty, got ", x.sizes(), ", strides ", x.strides());
  TORCH_CHECK_TYPE(
      x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "x: expected float32 or bfloat16, got ",
      x.scalar_type());
  TORCH_CHECK(
      conv_weight.dim() == 4 && conv_weight.size(1) == x.size(1) && conv_weight.scalar_type() == x.scalar_type() &&
          x.size(1) % kBlock == 0 && conv_weight.size(0) % kBlock == 0,
      "conv_weight: expected ", x.scalar_type(), ", (K, ", x.size(1), ", R, S) with both in multiples of ", kBlock,
      ", got ", conv_weight.scalar_type(), ", ", conv_weight.sizes());
  const auto axis = [&](int64_t at) {
    AxisGeometry g{x.size(2 + at), 0, conv_weight.size(2 + at), stride[at], padding[at], dilation[at]};
    g.out_size = (g.size + 2 * g.padding - g.dilation * (g.kernel - 1) - 1) / g.stride + 1;
    TORCH_CHECK(g.out_size > 0, "x: smaller than the kernel, ", x.sizes());
    return g;
  };
  Shape s{x.size(0), x.size(1), conv_weight.size(0), conv_weight.size(2), conv_weight.size(3), axis(0), axis(1)};
  TORCH_CHECK(
      x.size(0) * std::max(s.down.size * s.right.size, s.down.out_size * s.right.out_size) < INT32_MAX,
      "x: too many pixels, ", x.sizes());
  s.flatten();
  return s;
}

// What a chunk keeps in the second cache level: its packed pixels; where they serve one product only, the output too.
std::vector<Chunk> conv_chunks(const Grid& grid, int64_t channels, int64_t out_channels, int planes) {
  const int64_t packed = channels * 2 * planes, written = out_channels * (planes == 1 ? 2 : 4);
  if (grid.is_column()) return grid.chunks(packed + written, kColumnBytes, false);
  return grid.chunks(packed, kChunkBytes, true);
}

int planes_of(const Tensor& x) { return x.scalar_type() == at::kFloat ? 3 : 1; }

// 64-byte aligned scratch for every thread.
class Scratch {
 public:
  explicit Scratch(int64_t values, int64_t threads = at::get_num_threads())
      : stride_((values * 2 + 127) / 64 * 64), buffer_(at::empty({threads * stride_ + 64}, at::kByte)) {}

  uint16_t* of(int64_t thread) const {
    const auto address = reinterpret_cast<uintptr_t>(buffer_.mutable_data_ptr()) + thread * stride_;
    return reinterpret_cast<uint16_t*>((address + 63) / 64 * 64);
  }
  uint16_t* mine() const { return of(at::get_thread_num()); }

 private:
  int64_t stride_;
  Tensor buffer_;
};

class Largest {
 public:
  void see(uint32_t bits) {
    uint32_t known = bits_.load(std::memory_order_relaxed);
    while (bits > known && !bits_.compare_exchange_weak(known, bits, std::memory_order_relaxed)) {
    }
  }
  bool finite() const { return bits_.load() < amx::train::kNotFinite; }

 private:
  std::atomic<uint32_t> bits_{0};
};

template <typename F>
void for_tile_items(int64_t items, const F& f) {
  share_items(items, [&](const auto& take) {
    amx::configure_tiles();
    take(f);
    amx::release_tiles();
  });
}

// Into how many slices an item's output blocks are cut so that all threads have work; it changes no bit.
int64_t slices(int64_t items, int64_t blocks) {
  const int64_t threads = at::get_num_threads();
  int64_t n = 1;
  while (n < blocks && items * n < 4 * threads && items * n % threads != 0) ++n;
  return n;
}

amx::train::Pixels pixels_of(const Tensor& x, const PendingNorm& pending, const std::vector<int32_t>& table) {
  return {x.const_data_ptr(), x.size(1), table.data(), static_cast<int64_t>(table.size()),
          static_cast<const float*>(pending.params.mean), static_cast<const float*>(pending.params.scale),
          static_cast<const float*>(pending.params.bias)};
}

// conv_weight, packed for all classes of a grid.
class PackedWeight {
 public:
  PackedWeight(const Tensor& conv_weight, const Grid& grid, int planes, bool transposed, Largest& largest)
      : blocks_((transposed ? conv_weight.size(0) : conv_weight.size(1)) / kBlock),
        outputs_((transposed ? conv_weight.size(1) : conv_weight.size(0)) / kBlock),
        planes_(planes),
        taps_(grid.classes()),
        buffer_(conv_weight.numel() * planes, 1) {
    const Tensor dense = conv_weight.contiguous(at::MemoryFormat::ChannelsLast);
    int64_t offset = 0;
    for (int64_t c = 0; c < grid.classes(); ++c) {
      taps_[c] = grid.kernel_taps(c);
      offset_.push_back(offset);
      offset += outputs_ * values(c);
    }
    at::parallel_for(0, outputs_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = 0; c < grid.classes(); ++c) {
        const amx::train::WeightArgs args{
            dense.const_data_ptr(), dense.size(0), dense.size(1), dense.size(2) * dense.size(3),
            taps_[c].data(), static_cast<int64_t>(taps_[c].size()), transposed};
        for (int64_t i = begin; i < end; ++i) largest.see(amx::train::pack_weight(planes, args, i, block(c, i)));
      }
    });
  }

  uint16_t* block(int64_t number, int64_t output) const {
    return buffer_.of(0) + offset_[number] + output * values(number);
  }
  int64_t blocks() const { return blocks_; }
  int64_t outputs() const { return outputs_; }
  // Of one output block
  int64_t values(int64_t number) const {
    return blocks_ * static_cast<int64_t>(taps_[number].size()) * planes_ * kBlockValues;
  }

 private:

  int64_t blocks_, outputs_;
  int planes_;
  std::vector<std::vector<int32_t>> taps_;
  std::vector<int64_t> offset_;
  Scratch buffer_;
};

// y = the grid's sums over act(x), + add.
void multiply(
    const Grid& grid, const Tensor& x, const PendingNorm& pending, const PackedWeight& weight, const Tensor& y,
    const Tensor* add, ChunkMoments* moments, const std::vector<Chunk>& chunks, Largest& largest) {
  const int planes = planes_of(x);
  const int64_t item = static_cast<int64_t>(y.element_size()), out_channels = y.size(1);
  int64_t most = 0;
  for (const Chunk& chunk : chunks) most = std::max(most, grid.source_positions(chunk));
  // An odd number of vectors, so that the blocks of a pixel do not fall on one set of the first cache level.
  const auto block_values = [&](int64_t positions) { return (positions * planes | 1) * kBlock; };
  const Scratch scratch(block_values(most) * weight.blocks());
  const int64_t parts = slices(static_cast<int64_t>(chunks.size()), weight.outputs());
  for_tile_items(static_cast<int64_t>(chunks.size()) * parts, [&](int64_t i) {
    const Chunk& chunk = chunks[i / parts];
    const int64_t begin = i % parts * weight.outputs() / parts, end = (i % parts + 1) * weight.outputs() / parts;
    // One plane of whole tiles of pixels with nothing pending is read where it is: no zeros meet what is not finite.
    const bool direct = planes == 1 && grid.is_column() && pending.params.mean == nullptr && chunk.rows % 16 == 0;
    const uint16_t* packed = scratch.mine();
    int64_t positions = 0;
    if (direct) {
      packed = static_cast<const uint16_t*>(x.const_data_ptr()) + chunk.row * x.size(1);
    } else {
      const std::vector<int32_t> source = grid.source(chunk);
      positions = static_cast<int64_t>(source.size());
      largest.see(
          amx::train::pack_pixels(planes, pixels_of(x, pending, source), scratch.mine(), block_values(positions)));
    }
    for (int64_t number = 0; number < grid.classes(); ++number) {
      const Grid::Tiles tiles = grid.tiles(chunk, number);
      const int64_t row = direct ? x.size(1) : kBlock, block = direct ? kBlock : block_values(positions);
      std::vector<int64_t> offsets;
      for (int64_t b = 0; b < weight.blocks(); ++b) {
        for (const int32_t tap : grid.taps(chunk, number)) offsets.push_back(b * block + tap * row);
      }
      const int64_t step = std::max<int64_t>(1, kWeightBytes / std::max<int64_t>(1, weight.values(number) * 2));
      for (int64_t output = begin; output < end; output += step) {
        amx::train::ConvArgs args;
        args.outputs = std::min(step, end - output);
        std::vector<amx::train::Moments> sums(moments == nullptr ? 0 : args.outputs);
        args.x = packed;
        args.x_row = row;
        args.x_plane = positions * kBlock;
        args.offsets = offsets.data();
        args.steps = static_cast<int64_t>(offsets.size());
        args.weight = weight.block(number, output);
        args.tile = tiles.first.data();
        args.pixel = tiles.pixel.data();
        args.tiles = static_cast<int64_t>(tiles.first.size());
        const int64_t offset = output * kBlock * item;
        args.y = static_cast<char*>(y.mutable_data_ptr()) + offset;
        args.add = add == nullptr ? nullptr : static_cast<const char*>(add->const_data_ptr()) + offset;
        args.y_channels = out_channels;
        args.stream = y.nbytes() >= kStreamBytes;
        args.moments = moments == nullptr ? nullptr : sums.data();
        amx::train::conv(planes, args);
        for (size_t n = 0; n < sums.size(); ++n) {
          const int64_t channel = (output + static_cast<int64_t>(n)) * kBlock;
          moments->put(i / parts, channel, kBlock, sums[n].rows, sums[n].shift, sums[n].sums, sums[n].squares);
        }
      }
    }
  });
}

// The gradient of conv_weight in its dtype; dy is that of the output.
Tensor weight_gradient(
    const Shape& shape, const Tensor& dy, const Tensor& x, const PendingNorm& pending, const Tensor& conv_weight,
    Largest& largest) {
  const Grid grid = shape.forward();
  const int planes = planes_of(x);
  const int64_t K = shape.out_channels, C = shape.channels, taps = shape.taps(), size = K * C * taps;
  const bool compact = taps == 1;
  // The more positions a chunk has, the less often every sum is read and written; what is packed in turn needs no room.
  const int64_t k_step = std::min<int64_t>(K, (compact ? 1024 : 256) / (planes == 1 ? 1 : 2));
  const int64_t c_step = std::min<int64_t>(C, (compact ? 256 : 64) / (planes == 1 ? 1 : 2));
  const std::vector<Chunk> chunks =
      grid.chunks((k_step + c_step * (compact ? 1 : 2)) * 2 * planes, kGradientBytes, false);
  const auto n_chunks = static_cast<int64_t>(chunks.size());
  // Groups cost a pass over the gradient each; without them threads share the output channels, and all pack x.
  const int64_t groups = K * taps * 2 > shape.pixels()
      ? 1
      : std::min(n_chunks, std::clamp<int64_t>(kPartialBytes / (size * 4), 1, kMostGroups));
  const Tensor partial = at::empty({groups, size}, at::kFloat);

  int64_t most = 0, most_x = 0;
  const auto whole = [](int64_t positions) { return (positions + 31) / 32 * 32; };
  for (const Chunk& chunk : chunks) {
    most = std::max(most, whole(grid.positions(chunk)));
    most_x = std::max(most_x, whole(grid.source_positions(chunk)) + 64);
  }
  const Scratch gradients(most * k_step * planes), pixels(most_x * c_step * 2 * planes);
  const int64_t parts = slices(groups, K / kBlock);

  for_tile_items(groups * parts, [&](int64_t i) {
    const int64_t group = i / parts, part = i % parts;
    const int64_t k_begin = part * (K / kBlock) / parts * kBlock, k_end = (part + 1) * (K / kBlock) / parts * kBlock;
    float* dweight = partial.mutable_data_ptr<float>() + group * size;
    const int64_t first = group * n_chunks / groups, last = (group + 1) * n_chunks / groups;
    for (int64_t number = first; number < last; ++number) {
      const Chunk& chunk = chunks[number];
      std::vector<int32_t> source = grid.source(chunk), output = grid.output(chunk, 0);
      const std::vector<int32_t> offsets = grid.taps(chunk, 0);
      output.resize(whole(static_cast<int64_t>(output.size())), -1);
      const auto positions = static_cast<int64_t>(output.size());
      const int64_t reach = positions + *std::max_element(offsets.begin(), offsets.end());
      source.resize(whole(reach), -1);
      const auto x_positions = static_cast<int64_t>(source.size());
      amx::train::Pixels dy_pixels{dy.const_data_ptr(), K, output.data(), positions, nullptr, nullptr, nullptr};
      for (int64_t k = k_begin; k < k_end; k += k_step) {
        const int64_t k_stop = std::min(k + k_step, k_end);
        uint16_t* packed_dy = gradients.mine();
        uint16_t* packed_x = pixels.mine();
        largest.see(amx::train::pack_transposed(planes, dy_pixels, k, k_stop, packed_dy));
        for (int64_t c = 0; c < C; c += c_step) {
          const int64_t c_stop = std::min(c + c_step, C);
          largest.see(amx::train::pack_pairs(planes, pixels_of(x, pending, source), c, c_stop, compact, packed_x));
          amx::train::WgradArgs args;
          args.positions = positions;
          args.x_positions = compact ? x_positions / 2 : x_positions;
          args.taps = offsets.data();
          args.n_taps = taps;
          args.compact = compact;
          args.add = number > first;
          for (int64_t from = c; from < c_stop; from += kBlock) {
            args.x = packed_x + (from - c) * 2 * args.x_positions * planes;
            for (int64_t to = k; to < k_stop; to += kBlock) {
              args.dy = packed_dy + (to - k) * positions * planes;
              args.dweight = dweight + to * taps * C + from * taps * kBlock;
              amx::train::wgrad_block(planes, args);
            }
          }
        }
      }
    }
  });

  const Tensor out = at::empty(
      {K, C, shape.kernel_rows, shape.kernel_columns}, conv_weight.options(), at::MemoryFormat::ChannelsLast);
  const int64_t item = static_cast<int64_t>(out.element_size()), block = kBlock * taps * C;
  at::parallel_for(0, K / kBlock, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* from = partial.const_data_ptr<float>() + i * block;
      void* to = static_cast<char*>(out.mutable_data_ptr()) + i * block * item;
      amx::train::merge_gradients(planes, {from, groups, size, C, taps, to});
    }
  });
  return out;
}

Tensor activated(const Tensor& x, const NormTensors& norm, double eps) {
  return norm.empty() ? x : bn_apply(x, norm, eps, std::nullopt, NormTensors(), 0, true);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> conv_train(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool statistics) {
  const OpGuard guard;
  Shape shape = shape_of(x, conv_weight, stride, padding, dilation);
  const int64_t height = (x.size(2) + 2 * padding[0] - dilation[0] * (shape.kernel_rows - 1) - 1) / stride[0] + 1;
  const int64_t width = (x.size(3) + 2 * padding[1] - dilation[1] * (shape.kernel_columns - 1) - 1) / stride[1] + 1;
  const Grid grid = shape.forward();
  const int planes = planes_of(x);
  Largest largest;
  const PackedWeight weight(conv_weight, grid, planes, false, largest);
  const Tensor conv_out =
      at::empty({x.size(0), shape.out_channels, height, width}, x.options(), at::MemoryFormat::ChannelsLast);
  const std::vector<Chunk> chunks = conv_chunks(grid, shape.channels, shape.out_channels, planes);
  ChunkMoments moments(static_cast<int64_t>(chunks.size()), statistics ? shape.out_channels : 0);
  multiply(
      grid, x, PendingNorm(shape.channels, at::kFloat, x_norm, x_eps), weight, conv_out, nullptr, statistics ? &moments : nullptr,
      chunks, largest);
  const Tensor none = at::empty({0}, at::kFloat);
  if (largest.finite()) {
    if (!statistics) return {conv_out, none, none};
    auto [mean, var] = moments.merged();
    return {conv_out, mean, var};
  }
  const Tensor stock = at::convolution(
      activated(x, x_norm, x_eps), conv_weight, std::nullopt, stride, padding, dilation, false, {0, 0}, 1);
  if (!statistics) return {stock, none, none};
  auto [mean, var] = bn_statistics(stock);
  return {stock, mean, var};
}

std::tuple<Tensor, Tensor> conv_train_backward(
    const Tensor& dconv_out, const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, const OptionalTensor& add,
    std::array<bool, 2> output_mask) {
  const OpGuard guard;
  const auto [wants_dx, wants_dweight] = output_mask;
  const Shape shape = shape_of(x, conv_weight, stride, padding, dilation);
  const Tensor dy = dconv_out.to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  Tensor added;
  if (add.has_value() && add->defined()) {
    TORCH_CHECK(add->sizes() == x.sizes(), "add: expected ", x.sizes(), ", got ", add->sizes());
    added = add->to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
  }
  const int planes = planes_of(x);
  Largest largest;
  Tensor dx = at::empty({0}, x.options()), dweight = at::empty({0}, conv_weight.options());
  if (wants_dx) {
    const Grid grid = shape.gradient();
    const PackedWeight weight(conv_weight, grid, planes, true, largest);
    dx = at::empty_like(x);
    const std::vector<Chunk> chunks = conv_chunks(grid, shape.out_channels, shape.channels, planes);
    multiply(
        grid, dy, PendingNorm(shape.out_channels, at::kFloat, NormTensors(), 0), weight, dx, added.defined() ? &added : nullptr, nullptr,
        chunks, largest);
  }
  if (wants_dweight) {
    dweight = weight_gradient(shape, dy, x, PendingNorm(shape.channels, at::kFloat, x_norm, x_eps), conv_weight, largest);
  }
  if (largest.finite()) return {dx, dweight};
  const auto stock = at::convolution_backward(
      dy, activated(x, x_norm, x_eps), conv_weight, std::nullopt, stride, padding, dilation, false, {0, 0}, 1,
      {wants_dx, wants_dweight, false});
  if (wants_dx) dx = added.defined() ? std::get<0>(stock).add_(added) : std::get<0>(stock);
  if (wants_dweight) dweight = std::get<1>(stock);
  return {dx, dweight};
}

#else

std::tuple<Tensor, Tensor, Tensor> conv_train(
    const Tensor&, const NormTensors&, double, const Tensor&, at::IntArrayRef, at::IntArrayRef, at::IntArrayRef, bool) {
  TORCH_CHECK(false, "built without AMX");
}

std::tuple<Tensor, Tensor> conv_train_backward(
    const Tensor&, const Tensor&, const NormTensors&, double, const Tensor&, at::IntArrayRef, at::IntArrayRef,
    at::IntArrayRef, const OptionalTensor&, std::array<bool, 2>) {
  TORCH_CHECK(false, "built without AMX");
}

#endif

}  // namespace resnet_fast::cpu
