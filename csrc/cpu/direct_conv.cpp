// Threads share out pixels within parts of the weight, panels of outputs. A weight that may change has parts that stay in the
// second cache level, from packing them to the last pixel that passes by, where a panel is no more than that. One that is
// packed once has the parts with which threads fetch least; where it is larger than that cache, and sums are long, AVX2 copies
// pixels and multiplies more of them with what it has fetched (NOTES.md). A value's sum has a fixed order, so no bit
// depends on the number of threads.
#include "direct_conv.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "bands.h"
#include "direct_image.h"
#include "direct_sizes.h"
#include "guards.h"
#include "integers.h"
#include "conv_kernels.h"
#include "max_pool.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kPartValues = 96 * 1024;  // of a packed weight, with which pixels are multiplied in turn
constexpr int64_t kLongSum = 512;           // terms
constexpr int64_t kGrain = 1 << 19;         // multiply-adds that are worth a thread
constexpr auto kRowsLayout = at::MemoryFormat::ChannelsLast;

// A convolution's geometry.
struct Geometry {
  int64_t outputs, kernel_rows, kernel_columns;
  at::IntArrayRef stride, padding, dilation;
};

// The convolution's tensors, kept while it runs.
struct Operands {
  Tensor x, y, scale, bias, residual, zeros;
  DirectConv conv;
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

void set_geometry(DirectConv& conv, const Tensor& x, const Geometry& geometry) {
  const auto least = [](at::IntArrayRef pair) { return pair.size() == 2 ? std::min(pair[0], pair[1]) : -1; };
  TORCH_CHECK(
      least(geometry.stride) > 0 && least(geometry.padding) >= 0 && least(geometry.dilation) > 0,
      "direct_conv: stride and dilation must be pairs of 1 or more and padding one of 0 or more, not ", geometry.stride,
      ", ", geometry.dilation, " and ", geometry.padding);
  conv.channels = x.size(1);
  conv.outputs = geometry.outputs;
  conv.height = x.size(2);
  conv.width = x.size(3);
  conv.kernel_rows = geometry.kernel_rows;
  conv.kernel_columns = geometry.kernel_columns;
  const auto out_size = [&](int64_t axis, int64_t kernel) {
    conv.stride[axis] = geometry.stride[axis];
    conv.padding[axis] = geometry.padding[axis];
    conv.dilation[axis] = geometry.dilation[axis];
    const int64_t room = x.size(2 + axis) + 2 * geometry.padding[axis] - geometry.dilation[axis] * (kernel - 1) - 1;
    TORCH_CHECK(room >= 0, "direct_conv: the kernel is larger than x, ", x.sizes());
    return room / geometry.stride[axis] + 1;
  };
  conv.out_height = out_size(0, conv.kernel_rows);
  conv.out_width = out_size(1, conv.kernel_columns);
}

void check_x(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat, "direct_conv: x must be 4-D and float32");
}

DirectWeight packing_of(const Tensor& weight, float* packed) {
  return {weight.const_data_ptr<float>(), packed, weight.size(0), weight.size(1), weight.size(2) * weight.size(3),
          weight.is_contiguous(kRowsLayout)};
}

// All but y and the residual.
Operands inputs(
    const Tensor& x, const Geometry& geometry, const OptionalTensor& scale, const OptionalTensor& bias, bool relu) {
  Operands out;
  DirectConv& conv = out.conv;
  set_geometry(conv, x, geometry);
  out.x = x.contiguous(kRowsLayout);
  out.scale = float_or_none(scale, {conv.outputs}, "scale");
  out.bias = bias.has_value() ? float_or_none(bias, {conv.outputs}, "bias") : at::zeros({conv.outputs}, x.options());
  if (conv.padding[0] > 0 || conv.padding[1] > 0) out.zeros = at::zeros({conv.channels}, x.options());
  conv.x = data_or_null(out.x);
  conv.zeros = data_or_null(out.zeros);
  conv.scale = data_or_null(out.scale);
  conv.bias = data_or_null(out.bias);
  conv.relu = relu;
  return out;
}

// onto: whether the residual's memory, where it is in channels_last, becomes y's.
void add_outputs(Operands& to, const OptionalTensor& residual, bool onto) {
  DirectConv& conv = to.conv;
  const int64_t shape[] = {to.x.size(0), conv.outputs, conv.out_height, conv.out_width};
  to.residual = float_or_none(residual, shape, "residual");
  to.y = onto && to.residual.defined() ? to.residual : at::empty(shape, to.x.options().memory_format(kRowsLayout));
  conv.residual = data_or_null(to.residual);
  conv.y = to.y.mutable_data_ptr<float>();
}

int64_t terms_of(const DirectConv& conv) { return conv.kernel_rows * conv.kernel_columns * conv.channels; }
int64_t panels_of(const DirectConv& conv) { return div_up(conv.outputs, kDirectPanel); }
int64_t pixels_of(const Operands& of) { return of.x.size(0) * of.conv.out_height * of.conv.out_width; }

// multiply(begin, end, first, last) for parts of `part` panels [begin, end) and groups of pixels [first, last), shared out to
// threads.
template <typename F>
void share_out(const Operands& of, int64_t part, int64_t group, const F& multiply) {
  const int64_t panels = panels_of(of.conv), pixels = pixels_of(of), groups = div_up(pixels, group);
  const int64_t products = std::max<int64_t>(1, terms_of(of.conv) * part * kDirectPanel * group);  // of an item
  at::parallel_for(0, div_up(panels, part) * groups, div_up(kGrain, products), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t first = begin / groups * part, stop = std::min(end, (begin / groups + 1) * groups);
      const int64_t pixel = begin % groups * group;
      multiply(first, std::min(first + part, panels), pixel, std::min(pixel + (stop - begin) * group, pixels));
      begin = stop;
    }
  });
}

// Panels of the parts, as threads get as many, where there are to be `parts` of them.
int64_t part_of(const DirectConv& conv, int64_t parts) {
  return div_up(panels_of(conv), std::clamp<int64_t>(parts, 1, panels_of(conv)));
}

// Of p parts, each thread of t fetches one, and p / t of the pixels: weight / p + x * p / t is least at p = sqrt(t weight / x).
int64_t part_fetching_least(const Operands& of) {
  const double weight = static_cast<double>(terms_of(of.conv)) * of.conv.outputs, x = of.x.numel();
  const int threads = at::get_num_threads();
  return part_of(of.conv, std::lround(std::min<double>(threads, std::sqrt(threads * weight / x))));
}

void check_packed(const Tensor& packed, int64_t out_channels, const Tensor& x) {
  TORCH_CHECK(
      packed.dim() == 5 && packed.scalar_type() == at::kFloat && packed.is_contiguous() && packed.size(3) == x.size(1) &&
          packed.size(4) == kDirectPanel && packed.size(0) == div_up(out_channels, kDirectPanel),
      "direct_conv: packed must be what direct_pack made of a weight (", out_channels, ", ", x.size(1), ", R, S), not ",
      packed.scalar_type(), " and ", packed.sizes());
}

// y, which is not empty, by a weight that is packed.
void multiply_packed(const Operands& of, const Tensor& packed) {
  const float* const weight = packed.const_data_ptr<float>();
  if (is_of_image(of.conv)) {
    image_conv(of.conv, of.x.size(0), weight);
    return;
  }
  const int64_t terms = terms_of(of.conv), panel_values = terms * kDirectPanel, part = part_fetching_least(of);
  if (conv_kernels().direct_conv_copied == nullptr || terms < kLongSum || packed.numel() <= kPartValues) {
    share_out(of, part, kDirectRows, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      conv_kernels().direct_conv(of.conv, weight + begin * panel_values, begin, end, first, last);
    });
    return;
  }
  const Scratch copies(kDirectCopied * round_up(terms, kDirectChunk), at::kFloat);
  share_out(of, part, kDirectCopied, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const float* weights = weight + begin * panel_values;
    conv_kernels().direct_conv_copied(of.conv, weights, begin, end, first, last, static_cast<float*>(copies.mine()));
  });
}

}  // namespace

Tensor direct_conv(
    const Tensor& x, const Tensor& weight, const OptionalTensor& scale, const OptionalTensor& bias,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu) {
  const OpGuard guard;
  check_x(x);
  TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == at::kFloat && weight.size(1) == x.size(1) &&
          weight.size(2) * weight.size(3) <= kDirectTaps,
      "direct_conv: weight must be float32 and (K, ", x.size(1), ", R, S) with R * S of at most ", kDirectTaps, ", not ",
      weight.scalar_type(), " and ", weight.sizes());
  const Geometry geometry{weight.size(0), weight.size(2), weight.size(3), stride, padding, dilation};
  Operands of = inputs(x, geometry, scale, bias, relu);
  add_outputs(of, residual, /*onto=*/false);
  if (of.y.numel() == 0) return of.y;
  if (is_of_image(of.conv)) {
    image_conv(of.conv, x.size(0), direct_pack(weight).const_data_ptr<float>());
    return of.y;
  }
  const int64_t panel_values = std::max<int64_t>(1, terms_of(of.conv) * kDirectPanel);
  const int64_t most = std::max<int64_t>(1, kPartValues / panel_values);
  const int64_t part = part_of(of.conv, div_up(panels_of(of.conv), most));
  const Scratch packed(part * panel_values, at::kFloat);
  const Tensor laid_out = weight.is_contiguous(kRowsLayout) ? weight : weight.contiguous();
  share_out(of, part, kDirectRows, [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
    const DirectWeight packing = packing_of(laid_out, static_cast<float*>(packed.mine()));
    conv_kernels().direct_pack(packing, begin, end);
    conv_kernels().direct_conv(of.conv, packing.packed, begin, end, first, last);
  });
  return of.y;
}

Tensor direct_pack(const Tensor& weight) {
  const OpGuard guard;
  TORCH_CHECK(
      weight.dim() == 4 && weight.scalar_type() == at::kFloat && weight.size(2) * weight.size(3) <= kDirectTaps,
      "direct_pack: weight must be float32 and (K, C, R, S) with R * S of at most ", kDirectTaps, ", not ",
      weight.scalar_type(), " and ", weight.sizes());
  const int64_t panels = div_up(weight.size(0), kDirectPanel);
  const int64_t shape[] = {panels, weight.size(2), weight.size(3), weight.size(1), kDirectPanel};
  Tensor packed = at::empty(shape, weight.options());
  const Tensor laid_out = weight.is_contiguous(kRowsLayout) ? weight : weight.contiguous();
  const DirectWeight packing = packing_of(laid_out, packed.mutable_data_ptr<float>());
  conv_kernels().direct_pack(packing, 0, panels);
  return packed;
}

Tensor direct_conv_packed(
    const Tensor& x, const Tensor& packed, int64_t out_channels, const OptionalTensor& bias, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool relu, bool onto) {
  const OpGuard guard;
  check_x(x);
  check_packed(packed, out_channels, x);
  const Geometry geometry{out_channels, packed.size(1), packed.size(2), stride, padding, dilation};
  Operands of = inputs(x, geometry, std::nullopt, bias, relu);
  add_outputs(of, residual, onto);
  if (of.y.numel() > 0) multiply_packed(of, packed);
  return of.y;
}

Tensor direct_conv_max_pool(
    const Tensor& x, const Tensor& packed, int64_t out_channels, const OptionalTensor& scale, const OptionalTensor& bias,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation) {
  const OpGuard guard;
  check_x(x);
  check_packed(packed, out_channels, x);
  const Geometry geometry{out_channels, packed.size(1), packed.size(2), stride, padding, dilation};
  Operands of = inputs(x, geometry, scale, bias, /*relu=*/true);
  const DirectConv& conv = of.conv;
  const Tensor y = at::empty(
      {x.size(0), conv.outputs, pooled_size(conv.out_height), pooled_size(conv.out_width)},
      x.options().memory_format(kRowsLayout));
  if (y.numel() == 0) return y;
  if (is_of_image(conv)) {
    image_conv_max_pool(conv, x.size(0), packed.const_data_ptr<float>(), y.mutable_data_ptr<float>());
    return y;
  }
  add_outputs(of, std::nullopt, /*onto=*/false);
  multiply_packed(of, packed);
  return max_pool(of.y);
}

}  // namespace resnet_fast::cpu
