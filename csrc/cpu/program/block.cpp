#include "block.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>

#include "../activation_pool.h"
#include "plans.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSmallPixels = 256;     // an image of no more is small: 16 images fill tiles better than 16 pixels
constexpr int64_t kSmallPixelsOfDots = 128;  // or alone: of no more, groups of 8 pixels are not full enough
constexpr int64_t kDirectChannels = 512;  // more, and 16 pixels of a tensor fall on too few sets of the first cache
constexpr int64_t kSecondCacheBytes = 3 << 18;  // of 2 MiB, for pixels
constexpr int64_t kMostValues = 1 << 30;  // of an image

bool channels_last(const at::Tensor& t) {
  return t.suggest_memory_format() == at::MemoryFormat::ChannelsLast && t.is_contiguous(at::MemoryFormat::ChannelsLast);
}

// A convolution with the image it reads.
struct Conv {
  int64_t in_channels, height, width;
  int64_t out_channels, channels, rows, columns;  // channels: of a group
  int64_t stride, top, left, down, right, groups;
  bool winograd;  // wherever it can be

  int64_t out_height() const { return (height + 2 * top - down * (rows - 1) - 1) / stride + 1; }
  int64_t out_width() const { return (width + 2 * left - right * (columns - 1) - 1) / stride + 1; }
  bool pointwise() const { return rows == 1 && columns == 1 && top == 0 && left == 0 && groups == 1; }
  int64_t blocks() const { return narrow() ? 1 : channels / amx::kVector; }
  bool narrow() const { return channels < amx::kVector; }

  bool by_winograd() const {
    const bool usual = rows == 3 && columns == 3 && stride == 1 && top == 1 && left == 1 && down == 1 && right == 1;
    return winograd && usual && groups == 1;
  }

  bool fits() const {
    const int64_t outputs = out_channels / groups;
    const bool whole = channels % amx::kVector == 0 && outputs % amx::kVector == 0;
    const bool inside = channels > 0 && channels == outputs && amx::kVector % channels == 0;
    const int64_t inputs = in_channels * height * width, results = out_channels * out_height() * out_width();
    const bool sizes = inputs < kMostValues && results < kMostValues;
    return (whole || inside) && in_channels % amx::kVector == 0 && out_channels % amx::kVector == 0 && sizes;
  }

  std::vector<std::vector<int64_t>> taps() const {
    std::vector<std::vector<int64_t>> taps;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t s = 0; s < columns; ++s) taps.push_back({r * down - top, s * right - left});
    }
    return taps;
  }
};

// The rest of what a program is laid out for.
struct Layout {
  int planes;
  int64_t capacity, threads;
  bool all;  // images of a call are no more than the capacity
  bool downsample, residual;
  bool tiles;
};

// Lays a block out as a Program. Large images go through the block one by one, each thread with its own; from where they
// are small, 16 of them lie side by side and the threads share each convolution.
//
// bfloat16 tensors of large images are read and written where they are, by convolutions whose tiles can; others pass
// through buffers.
class Builder {
 public:
  Builder(Program& program, const Layout& layout, const std::vector<Conv>& convs)
      : program_(program), layout_(layout), convs_(convs), by_image_(layout.capacity >= 2 * layout.threads) {
    for (const Conv& conv : convs_) {
      // Where images grow, a thread would come back to a buffer of its own after other images were in it.
      by_image_ = by_image_ && conv.out_height() <= conv.height && conv.out_width() <= conv.width;
      int64_t& halo = halos_[{conv.height, conv.width}];
      halo = std::max({halo, conv.top, conv.left});
    }
  }

  void build() {
    pack();
    const size_t last = convs_.size() - 1 - (layout_.downsample ? 1 : 0);
    const Conv &first = convs_.front(), &final = convs_[last], &branch = convs_.back();
    const int64_t channels = first.in_channels, height = first.height, width = first.width;
    const int64_t out_channels = final.out_channels, out_height = final.out_height(), out_width = final.out_width();
    const bool one_plane = layout_.planes == 1;
    const bool dense = first.pointwise() && first.stride == 1 && (channels <= kDirectChannels || !layout_.tiles);
    const bool x_direct = one_plane && !indirect(height, width) && dense;
    const bool y_direct = one_plane && !indirect(out_height, out_width);

    const int64_t x_tensor = one_plane ? program_.tensor(Place::kX, channels, height, width) : -1;
    int64_t y = y_direct ? program_.tensor(Place::kY, out_channels, out_height, out_width) : -1;
    const bool skips = layout_.downsample && branch.pointwise() && branch.stride > 1;
    if (layout_.downsample && !y_direct) y = buffer(out_channels, out_height, out_width);
    if (skips) {  // before x is read: a thread's own buffer is lost when another section begins
      Conv dense = branch;
      dense.height = branch.out_height(), dense.width = branch.out_width(), dense.stride = 1;
      add(convs_.size() - 1, dense, read(channels, dense.height, dense.width, Place::kX, branch.stride), y, -1, false);
    }
    const bool branch_direct = !layout_.downsample || skips || branch.pointwise();
    const int64_t x = x_direct && branch_direct ? x_tensor : read(channels, height, width, Place::kX, 1);
    int64_t shortcut = y;
    if (layout_.downsample) {
      if (!skips) add(convs_.size() - 1, branch, x, y, -1, false);
    } else if (y_direct) {
      shortcut = layout_.residual ? program_.tensor(Place::kResidual, out_channels, out_height, out_width) : x_tensor;
    } else {
      y = shortcut = layout_.residual ? read(out_channels, out_height, out_width, Place::kResidual, 1) : x;
    }

    int64_t value = x;
    for (size_t i = 0; i < last; ++i) {
      const Conv& conv = convs_[i];
      const int64_t out = buffer(conv.out_channels, conv.out_height(), conv.out_width());
      add(i, conv, value, out, -1, true);
      value = out;
    }
    add(last, final, value, y, shortcut, true);
    if (!y_direct) {
      enter({y});
      program_.write(y);
    } else if (std::any_of(convs_.begin(), convs_.end(), [](const Conv& conv) { return conv.narrow(); })) {
      // Between narrow groups stand weights of zero, and Inf times zero is NaN.
      program_.add(make_check());
    }
  }

 private:
  static bool small(int64_t height, int64_t width) { return height * width <= kSmallPixels; }

  // Whether images pass through buffers; tensors have them one by one.
  bool indirect(int64_t height, int64_t width) const {
    return height * width <= (layout_.tiles ? kSmallPixels : kSmallPixelsOfDots);
  }

  // Images side by side: of tiles they are to be the rows, of dot products they leave the same taps out.
  int64_t group_of_small() const {
    if (!layout_.tiles) return std::min(layout_.capacity, kGroup);
    return layout_.capacity >= kGroup ? kGroup : 1;
  }

  void pack() {
    std::vector<Packed> before;
    for (const Conv& conv : convs_) {
      if (conv.by_winograd()) {
        packed_.push_back(empty_winograd(static_cast<int64_t>(packed_.size()), conv.channels, conv.out_channels));
        before.push_back(packed_.back());
        continue;
      }
      const int64_t steps = conv.blocks() * conv.rows * conv.columns, layer = static_cast<int64_t>(packed_.size());
      const int64_t threads = by_item(conv) ? layout_.threads : 0;
      packed_.push_back(empty_packed(layer, layout_.planes, conv.out_channels, steps, threads));
      if (!by_item(conv)) before.push_back(packed_.back());
    }
    program_.section(false);
    if (!before.empty()) program_.add(make_pack(layout_.planes, layout_.capacity, before));
  }

  // Whether an output block's weights are used in one item: all images are in one unit, and their pixels stay in the
  // second cache level while the weights pass.
  bool by_item(const Conv& conv) const {
    const bool grouped = small(conv.out_height(), conv.out_width()) && small(conv.height, conv.width);
    const int64_t images = layout_.capacity;
    const bool one_unit = layout_.all && (images == 1 || (images == group_of_small() && grouped));
    const int64_t bytes = 2 * layout_.planes * images * conv.in_channels * conv.height * conv.width;
    return one_unit && bytes <= kSecondCacheBytes && conv.out_channels / amx::kVector >= layout_.threads;
  }

  int64_t buffer(int64_t channels, int64_t height, int64_t width) {
    const bool is_small = small(height, width);
    const int64_t group = is_small ? group_of_small() : 1;
    const bool own = by_image_ && !is_small;
    return program_.buffer(channels, height, width, halos_[{height, width}], group, own, amx::kVector);
  }

  int64_t read(int64_t channels, int64_t height, int64_t width, Place from, int64_t stride) {
    const int64_t number = buffer(channels, height, width);
    enter({number});
    program_.add(make_read(layout_.planes, program_.at(number), from, stride));
    return number;
  }

  void add(size_t layer, const Conv& conv, int64_t x, int64_t y, int64_t residual, bool relu) {
    enter({x, y});
    const int64_t outputs_per_group = conv.narrow() ? 1 : conv.out_channels / conv.groups / amx::kVector;
    const int64_t sharing = in_section_by_image_ ? 1 : layout_.threads;
    const Buffer* added = residual < 0 ? nullptr : &program_.at(residual);
    if (conv.by_winograd()) {
      program_.add(make_winograd(
          layout_.threads, sharing, "conv", program_.at(x), program_.at(y), added, packed_[layer], relu));
      return;
    }
    program_.add(make_conv(
        layout_.planes, layout_.tiles, sharing, "conv", program_.at(x), program_.at(y), added, packed_[layer],
        conv.taps(), {conv.stride, conv.blocks(), outputs_per_group, relu}));
  }

  // A new section of the program where steps with these buffers cannot be in the present one.
  void enter(std::initializer_list<int64_t> buffers) {
    const bool by_image =
        std::any_of(buffers.begin(), buffers.end(), [&](int64_t number) { return program_.at(number).own; });
    if (by_image != in_section_by_image_) program_.section(by_image);
    in_section_by_image_ = by_image;
  }

  Program& program_;
  const Layout layout_;
  const std::vector<Conv>& convs_;
  bool by_image_;
  bool in_section_by_image_ = false;
  std::map<std::pair<int64_t, int64_t>, int64_t> halos_;
  std::vector<Packed> packed_;
};

bool fits(const ResidualBlock& block, Unit unit) {
  const at::Tensor& x = block.x;
  const auto dtype = x.scalar_type();
  if (!computes(unit, dtype)) return false;
  if (block.layers.size() < (block.downsample ? 3 : 2)) return false;  // the last convolution writes over the shortcut
  if (!channels_last(x) || x.numel() == 0 || x.size(2) * x.size(3) == 1) return false;
  return std::all_of(block.layers.begin(), block.layers.end(), [&](const BlockLayer& layer) {
    const auto weight = layer.conv_weight.scalar_type();
    return (weight == at::kFloat || weight == dtype) && layer.stride[0] == layer.stride[1];
  });
}

std::vector<Conv> convolutions(const ResidualBlock& block, bool tiles) {
  std::vector<Conv> convs;
  int64_t channels = block.x.size(1), height = block.x.size(2), width = block.x.size(3);
  for (size_t i = 0; i < block.layers.size(); ++i) {
    const BlockLayer& layer = block.layers[i];
    if (block.downsample && i + 1 == block.layers.size()) {
      channels = block.x.size(1), height = block.x.size(2), width = block.x.size(3);
    }
    const auto weight = layer.conv_weight.sizes();
    convs.push_back({channels, height, width, weight[0], weight[1], weight[2], weight[3], layer.stride[0],
                     layer.padding[0], layer.padding[1], layer.dilation[0], layer.dilation[1], layer.groups,
                     layer.winograd && !tiles});
    channels = weight[0], height = convs.back().out_height(), width = convs.back().out_width();
  }
  return convs;
}

}  // namespace

std::optional<at::Tensor> amx_residual_block(const ResidualBlock& block, Unit unit) {
  if (!fits(block, unit)) return std::nullopt;
  const std::vector<Conv> convs = convolutions(block, unit == Unit::kTiles);
  if (!std::all_of(convs.begin(), convs.end(), [](const Conv& conv) { return conv.fits(); })) return std::nullopt;

  const at::Tensor& x = block.x;
  const Conv& last = convs[convs.size() - 1 - (block.downsample ? 1 : 0)];
  const auto options = x.options().memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor y = at::empty({x.size(0), last.out_channels, last.out_height(), last.out_width()}, options);
  Live live;
  for (const BlockLayer& layer : block.layers) live.layers.push_back(live_layer(layer, layer.conv_weight));
  if (block.residual.defined()) live.residual = block.residual.contiguous(at::MemoryFormat::ChannelsLast);

  const int planes = x.scalar_type() == at::kFloat ? 3 : 1;
  const bool downsample = block.downsample, residual = live.residual.defined();
  std::vector<int64_t> key = {downsample, residual};
  for (const Conv& c : convs) {
    key.insert(key.end(), {c.in_channels, c.height, c.width, c.out_channels, c.channels, c.rows, c.columns, c.stride,
                           c.top, c.left, c.down, c.right, c.groups, c.by_winograd()});
  }
  const auto build = [&](Program& program, int64_t capacity, int64_t threads, bool all) {
    Builder(program, {planes, capacity, threads, all, downsample, residual, unit == Unit::kTiles}, convs).build();
  };
  run_planned(key, planes, unit, build, x, y, live);
  return live.finite ? std::make_optional(y) : std::nullopt;
}

}  // namespace resnet_fast::cpu
