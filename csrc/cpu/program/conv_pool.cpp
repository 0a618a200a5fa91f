// A stem's convolution, ReLU and max-pool in one pass: of what the convolution makes, no more than a band of rows is ever
// there, in the second cache level of the thread that pools it.
#include <algorithm>

#include "../integers.h"
#include "steps.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kBandBytes = 3 << 18;  // of 2 MiB

// An item is a band of y's rows, which 2 * rows + 1 rows of the convolution make; the band before needs the first too.
class ConvPoolStep : public Step {
 public:
  ConvPoolStep(
      int planes, bool tiles, const std::string& name, const Buffer& x, const Buffer& band, const Buffer& y,
      int64_t height, const Packed& packed, const std::vector<std::vector<int64_t>>& taps, int64_t columns,
      int64_t stride)
      : Step(name, 1, 0),
        x_(x),
        band_(band),
        y_(y),
        packed_(packed),
        height_(height),
        rows_((band.height - 1) / 2),
        output_blocks_(div_up(y.channels, amx::kVector)),
        x_step_(stride * x.row),
        a_row_(tiles ? div_up(band.width, amx::kTileRows) : band.width) {
    items = div_up(y.height, rows_);
    for (const auto& tap : taps) offsets_.push_back(tap[0] * x.row + tap[1] * x.pixel);
    for (int64_t row = 0; row < band.height; ++row) tiles ? place_tiles(row, stride) : place_pixels(row, stride);
    args_ = {};
    args_.planes = planes;
    args_.x_row = x.pixel * stride;
    args_.x_plane = x.plane;
    args_.x_block = x.block;
    args_.blocks = 1;
    args_.outputs_per_group = output_blocks_;
    args_.offsets = offsets_.data();
    args_.steps = args_.chunk = static_cast<int64_t>(offsets_.size());
    args_.taps = 1;
    args_.pairs = div_up(x.vector * columns, 2);
    args_.weight = static_cast<uint16_t*>(packed.weight.mutable_data_ptr());
    args_.scale = packed.scale.defined() ? packed.scale.const_data_ptr<float>() : nullptr;
    args_.bias = packed.bias.const_data_ptr<float>();
    args_.y_plane = band.plane;
    args_.y_block = band.block;
    args_.y_row = args_.y_gap = band.pixel;
    args_.relu = args_.pixels_first = true;
  }

  void run(const Run& run, int64_t item) const override {
    const int64_t y_row = item * rows_, y_rows = std::min(rows_, y_.height - y_row);
    const int64_t row = 2 * y_row - 1, rows = 2 * y_rows + 1;  // of the convolution; some may be the pool's padding
    const int64_t begin = std::max<int64_t>(-row, 0), end = std::min(rows, height_ - row);
    uint16_t* const band = pixels(band_, run, 1);
    clear(band, 0, begin);
    clear(band, end, rows);
    amx::ConvArgs args = args_;
    args.x = pixels(x_, run, 1) + (row + begin) * x_step_;
    args.y = band + begin * band_.row;
    convolve(run, args, rows_of_band_, 0, (end - begin) * a_row_, 0, output_blocks_);
    uint16_t* const y = pixels(y_, run, 1) + y_row * y_.row;
    for (int64_t block = 0; block < output_blocks_; ++block) {
      amx::max_pool({args.planes, band + band_.row + block * band_.block, y + block * y_.block, band_.plane, band_.row,
                     band_.pixel, y_.plane, y_.row, y_.pixel, y_rows, y_.width});
    }
  }

 private:
  void place_tiles(int64_t row, int64_t stride) {
    for (int64_t column = 0; column < band_.width; column += amx::kTileRows) {
      const int64_t rows = std::min(amx::kTileRows, band_.width - column);
      rows_of_band_.tiles.push_back({row * x_step_ + column * stride * x_.pixel,
                                     row * band_.row + column * band_.pixel, (1u << rows) - 1});
    }
  }

  void place_pixels(int64_t row, int64_t stride) {
    for (int64_t column = 0; column < band_.width; ++column) {
      rows_of_band_.pixels.push_back({static_cast<int32_t>(row * x_step_ + column * stride * x_.pixel),
                                      static_cast<int32_t>(row * band_.row + column * band_.pixel), 0});
    }
  }

  void clear(uint16_t* band, int64_t begin, int64_t end) const {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t block = 0; block < output_blocks_; ++block) {
        for (int64_t plane = 0; plane < args_.planes; ++plane) {
          uint16_t* const to = band + block * band_.block + plane * band_.plane + row * band_.row;
          std::fill_n(to, band_.width * band_.pixel, uint16_t{0});
        }
      }
    }
  }

  const Buffer &x_, &band_, &y_;
  Packed packed_;
  int64_t height_, rows_, output_blocks_, x_step_, a_row_;  // a_row_: tiles or pixels
  std::vector<int64_t> offsets_;
  Rows rows_of_band_;
  amx::ConvArgs args_;
};

}  // namespace

int64_t band_height(int64_t planes, int64_t channels, int64_t width, int64_t y_height, int64_t threads) {
  const int64_t row_bytes = 2 * planes * channels * (width + 1);
  const int64_t fitting = (kBandBytes / row_bytes - 1) / 2, fair = div_up(y_height, threads);
  return 2 * std::max<int64_t>(std::min(fitting, fair), 1) + 1;
}

std::unique_ptr<Step> make_conv_pool(
    int planes, bool tiles, const std::string& name, const Buffer& x, const Buffer& band, const Buffer& y,
    int64_t height, const Packed& packed, const std::vector<std::vector<int64_t>>& taps, int64_t columns,
    int64_t stride) {
  return std::make_unique<ConvPoolStep>(planes, tiles, name, x, band, y, height, packed, taps, columns, stride);
}

}  // namespace resnet_fast::cpu
