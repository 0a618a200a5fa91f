#include "block.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
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

// A block's convolutions, the downsample's last.
struct Block {
  std::vector<Conv> convs;
  bool downsample;

  size_t last() const { return convs.size() - 1 - (downsample ? 1 : 0); }
  const Conv& final() const { return convs[last()]; }
};

// The rest of what a program is laid out for.
struct Layout {
  int planes;
  int64_t capacity, threads;
  bool all;  // images of a call are no more than the capacity
  bool residual;
  bool tiles;
};

// Lays blocks out as a Program. Large images go through them one by one, each thread with its own; from where they are
// small, 16 of them lie side by side and the threads share each convolution.
//
// bfloat16 tensors of large images are read and written where they are, by convolutions whose tiles can; others, and what
// is between blocks, pass through buffers.
class Builder {
 public:
  Builder(Program& program, const Layout& layout, const std::vector<Block>& blocks)
      : program_(program), layout_(layout), blocks_(blocks), by_image_(layout.capacity >= 2 * layout.threads) {
    for (const Block& block : blocks_) {
      for (const Conv& conv : block.convs) {
        // Where images grow, a thread would come back to a buffer of its own after other images were in it.
        by_image_ = by_image_ && conv.out_height() <= conv.height && conv.out_width() <= conv.width;
        int64_t& halo = halos_[{conv.height, conv.width}];
        halo = std::max({halo, conv.top, conv.left});
      }
    }
  }

  void build() {
    pack();
    int64_t x = kTensor, layer = 0;
    bool narrow = false;
    for (const Block& block : blocks_) {
      x = add(block, layer, x, &block == &blocks_.back());
      layer += static_cast<int64_t>(block.convs.size());
      narrow = narrow || std::any_of(block.convs.begin(), block.convs.end(), [](const Conv& c) { return c.narrow(); });
    }
    if (x != kTensor) {
      enter({x});
      program_.write(x);
    } else if (narrow) {
      // Between narrow groups stand weights of zero, and Inf times zero is NaN.
      program_.add(make_check());
    }
  }

 private:
  static constexpr int64_t kTensor = -1, kNone = -1;  // in place of a buffer: the call's x or y; nothing

  // What a buffer holds: those of the same and of one shape are one. A block's output takes the place of its shortcut.
  enum Role : int64_t { kValue, kOtherValue, kSkip, kConv };

  // A block of x, a buffer or the call's tensor, whose first layer's number is `layer`. Returns where its output is.
  int64_t add(const Block& block, int64_t layer, int64_t x, bool is_last) {
    const Conv &first = block.convs.front(), &final = block.final(), &branch = block.convs.back();
    const size_t last = block.last();
    const int64_t channels = first.in_channels, height = first.height, width = first.width;
    const int64_t out_channels = final.out_channels, out_height = final.out_height(), out_width = final.out_width();
    const bool one_plane = layout_.planes == 1, from_tensor = x == kTensor;
    const bool dense = first.pointwise() && first.stride == 1 && (channels <= kDirectChannels || !layout_.tiles);
    const bool y_direct =
        is_last && one_plane && !indirect(out_height, out_width) && (from_tensor || block.downsample);
    const bool x_direct = one_plane && !indirect(height, width) && dense && (y_direct || block.downsample);

    const int64_t x_tensor = from_tensor && one_plane ? program_.tensor(Place::kX, channels, height, width) : kTensor;
    const Role other = role_ == kValue ? kOtherValue : kValue;
    int64_t y = kTensor;
    if (y_direct) {
      y = program_.tensor(Place::kY, out_channels, out_height, out_width);
    } else if (block.downsample) {
      y = buffer(other, out_channels, out_height, out_width);
    }
    const bool skips = from_tensor && block.downsample && branch.pointwise() && branch.stride > 1;
    const int64_t branch_layer = layer + static_cast<int64_t>(block.convs.size()) - 1;
    if (skips) {  // before x is read: a thread's own buffer is lost when another section begins
      Conv dense = branch;
      dense.height = branch.out_height(), dense.width = branch.out_width(), dense.stride = 1;
      const int64_t pixels = read(kSkip, channels, dense.height, dense.width, Place::kX, branch.stride);
      add(branch_layer, dense, pixels, y, kNone, false);
    }
    const bool branch_direct = !block.downsample || skips || branch.pointwise();
    if (from_tensor) x = x_direct && branch_direct ? x_tensor : read(role_, channels, height, width, Place::kX, 1);
    int64_t shortcut = y;
    if (block.downsample) {
      if (!skips) add(branch_layer, branch, x, y, kNone, false);
      role_ = other;
    } else if (y_direct) {
      shortcut = layout_.residual ? program_.tensor(Place::kResidual, out_channels, out_height, out_width) : x_tensor;
    } else {
      y = shortcut = layout_.residual ? read(other, out_channels, out_height, out_width, Place::kResidual, 1) : x;
    }

    int64_t value = x;
    for (size_t i = 0; i < last; ++i, ++layer) {
      const Conv& conv = block.convs[i];
      const auto role = static_cast<Role>(kConv + i);
      const int64_t out = buffer(role, conv.out_channels, conv.out_height(), conv.out_width());
      add(layer, conv, value, out, kNone, true);
      value = out;
    }
    add(layer, final, value, y, shortcut, true);
    return y_direct ? kTensor : y;
  }

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
    for (const Block& block : blocks_) {
      for (const Conv& conv : block.convs) {
        packed_.push_back(room_for(conv));
        if (!packed_.back().by_item) before.push_back(packed_.back());
      }
    }
    program_.section(false);
    if (!before.empty()) program_.add(make_pack(layout_.planes, layout_.capacity, before));
  }

  Packed room_for(const Conv& conv) const {
    const auto layer = static_cast<int64_t>(packed_.size());
    if (conv.by_winograd()) return empty_winograd(layer, conv.channels, conv.out_channels);
    const int64_t steps = conv.blocks() * conv.rows * conv.columns, threads = by_item(conv) ? layout_.threads : 0;
    return empty_packed(layer, layout_.planes, conv.out_channels, steps, threads);
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

  int64_t buffer(Role role, int64_t channels, int64_t height, int64_t width) {
    const auto [found, is_new] = buffers_.insert({{role, channels, height, width}, 0});
    if (!is_new) return found->second;
    const bool is_small = small(height, width);
    const int64_t group = is_small ? group_of_small() : 1;
    const bool own = by_image_ && !is_small;
    found->second = program_.buffer(channels, height, width, halos_[{height, width}], group, own, amx::kVector);
    return found->second;
  }

  int64_t read(Role role, int64_t channels, int64_t height, int64_t width, Place from, int64_t stride) {
    const int64_t number = buffer(role, channels, height, width);
    enter({number});
    program_.add(make_read(layout_.planes, program_.at(number), from, stride));
    return number;
  }

  void add(int64_t layer, const Conv& conv, int64_t x, int64_t y, int64_t residual, bool relu) {
    enter({x, y});
    const int64_t outputs_per_group = conv.narrow() ? 1 : conv.out_channels / conv.groups / amx::kVector;
    const int64_t sharing = in_section_by_image_ ? 1 : layout_.threads;
    const Buffer* added = residual == kNone ? nullptr : &program_.at(residual);
    if (conv.by_winograd()) {
      program_.add(make_winograd(
          layout_.threads, sharing, "conv", program_.at(x), program_.at(y), added, packed_[layer], relu));
      return;
    }
    program_.add_or_join(make_conv(
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
  const std::vector<Block>& blocks_;
  bool by_image_;
  bool in_section_by_image_ = false;
  Role role_ = kValue;  // of the last block's output
  std::map<std::pair<int64_t, int64_t>, int64_t> halos_;
  std::map<std::array<int64_t, 4>, int64_t> buffers_;
  std::vector<Packed> packed_;
};

bool fits(const ResidualBlock& block, at::ScalarType dtype) {
  if (block.layers.size() < (block.downsample ? 3 : 2)) return false;  // the last convolution writes over the shortcut
  return std::all_of(block.layers.begin(), block.layers.end(), [dtype](const BlockLayer& layer) {
    const auto weight = layer.conv_weight.scalar_type();
    return (weight == at::kFloat || weight == dtype) && layer.stride[0] == layer.stride[1];
  });
}

// Of an input (C, H, W).
Block convolutions(const ResidualBlock& block, std::array<int64_t, 3> x, bool tiles) {
  Block convs{{}, block.downsample};
  int64_t channels = x[0], height = x[1], width = x[2];
  for (size_t i = 0; i < block.layers.size(); ++i) {
    const BlockLayer& layer = block.layers[i];
    if (block.downsample && i + 1 == block.layers.size()) channels = x[0], height = x[1], width = x[2];
    const auto weight = layer.conv_weight.sizes();
    convs.convs.push_back({channels, height, width, weight[0], weight[1], weight[2], weight[3], layer.stride[0],
                           layer.padding[0], layer.padding[1], layer.dilation[0], layer.dilation[1], layer.groups,
                           layer.winograd && !tiles});
    const Conv& conv = convs.convs.back();
    channels = weight[0], height = conv.out_height(), width = conv.out_width();
  }
  return convs;
}

}  // namespace

std::optional<at::Tensor> amx_residual_blocks(const at::Tensor& x, at::ArrayRef<ResidualBlock> given, Unit unit) {
  const auto dtype = x.scalar_type();
  if (!computes(unit, dtype) || !channels_last(x) || x.numel() == 0 || x.size(2) * x.size(3) == 1) return std::nullopt;
  std::vector<Block> blocks;
  std::array<int64_t, 3> shape = {x.size(1), x.size(2), x.size(3)};
  for (const ResidualBlock& block : given) {
    if (!fits(block, dtype)) return std::nullopt;
    blocks.push_back(convolutions(block, shape, unit == Unit::kTiles));
    const std::vector<Conv>& convs = blocks.back().convs;
    if (!std::all_of(convs.begin(), convs.end(), [](const Conv& conv) { return conv.fits(); })) return std::nullopt;
    const Conv& final = blocks.back().final();
    shape = {final.out_channels, final.out_height(), final.out_width()};
  }

  const auto options = x.options().memory_format(at::MemoryFormat::ChannelsLast);
  const at::Tensor y = at::empty({x.size(0), shape[0], shape[1], shape[2]}, options);
  Live live;
  const at::Tensor& residual = given.front().residual;
  if (residual.defined()) live.residual = residual.contiguous(at::MemoryFormat::ChannelsLast);
  const int planes = dtype == at::kFloat ? 3 : 1;
  std::vector<int64_t> key = {residual.defined()};
  for (size_t i = 0; i < blocks.size(); ++i) {
    for (const BlockLayer& layer : given[i].layers) live.layers.push_back(live_layer(layer, layer.conv_weight));
    key.insert(key.end(), {static_cast<int64_t>(blocks[i].convs.size()), blocks[i].downsample});
    for (const Conv& c : blocks[i].convs) {
      key.insert(key.end(), {c.in_channels, c.height, c.width, c.out_channels, c.channels, c.rows, c.columns, c.stride,
                             c.top, c.left, c.down, c.right, c.groups, c.by_winograd()});
    }
  }
  const auto build = [&](Program& program, int64_t capacity, int64_t threads, bool all) {
    Builder(program, {planes, capacity, threads, all, residual.defined(), unit == Unit::kTiles}, blocks).build();
  };
  run_planned(key, planes, unit, build, x, y, live);
  return live.finite ? std::make_optional(y) : std::nullopt;
}

}  // namespace resnet_fast::cpu
