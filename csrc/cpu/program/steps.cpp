#include "steps.h"

#include <algorithm>
#include <limits>

#include "../integers.h"

namespace resnet_fast::cpu {

namespace {

uint16_t* values(const at::Tensor& t) { return static_cast<uint16_t*>(t.mutable_data_ptr()); }

const at::Tensor& tensor_at(Place place, const Run& run) {
  return place == Place::kX ? run.x : place == Place::kY ? run.y : run.live->residual;
}

char* image_of(const at::Tensor& t, const Run& run) {
  return static_cast<char*>(t.mutable_data_ptr()) + (run.first + run.unit) * t.stride(0) * t.element_size();
}

class ReadStep : public Step {
 public:
  ReadStep(int planes, const Buffer& y, Place from, int64_t stride)
      : Step("read", 1, div_up(y.height, kRows)), planes_(planes), y_(y), from_(from), stride_(stride) {}

  void run(const Run& run, int64_t item) const override {
    const at::Tensor& x = tensor_at(from_, run);
    const bool float32 = x.scalar_type() == at::kFloat;
    const int64_t first = item * kRows, rows = std::min(kRows, y_.height - first);
    const int64_t row_bytes = stride_ * x.stride(2) * x.element_size();
    const char* from = image_of(x, run) + first * row_bytes;
    uint16_t* y = pixels(y_, run, 1) + first * y_.row;
    if (y_.vector != amx::kVector) {
      amx::pack_image({planes_, from, float32, y_.channels, rows, y_.width, x.stride(1), x.stride(2), x.stride(3), y,
                       y_.plane, y_.row});
      return;
    }
    for (int64_t row = 0; row < rows; ++row) {
      amx::pack_rows({planes_, float32, y_.channels, y_.width, from + row * row_bytes, stride_ * x.stride(3),
                      y + row * y_.row, y_.plane, y_.block, y_.pixel});
    }
  }

 private:
  static constexpr int64_t kRows = 32;  // of an item

  int planes_;
  const Buffer& y_;
  Place from_;
  int64_t stride_;
};

// Every stride-th pixel of every stride-th row, for a strided 1x1 convolution, which reads them in tiles without gaps.
class SkipStep : public Step {
 public:
  SkipStep(int planes, const Buffer& x, const Buffer& y, int64_t stride)
      : Step("skip", 1, 1), vectors_(planes * div_up(x.channels, amx::kVector)), stride_(stride), x_(x), y_(y) {}

  void run(const Run& run, int64_t) const override {
    const uint16_t* x = pixels(x_, run, 1);
    uint16_t* y = pixels(y_, run, 1);
    for (int64_t row = 0; row < y_.height; ++row) {
      for (int64_t column = 0; column < y_.width; ++column) {
        const uint16_t* from = x + row * stride_ * x_.row + column * stride_ * x_.pixel;
        uint16_t* to = y + row * y_.row + column * y_.pixel;
        for (int64_t vector = 0; vector < vectors_; ++vector) {
          std::copy_n(from + vector * x_.plane, amx::kVector, to + vector * y_.plane);
          // Of the next pixel. In a group lines are far apart, and each is waited for otherwise.
          __builtin_prefetch(to + y_.pixel + vector * y_.plane, /*rw=*/1);
          __builtin_prefetch(from + stride_ * x_.pixel + vector * x_.plane);
        }
      }
    }
  }

 private:
  int64_t vectors_, stride_;
  const Buffer &x_, &y_;
};

class WriteStep : public Step {
 public:
  WriteStep(int planes, const Buffer& x) : Step("write", 1, div_up(x.height, kRows)), planes_(planes), x_(x) {}

  void run(const Run& run, int64_t item) const override {
    const at::Tensor& y = run.y;
    const int64_t begin = item * kRows, end = std::min(begin + kRows, x_.height);
    const uint16_t* x = pixels(x_, run, 1);
    bool finite = true;
    for (int64_t row = begin; row < end; ++row) {
      char* to = image_of(y, run) + row * y.stride(2) * y.element_size();
      finite &= amx::unpack_rows({planes_, y.scalar_type() == at::kFloat, y.size(1), x_.width, x + row * x_.row,
                                  x_.plane, x_.block, x_.pixel, to, y.stride(3)});
    }
    if (!finite && run.live != nullptr) run.live->finite = false;
  }

 private:
  static constexpr int64_t kRows = 8;  // of an item

  int planes_;
  const Buffer& x_;
};

// An item is a block of channels, whose images' lines lie side by side in a group.
class AveragePoolStep : public Step {
 public:
  AveragePoolStep(int planes, const Buffer& x, const Buffer& y)
      : Step("avgpool", std::min(x.group, y.group), div_up(x.channels, amx::kVector)), planes_(planes), x_(x), y_(y) {}

  void run(const Run& run, int64_t block) const override {
    const uint16_t* const x = pixels(x_, run, group) + block * x_.block;
    uint16_t* const y = pixels(y_, run, group) + block * y_.block;
    for (int64_t image = 0; image < group; ++image) {
      amx::average_pool({planes_, x + image * x_.vector, y + image * y_.vector, x_.plane, x_.row, x_.pixel, y_.plane,
                         x_.height, x_.width});
    }
  }

 private:
  int planes_;
  const Buffer &x_, &y_;
};

class ConvStep : public Step {
 public:
  ConvStep(
      int planes, bool tiles, int64_t threads, const std::string& name, const Buffer& x, const Buffer& y,
      const Buffer* residual, const Packed& packed, const std::vector<std::vector<int64_t>>& taps, const ConvShape& shape)
      : Step(name, std::min(x.group, y.group), 0),
        x_(x),
        y_(y),
        residual_(residual),
        packed_(packed),
        output_blocks_(div_up(y.channels, amx::kVector)),
        a_tile_(tiles ? 1 : amx::kTileRows) {
    for (int64_t block = 0; block < shape.blocks; ++block) {
      for (const auto& tap : taps) offsets_.push_back(block * x.block + tap[0] * x.row + tap[1] * x.pixel);
    }
    args_ = {};
    args_.planes = planes;
    args_.x_row = group == 1 ? x.pixel * shape.stride : x.vector;
    args_.x_plane = x.plane;
    args_.x_block = x.block;
    args_.offsets = offsets_.data();
    args_.steps = static_cast<int64_t>(offsets_.size());
    args_.chunk = planes > 1 ? args_.steps : taps.size() == 1 ? kChunk : static_cast<int64_t>(taps.size());
    args_.blocks = shape.blocks;
    args_.outputs_per_group = shape.outputs_per_group;
    args_.weight = values(packed.weight);
    args_.scale = packed.scale.defined() ? packed.scale.const_data_ptr<float>() : nullptr;
    args_.bias = packed.bias.const_data_ptr<float>();
    args_.y_plane = y.plane;
    args_.y_block = y.block;
    args_.relu = shape.relu;
    args_.pairs = amx::kPairs;
    const bool looks = taps.size() > 1 && taps.size() <= amx::kMostBeside;
    args_.taps = looks ? static_cast<int64_t>(taps.size()) : 1;
    tiles ? place_tiles(shape.stride) : place_pixels(shape.stride, taps, looks);
    if (packed.by_item) {
      tile_step_ = div_up(rows_.size(), a_tile_);
      block_step_ = 1;
      block_cuts_ = items = output_blocks_;
    } else {
      cut(threads, shape.stride);
    }
  }

  void run(const Run& run, int64_t item) const override {
    const int64_t first_tile = item / block_cuts_ * tile_step_, first_block = item % block_cuts_ * block_step_;
    const int64_t first = first_tile * a_tile_, count = std::min(tile_step_ * a_tile_, rows_.size() - first);
    run_rows(run, first, count, first_block, std::min(first_block + block_step_, output_blocks_));
    if (next_ != nullptr) next_->run_rows(run, first, count, 0, next_->output_blocks_);
  }

  // A 1x1 of what a piece of this, a 1x1 too, has just written.
  bool join(std::unique_ptr<Step>& step) override {
    auto* const next = dynamic_cast<ConvStep*>(step.get());
    if (next == nullptr || !feeds(*next)) return false;
    step.release();
    next_.reset(next);
    name += "+" + next->name;
    const int64_t pair_bytes = 2 * amx::kTileRows * args_.planes * amx::kVector * 2 *
        (args_.blocks + output_blocks_ + next->output_blocks_);
    tile_step_ = 2 * std::max<int64_t>(1, kJoinedBytes / pair_bytes);
    block_step_ = output_blocks_;
    block_cuts_ = 1;
    items = div_up(rows_.size(), tile_step_);
    args_.pixels_first = next->args_.pixels_first = false;
    return true;
  }

 private:
  void run_rows(const Run& run, int64_t first, int64_t count, int64_t first_block, int64_t end_block) const {
    amx::ConvArgs args = args_;
    args.x = pixels(x_, run, group);
    args.y = pixels(y_, run, group);
    args.residual = residual_ == nullptr ? nullptr : pixels(*residual_, run, group);
    if (packed_.by_item) {
      const int64_t block_values = args.steps * args.planes * amx::kBlockValues;
      uint16_t* weight = values(packed_.weight) + run.thread * block_values;
      pack_block(args.planes, packed_, *run.live, first_block, weight);
      args.weight = weight - first_block * block_values;
    }
    convolve(run, args, rows_, first, count, first_block, end_block);
  }

  // Whether both are 1x1s, every tile of `next` reads what the same one here has written, and both weights stay near.
  bool feeds(const ConvStep& next) const {
    const auto is_1x1 = [](const ConvStep& step) { return step.a_tile_ == 1 && step.args_.steps == step.args_.blocks; };
    const auto weight_bytes = [](const ConvStep& step) {
      return step.args_.steps * step.output_blocks_ * step.args_.planes * amx::kBlockValues * 2;
    };
    if (!is_1x1(*this) || !is_1x1(next) || &next.x_ != &y_ || next_ != nullptr) return false;
    if (packed_.by_item || next.packed_.by_item) return false;
    if (rows_.size() != next.rows_.size() || args_.y_row != next.args_.x_row) return false;
    for (int64_t i = 0; i < rows_.size(); ++i) {
      const amx::Tile &written = rows_.tiles[i], &read = next.rows_.tiles[i];
      if (written.y != read.x || (read.rows & ~written.rows) != 0) return false;
    }
    return weight_bytes(*this) + weight_bytes(next) <= kJoinedWeightBytes;
  }

  void place_tiles(int64_t stride) {
    args_.y_row = args_.y_gap = group == 1 ? y_.pixel : y_.vector;
    if (group > 1) {  // a pixel of 16 images
      for (int64_t row = 0; row < y_.height; ++row) {
        for (int64_t column = 0; column < y_.width; ++column) {
          rows_.tiles.push_back({row * stride * x_.row + column * stride * x_.pixel, y_at(row, column), 0xffff});
        }
      }
      return;
    }
    // Without stride, tiles run on from one row of x into the next, over the halo between them, which y has as well or
    // not at all.
    const int64_t pitch = x_.row / x_.pixel, y_pitch = y_.row / y_.pixel;
    if (stride == 1 && (y_pitch == pitch || y_pitch == y_.width)) {
      if (y_pitch != pitch) args_.y_gap = 0;
      const int64_t pixels = (y_.height - 1) * pitch + y_.width;
      // Behind a tensor there is nothing to be read: its last tile begins earlier.
      const int64_t last = x_.place == Place::kStorage ? pixels : pixels - amx::kTileRows;
      for (int64_t done = 0; done < pixels; done += amx::kTileRows) {
        const int64_t first = std::min(done, last);
        amx::Tile tile{first * x_.pixel, first * y_.pixel, 0};
        for (int64_t i = amx::kTileRows - 1; i >= 0; --i) {
          const int64_t pixel = first + i, row = pixel / pitch, column = pixel % pitch;
          if (pixel < done || pixel >= pixels || column >= y_.width) continue;
          if (y_pitch != pitch) tile.y = y_at(row, column);  // at last the first row's that is written
          tile.rows |= 1u << i;
        }
        rows_.tiles.push_back(tile);
      }
      return;
    }
    for (int64_t row = 0; row < y_.height; ++row) {
      for (int64_t column = 0; column < y_.width; column += amx::kTileRows) {
        const int64_t rows = std::min(amx::kTileRows, y_.width - column);
        rows_.tiles.push_back({row * stride * x_.row + column * stride * x_.pixel, y_at(row, column), (1u << rows) - 1});
      }
    }
  }

  // Those that leave the same taps out are computed together; any part of all has its share of them.
  void place_pixels(int64_t stride, const std::vector<std::vector<int64_t>>& taps, bool looks) {
    for (int64_t row = 0; row < y_.height; ++row) {
      for (int64_t column = 0; column < y_.width; ++column) {
        uint32_t beside = 0;
        for (size_t tap = 0; looks && tap < taps.size(); ++tap) {
          const int64_t r = row * stride + taps[tap][0], c = column * stride + taps[tap][1];
          const bool inside = r >= 0 && r < x_.height && c >= 0 && c < x_.width;
          beside |= static_cast<uint32_t>(!inside) << tap;
        }
        const auto x = static_cast<int32_t>(row * stride * x_.row + column * stride * x_.pixel);
        for (int64_t i = 0; i < group; ++i) {
          const auto image = static_cast<int32_t>(i);
          rows_.pixels.push_back({x + image * static_cast<int32_t>(x_.vector),
                                  y_at(row, column) + image * static_cast<int32_t>(y_.vector), beside});
        }
      }
    }
    if (!looks) return;
    std::vector<amx::Pixel> sorted = rows_.pixels;
    std::stable_sort(sorted.begin(), sorted.end(),
                     [](const amx::Pixel& a, const amx::Pixel& b) { return a.beside < b.beside; });
    const int64_t tiles = rows_.size() / amx::kTileRows;
    auto to = rows_.pixels.begin();
    for (int64_t part = 0; part < kParts; ++part) {
      for (int64_t tile = part; tile < tiles; tile += kParts) {
        to = std::copy_n(sorted.begin() + tile * amx::kTileRows, amx::kTileRows, to);
      }
    }
    std::copy(sorted.begin() + tiles * amx::kTileRows, sorted.end(), to);
  }

  int32_t y_at(int64_t row, int64_t column) const { return static_cast<int32_t>(row * y_.row + column * y_.pixel); }

  // Items of tiles by output blocks. In an item one side passes by the other again and again, so that one must fit into
  // the second cache level; both are fetched once for an item, which is to be as little as can be, threads being kept busy.
  void cut(int64_t threads, int64_t stride) {
    const int64_t pairs = div_up(rows_.size(), 2 * a_tile_);
    // Taps of a strided convolution share no pixels with those of its neighbours.
    const double apart = args_.steps > args_.blocks ? static_cast<double>(stride * stride) : 1.0;
    const double pair_bytes = 2 * amx::kTileRows * args_.planes * amx::kVector * 2.0 * args_.blocks * apart;
    const double block_bytes = args_.steps * args_.planes * amx::kBlockValues * 2.0;
    const double product_bytes = kProductBytes * pairs * output_blocks_ * args_.steps;
    double best = std::numeric_limits<double>::infinity();
    tile_step_ = 2, block_step_ = 1, block_cuts_ = output_blocks_;  // where nothing fits
    args_.pixels_first = true;
    items = pairs * output_blocks_;
    const auto halved = [](int64_t step) { return step == 1 ? 0 : div_up(step, 2); };
    for (int64_t tile_step = pairs; tile_step > 0; tile_step = halved(tile_step)) {
      for (int64_t block_step = output_blocks_; block_step > 0; block_step = halved(block_step)) {
        const int64_t tile_parts = div_up(pairs, tile_step), block_parts = div_up(output_blocks_, block_step);
        const int64_t all = tile_parts * block_parts;
        // What stays is the smaller side: the other one, when it is the weights, is fetched ahead.
        const double held_pixels = tile_step * pair_bytes, held_weights = block_step * block_bytes;
        if (std::min(held_pixels, held_weights) > kSecondCacheBytes) continue;
        const bool pixels_first = held_weights <= held_pixels;
        const double idle = static_cast<double>(div_up(all, threads) * threads) / all;
        const double traffic = pairs * pair_bytes * block_parts + output_blocks_ * block_bytes * tile_parts;
        const double cost = (traffic + product_bytes) * idle + kItemBytes * all;
        if (cost < best) {
          best = cost;
          tile_step_ = 2 * tile_step;
          block_step_ = block_step;
          block_cuts_ = block_parts;
          args_.pixels_first = pixels_first;
          items = all;
        }
      }
    }
  }

  static constexpr int64_t kParts = 8;  // as many as a convolution's pixels are cut into, or a multiple
  static constexpr int64_t kChunk = 8;  // steps of single taps: 16 KiB, which stay in the first cache level
  static constexpr double kSecondCacheBytes = 0.75 * (1 << 20);  // of 2 MiB
  static constexpr double kProductBytes = 600;  // that arrive from beyond it while four tile products are computed
  static constexpr double kItemBytes = 4096;    // while a thread takes an item
  static constexpr int64_t kJoinedBytes = 384 << 10;  // of pixels between two that are joined
  static constexpr int64_t kJoinedWeightBytes = 1280 << 10;

  const Buffer &x_, &y_;
  const Buffer* residual_;
  Packed packed_;
  int64_t output_blocks_, a_tile_;  // a_tile_: of rows_, what a tile's rows are
  std::vector<int64_t> offsets_;
  Rows rows_;
  amx::ConvArgs args_;
  int64_t tile_step_ = 0, block_step_ = 0, block_cuts_ = 0;
  std::unique_ptr<ConvStep> next_;
};

}  // namespace

uint16_t* pixels(const Buffer& buffer, const Run& run, int64_t step_group) {
  const int64_t image = run.unit * step_group;
  if (buffer.place != Place::kStorage) return values(tensor_at(buffer.place, run)) + (run.first + image) * buffer.unit;
  const int64_t unit = buffer.own ? run.thread : image / buffer.group;
  const int64_t row = step_group == 1 && buffer.group > 1 ? image % buffer.group * buffer.vector : 0;
  return values(buffer.storage) + unit * buffer.unit + buffer.origin + row;
}

std::unique_ptr<Step> make_read(int planes, const Buffer& y, Place from, int64_t stride) {
  return std::make_unique<ReadStep>(planes, y, from, stride);
}

std::unique_ptr<Step> make_skip(int planes, const Buffer& x, const Buffer& y, int64_t stride) {
  return std::make_unique<SkipStep>(planes, x, y, stride);
}

std::unique_ptr<Step> make_write(int planes, const Buffer& x) { return std::make_unique<WriteStep>(planes, x); }

std::unique_ptr<Step> make_average_pool(int planes, const Buffer& x, const Buffer& y) {
  return std::make_unique<AveragePoolStep>(planes, x, y);
}

std::unique_ptr<Step> make_conv(
    int planes, bool tiles, int64_t threads, const std::string& name, const Buffer& x, const Buffer& y,
    const Buffer* residual, const Packed& packed, const std::vector<std::vector<int64_t>>& taps,
    const ConvShape& shape) {
  return std::make_unique<ConvStep>(planes, tiles, threads, name, x, y, residual, packed, taps, shape);
}

}  // namespace resnet_fast::cpu
