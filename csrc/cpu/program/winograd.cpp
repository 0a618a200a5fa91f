// A step of a Program: a 3x3 convolution by Winograd's products.
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>

#include "../activation_pool.h"
#include "../integers.h"
#include "steps.h"

namespace resnet_fast::cpu {

namespace {

// An item is a slab of strips by some output blocks; every item transforms its strips for itself.
class WinogradStep : public Step {
 public:
  WinogradStep(
      int64_t threads, int64_t sharing, const std::string& name, const Buffer& x, const Buffer& y, const Buffer* residual,
      const Packed& packed, bool relu)
      : Step(name, std::min(x.group, y.group), 0),
        x_(x),
        y_(y),
        residual_(residual),
        packed_(packed),
        output_blocks_(div_up(y.channels, amx::kVector)) {
    args_ = {};
    args_.x_pixel = x.pixel;
    args_.x_row = x.row;
    args_.x_block = x.block;
    args_.blocks = div_up(x.channels, amx::kVector);
    args_.weight = static_cast<const uint16_t*>(packed.weight.const_data_ptr());
    args_.scale = packed.scale.defined() ? packed.scale.const_data_ptr<float>() : nullptr;
    args_.bias = packed.bias.const_data_ptr<float>();
    args_.y_pixel = y.pixel;
    args_.y_row = y.row;
    args_.y_block = y.block;
    args_.relu = relu;
    TORCH_CHECK(x.halo > 0 && x.place == Place::kStorage, "winograd reads a buffer with a halo");
    place();
    cut(sharing);
    args_.tiles = strip_step_ * in_strip_ | 1;  // odd: a tile's points do not fall into one set of a cache
    const PoolGuard pool;
    const int64_t values = args_.blocks * amx::kWinogradPoints * args_.tiles * amx::kVector;
    values_ = at::zeros({threads, values}, at::kBFloat16);
  }

  void run(const Run& run, int64_t item) const override {
    amx::WinogradArgs args = args_;
    args.x = pixels(x_, run, group);
    args.y = pixels(y_, run, group);
    args.residual = residual_ == nullptr ? nullptr : pixels(*residual_, run, group);
    const int64_t first = item / parts_ * strip_step_, begin = item % parts_ * block_step_;
    const int64_t strips = std::min(strip_step_, static_cast<int64_t>(strips_.size()) - first);
    auto* values = static_cast<uint16_t*>(values_.mutable_data_ptr()) + run.thread * values_.stride(0);
    amx::winograd_transform(args, strips_.data() + first, strips, values);
    const int64_t tiles = strips * in_strip_;
    const auto infinite = std::make_unique<bool[]>(tiles);
    amx::winograd_multiply(args, values, tiles_.data() + first * in_strip_, tiles, begin,
                           std::min(begin + block_step_, output_blocks_), infinite.get(), run.scratch);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      if (infinite[tile]) tell(run, (first + tile / in_strip_) % group);
    }
  }

 private:
  // An image of a group need not be one of the call.
  void tell(const Run& run, int64_t image_of_group) const {
    const int64_t image = run.unit * group + image_of_group;
    if (image < run.images) run.infinite[image] = true;
  }

  void place() {
    in_strip_ = div_up(y_.width, kSide);
    for (int64_t row = 0; row < y_.height; row += kSide) {
      for (int64_t image = 0; image < group; ++image) {
        strips_.push_back({(row - 1) * x_.row - x_.pixel + image * x_.vector, in_strip_});
        for (int64_t column = 0; column < y_.width; column += kSide) {
          const int64_t y = row * y_.row + column * y_.pixel + image * y_.vector;
          tiles_.push_back({static_cast<int32_t>(y), static_cast<int32_t>(std::min(kSide, y_.height - row)),
                            static_cast<int32_t>(std::min(kSide, y_.width - column))});
        }
      }
    }
  }

  // As even as can be for so many threads, with transformed tiles that stay in the second cache level.
  void cut(int64_t threads) {
    const int64_t strips = static_cast<int64_t>(strips_.size());
    double best = std::numeric_limits<double>::infinity();
    for (int64_t slabs = 1; slabs <= strips; ++slabs) {
      const int64_t step = div_up(strips, slabs), tiles = step * in_strip_;
      if (slabs < strips && tiles * amx::kWinogradPoints * args_.blocks * kVectorBytes > kSlabBytes) continue;
      for (int64_t parts = 1; parts <= std::min(threads, output_blocks_); ++parts) {
        const int64_t blocks = div_up(output_blocks_, parts), all = div_up(strips, step) * div_up(output_blocks_, blocks);
        const double item = tiles * args_.blocks * (kTransform + blocks * kProducts) + args_.blocks * blocks * kWeights;
        const double cost = div_up(all, threads) * item;
        if (cost < best) {
          best = cost;
          strip_step_ = step;
          block_step_ = blocks;
          parts_ = div_up(output_blocks_, blocks);
          items = all;
        }
      }
    }
  }

  static constexpr int64_t kSide = 2, kVectorBytes = 2 * amx::kVector;
  static constexpr int64_t kSlabBytes = 1 << 18;
  // Cycles, for a tile and a block: transforming it, multiplying it by an output block's weights; waiting for those.
  static constexpr double kTransform = 130, kProducts = 520, kWeights = 1500;

  const Buffer &x_, &y_;
  const Buffer* residual_;
  Packed packed_;
  int64_t output_blocks_, in_strip_ = 0;  // in_strip_: tiles
  std::vector<amx::WinogradStrip> strips_;
  std::vector<amx::WinogradTile> tiles_;
  amx::WinogradArgs args_;
  int64_t strip_step_ = 0, block_step_ = 0, parts_ = 0;
  at::Tensor values_;
};

}  // namespace

std::unique_ptr<Step> make_winograd(
    int64_t threads, int64_t sharing, const std::string& name, const Buffer& x, const Buffer& y, const Buffer* residual,
    const Packed& packed, bool relu) {
  return std::make_unique<WinogradStep>(threads, sharing, name, x, y, residual, packed, relu);
}

}  // namespace resnet_fast::cpu
