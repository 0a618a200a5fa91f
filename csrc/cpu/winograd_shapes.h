// What winograd.cpp and winograd_gradient.cpp set up alike: shapes, a weight's steps, the memory of slabs.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "integers.h"
#include "conv_kernels.h"
#include "winograd_points.h"

namespace resnet_fast::cpu {

constexpr int64_t kLine = 16;  // floats

inline at::Tensor winograd_zeros(const at::Tensor& x) {
  return at::zeros({round_up(x.size(1), kLine)}, x.options());
}

// Of x in channels_last and the zeros, both kept by the caller; a tile has 4 x `columns` outputs.
inline WinogradShape winograd_shape(const at::Tensor& x, const at::Tensor& zeros, int64_t outputs, int64_t columns) {
  WinogradShape out;
  out.x = x.const_data_ptr<float>();
  out.zeros = zeros.const_data_ptr<float>();
  out.channels = x.size(1);
  out.outputs = outputs;
  out.height = x.size(2);
  out.width = x.size(3);
  out.tile_rows = div_up(out.height, kWinogradOut);
  out.tile_columns = div_up(out.width, columns);
  out.panels = div_up(outputs, kWinogradPanel);
  return out;
}

// (K, C, 3, 3), float32, as it is where its nine taps are evenly apart, else a copy.
inline at::Tensor winograd_dense(const at::Tensor& weight) {
  TORCH_CHECK(
      weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3 && weight.scalar_type() == at::kFloat,
      "winograd: weight must be (K, C, 3, 3) and float32");
  TORCH_CHECK(weight.numel() < (int64_t{1} << 31), "winograd: weight has 2^31 elements or more");
  const bool usable = weight.is_contiguous() || weight.is_contiguous(at::MemoryFormat::ChannelsLast);
  return usable ? weight : weight.contiguous();
}

// Of a dense one.
inline WinogradSteps winograd_steps(const at::Tensor& weight) {
  const int64_t channels = weight.size(1);
  const bool contiguous = weight.is_contiguous();
  return {9 * channels, contiguous ? 9 : 1, contiguous ? 1 : channels};
}

// Slabs of at most `tiles`, transformed in `elements` values each.
class WinogradScratch {
 public:
  WinogradScratch(const WinogradShape& conv, int64_t elements, int64_t tiles, int64_t slabs)
      : elements_(elements),
        // A line more than the tiles need, so that the elements of a tile do not fall into one set of the cache.
        in_(tiles * round_up(conv.channels, kWinogradBlock) + kLine),
        out_(tiles * conv.panels * kWinogradPanel + kLine),
        buffer_(at::empty({slabs, elements * (in_ + out_)}, at::kFloat)) {}

  WinogradSlab slab(int64_t number, int64_t first, int64_t tiles) const {
    float* mine = buffer_.mutable_data_ptr<float>() + number * buffer_.size(1);
    return {first, tiles, mine, in_, mine + elements_ * in_, out_};
  }

 private:
  int64_t elements_, in_, out_;
  at::Tensor buffer_;
};

}  // namespace resnet_fast::cpu
