// Threads share out pixels within parts of the weight, panels of outputs: a part stays in the second cache level while pixels
// pass by it, where a panel is no more than that.
// A value's sum has a fixed order, so no bit depends on the number of threads.
#include "direct_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "direct_sizes.h"
#include "guards.h"
#include "integers.h"
#include "kernels.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kPartValues = 96 * 1024;  // of a packed weight, with which pixels are multiplied in turn
constexpr int64_t kGrain = 1 << 19;         // multiply-adds that are worth a thread
constexpr auto kRowsLayout = at::MemoryFormat::ChannelsLast;

// The convolution's tensors, kept while it runs.
struct Operands {
  Tensor x, weight, y, scale, bias, residual, zeros;
  DirectConv conv;
  DirectWeight packing;
};

// Of the outputs, or of their shape.
Tensor float_or_none(const OptionalTensor& given, at::IntArrayRef shape, const char* name) {
  if (!given.has_value()) return {};
  TORCH_CHECK(
      given->scalar_type() == at::kFloat && given->sizes() == shape, "direct_conv: ", name, " must be float32 and ", shape,
      ", not ", given->scalar_type(), " and ", given->sizes());
  return shape.size() == 4 ? given->contiguous(kRowsLayout) : given->contiguous();
}

const float* data_or_null(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

void set_geometry(
    DirectConv& conv, const Tensor& x, const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation) {
  conv.channels = x.size(1);
  conv.outputs = weight.size(0);
  conv.height = x.size(2);
  conv.width = x.size(3);
  conv.kernel_rows = weight.size(2);
  conv.kernel_columns = weight.size(3);
  const auto out_size = [&](int64_t axis) {
    conv.stride[axis] = stride[axis];
    conv.padding[axis] = padding[axis];
    conv.dilation[axis] = dilation[axis];
    const int64_t span = dilation[axis] * (weight.size(2 + axis) - 1) + 1;
    const int64_t room = x.size(2 + axis) + 2 * padding[axis] - span;
    TORCH_CHECK(room >= 0, "direct_conv: the kernel is larger than x, ", x.sizes());
    return room / stride[axis] + 1;
  };
  conv.out_height = out_size(0);
  conv.out_width = out_size(1);
}

Operands operands(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "direct_conv: x must be 4-D and float32");
  TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == at::kFloat && weight.size(1) == x.size(1) &&
          weight.size(2) * weight.size(3) <= kDirectTaps,
      "direct_conv: weight must be float32 and (K, ", x.size(1), ", R, S) with R * S of at most ", kDirectTaps, ", not ",
      weight.scalar_type(), " and ", weight.sizes());
  const auto least = [](at::IntArrayRef pair) { return pair.size() == 2 ? std::min(pair[0], pair[1]) : -1; };
  TORCH_CHECK(
      least(stride) > 0 && least(padding) >= 0 && least(dilation) > 0,
      "direct_conv: stride and dilation must be pairs of 1 or more and padding one of 0 or more, not ", stride, ", ",
      dilation, " and ", padding);
  Operands out;
  DirectConv& conv = out.conv;
  set_geometry(conv, x, weight, stride, padding, dilation);
  const int64_t shape[] = {x.size(0), conv.outputs, conv.out_height, conv.out_width};
  out.x = x.contiguous(kRowsLayout);
  out.weight = weight.is_contiguous(kRowsLayout) ? weight : weight.contiguous();
  out.y = at::empty(shape, x.options().memory_format(kRowsLayout));
  out.scale = float_or_none(scale, {conv.outputs}, "scale");
  out.bias = bias.has_value() ? float_or_none(bias, {conv.outputs}, "bias") : at::zeros({conv.outputs}, x.options());
  out.residual = float_or_none(residual, shape, "residual");
  if (padding[0] > 0 || padding[1] > 0) out.zeros = at::zeros({conv.channels}, x.options());
  conv.x = data_or_null(out.x);
  conv.zeros = data_or_null(out.zeros);
  conv.scale = data_or_null(out.scale);
  conv.bias = data_or_null(out.bias);
  conv.residual = data_or_null(out.residual);
  conv.y = out.y.mutable_data_ptr<float>();
  out.packing = {out.weight.const_data_ptr<float>(), nullptr, conv.outputs, conv.channels,
                 conv.kernel_rows * conv.kernel_columns, out.weight.is_contiguous(kRowsLayout)};
  return out;
}

}  // namespace

Tensor direct_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu) {
  const OpGuard guard;
  Operands of = operands(x, weight, scale, bias, residual, stride, padding, dilation);
  if (of.y.numel() == 0) return of.y;
  DirectConv& conv = of.conv;
  conv.relu = relu;
  const int64_t panel_values = std::max<int64_t>(1, of.packing.taps * conv.channels * kDirectPanel);
  const int64_t panels = div_up(conv.outputs, kDirectPanel);
  const int64_t most = std::clamp<int64_t>(kPartValues / panel_values, 1, panels);
  const int64_t parts = div_up(panels, most), part = div_up(panels, parts);  // of equal size, as threads get as many
  const int64_t pixels = x.size(0) * conv.out_height * conv.out_width, groups = div_up(pixels, kDirectRows);
  const Scratch packed(part * panel_values, at::kFloat);
  const int64_t grain = div_up(kGrain, panel_values * part * kDirectRows);
  at::parallel_for(0, parts * groups, grain, [&](int64_t begin, int64_t end) {
    DirectWeight packing = of.packing;
    packing.packed = static_cast<float*>(packed.mine());
    while (begin < end) {
      const int64_t first = begin / groups * part, last = std::min(first + part, panels);
      const int64_t stop = std::min(end, (begin / groups + 1) * groups), pixel = begin % groups * kDirectRows;
      kernels().direct_pack(packing, first, last);
      kernels().direct_conv(
          conv, packing.packed, first, last, pixel, std::min(pixel + (stop - begin) * kDirectRows, pixels));
      begin = stop;
    }
  });
  return of.y;
}

}  // namespace resnet_fast::cpu
