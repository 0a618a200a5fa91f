#include "conv1x1.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>

#include "pixel_slabs.h"

namespace resnet_fast::cpu {

using namespace pixel_slabs;

namespace {

Tensor weight_matrix(const Tensor& conv_weight, const Pixels& pixels) {
  TORCH_CHECK(
      conv_weight.numel() == conv_weight.size(0) * pixels.channels, "conv_weight: expected (K, ", pixels.channels,
      ", 1, 1), got ", conv_weight.sizes());
  return conv_weight.to(pixels.scalar).reshape({conv_weight.size(0), pixels.channels}).contiguous();
}

Tensor output_image(const Pixels& pixels, int64_t channels, const Tensor& like) {
  return at::empty(
      {pixels.images(), channels, pixels.height, pixels.width}, like.options(), at::MemoryFormat::ChannelsLast);
}

// t, one row a pixel of x's, as channels_last memory.
Tensor like_rows(const Tensor& t, const Pixels& pixels, const char* name) {
  TORCH_CHECK(
      t.dim() == 4 && t.size(0) == pixels.images() && t.size(2) == pixels.height && t.size(3) == pixels.width, name,
      ": expected (", pixels.images(), ", *, ", pixels.height, ", ", pixels.width, "), got ", t.sizes());
  return t.to(pixels.scalar).contiguous(at::MemoryFormat::ChannelsLast);
}

}  // namespace

Tensor conv1x1_join(
    const Tensor& x, const NormTensors& x_norm, double x_eps, const Tensor& conv_weight, at::IntArrayRef stride,
    const NormTensors& norm, double eps, const OptionalTensor& residual, const NormTensors& residual_norm,
    double residual_eps, bool relu) {
  const OpGuard guard;
  Pixels pixels(x, x_norm, x_eps, stride);
  const Tensor weight = weight_matrix(conv_weight, pixels).t();
  const int64_t out_channels = weight.size(1);
  const int64_t item = static_cast<int64_t>(x.element_size());
  const bool joined = residual.has_value() && residual->defined();
  const Slabs slabs(pixels.rows, (pixels.channels + out_channels * (joined ? 2 : 1)) * item);
  pixels.prepare(slabs.step, {});
  Tensor y = output_image(pixels, out_channels, x);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  const Scratch scratch(pixels.plain() ? 0 : slabs.step * pixels.channels, pixels.scalar);

  Columns columns(make_plan(1, out_channels, slabs.step, true), 2 * Norm::kColumns, pixels.acc);
  const std::optional<Norm> own = make_norm(out_channels, pixels.acc, norm, eps);
  TORCH_CHECK(own.has_value(), "norm: expected mean, var, weight and bias, got an empty list");
  const std::optional<Norm> residuals = make_norm(out_channels, pixels.acc, residual_norm, residual_eps);
  ApplyArgs epilogue;
  epilogue.params = own->columns(columns);
  epilogue.relu = relu;
  Tensor added;
  if (joined) {
    TORCH_CHECK(residual->sizes() == y.sizes(), "residual: expected ", y.sizes(), ", got ", residual->sizes());
    added = like_rows(*residual, pixels, "residual");
    if (residuals.has_value()) epilogue.residual_params = residuals->columns(columns, Norm::kColumns);
  }

  for_slabs(0, slabs.count, [&](int64_t number) {
    const Slab slab = slabs.at(number);
    const void* rows = pixels.activated(slab, scratch.mine());
    const int64_t start = slab.first * out_channels * item;
    Tensor product = matrix(out + start, slab.rows, out_channels, pixels.scalar);
    at::mm_out(product, matrix(rows, slab.rows, pixels.channels, pixels.scalar), weight);
    ApplyArgs args = epilogue;
    args.x = args.y = out + start;
    if (joined) args.residual = static_cast<const char*>(added.const_data_ptr()) + start;
    const Plan plan = make_plan(1, out_channels, slab.rows, true);
    kernels().apply[pixels.dtype](plan, args, 0, plan.items);
  });
  return y;
}

std::tuple<Tensor, Tensor> gram(const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride) {
  const OpGuard guard;
  Pixels pixels(x, x_norm, x_eps, stride);
  const int64_t channels = pixels.channels;
  const Slabs slabs(pixels.rows, channels * static_cast<int64_t>(c10::elementSize(pixels.acc)), longest_sum(pixels.rows));
  const DType acc = dtype_index(at::empty({0}, pixels.acc));

  // The first pixels' mean, as a shift.
  const Slabs first(std::min(kShiftPixels, std::min(pixels.rows, pixels.height * pixels.width)), kSlabBytes);
  const Slab sample{0, 0, first.rows};
  pixels.prepare(std::max(slabs.step, sample.rows), {});
  Tensor shift;
  {
    const Tensor rows = at::empty({sample.rows * channels + kLanePadding}, pixels.scalar);
    const Moments moments(first, channels);
    moments.add(sample, pixels.dtype, pixels.activated(sample, rows.mutable_data_ptr()));
    shift = moments.buffer.select(0, 0).select(0, 0).to(pixels.acc);
    shift.masked_fill_(shift.isfinite().logical_not(), 0);  // an infinite one would turn an infinite mean into NaN
  }
  pixels.prepare(slabs.step, shift);

  const Scratch gather(pixels.strided() ? slabs.step * channels : 0, pixels.scalar);
  const Scratch centred(slabs.step * channels, pixels.acc);
  const Moments moments(slabs, channels);
  const Products products(slabs, channels, channels, pixels.acc);
  products.for_each_slab([&](const Slab& slab, Tensor& product, double beta) {
    void* rows = centred.mine();
    pixels.centred(slab, gather.mine(), rows);
    moments.add(slab, acc, rows);
    const Tensor a = matrix(rows, slab.rows, channels, pixels.acc);
    at::addmm_out(product, product, a.t(), a, beta);
  });
  const Tensor total = moments.merged(slabs);
  const double* mean = total.const_data_ptr<double>();
  const double count = static_cast<double>(slabs.rows);
  const Tensor cov = products.merged([&](double sum, int64_t i, int64_t j) { return sum / count - mean[i] * mean[j]; });
  return {total.select(0, 0).add(shift).to(pixels.acc), cov};
}

std::tuple<Tensor, Tensor> outer(
    const Tensor& dz, const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride,
    const Tensor& mean) {
  const OpGuard guard;
  Pixels pixels(x, x_norm, x_eps, stride);
  const Tensor dz_rows = like_rows(dz, pixels, "dz");
  const int64_t channels = pixels.channels, out_channels = dz.size(1);
  const int64_t item = static_cast<int64_t>(x.element_size());
  const bool widened = pixels.scalar != pixels.acc;
  const int64_t row_bytes = (channels + out_channels) * static_cast<int64_t>(c10::elementSize(pixels.acc));
  const Slabs slabs(pixels.rows, row_bytes, longest_sum(pixels.rows));
  pixels.prepare(slabs.step, channel_param(channels, pixels.acc, mean, "mean"));

  const Scratch gather(pixels.strided() ? slabs.step * channels : 0, pixels.scalar);
  const Scratch centred(slabs.step * channels, pixels.acc);
  const Scratch wide_dz(widened ? slabs.step * out_channels : 0, pixels.acc);
  const Widening widening(out_channels, slabs.step, pixels);
  const Tensor sums = at::empty({slabs.count, out_channels}, at::kDouble);
  const Products products(slabs, out_channels, channels, pixels.acc);
  products.for_each_slab([&](const Slab& slab, Tensor& product, double beta) {
    pixels.centred(slab, gather.mine(), centred.mine());
    const void* dz_slab = static_cast<const char*>(dz_rows.const_data_ptr()) + slab.first * out_channels * item;
    double* slab_sums = sums.mutable_data_ptr<double>() + slab.number * out_channels;
    sum_rows(slab, out_channels, pixels.dtype, dz_slab, widening.zeros(), slab_sums);
    if (widened) dz_slab = widening.run(slab, dz_slab, wide_dz.mine());
    at::addmm_out(
        product, product, matrix(dz_slab, slab.rows, out_channels, pixels.acc).t(),
        matrix(centred.mine(), slab.rows, channels, pixels.acc), beta);
  });
  Tensor sum_dz = at::zeros({out_channels}, at::kDouble);
  for (int64_t i = 0; i < slabs.count; ++i) sum_dz.add_(sums.select(0, i));
  return {products.merged([](double sum, int64_t, int64_t) { return sum; }), sum_dz.to(pixels.acc)};
}

Tensor gram_dgrad(
    const Tensor& dz, const Tensor& x, const NormTensors& x_norm, double x_eps, at::IntArrayRef stride,
    const Tensor& dz_matrix, const Tensor& x_matrix, const Tensor& mean, const Tensor& constant,
    const OptionalTensor& add) {
  const OpGuard guard;
  Pixels pixels(x, x_norm, x_eps, stride);
  const Tensor dz_rows = like_rows(dz, pixels, "dz");
  const int64_t channels = pixels.channels, out_channels = dz.size(1);
  const int64_t item = static_cast<int64_t>(x.element_size());
  const bool strided = pixels.strided(), widened = pixels.scalar != pixels.acc;
  const Slabs slabs(pixels.rows, (2 * channels + out_channels) * static_cast<int64_t>(c10::elementSize(pixels.acc)));
  pixels.prepare(slabs.step, channel_param(channels, pixels.acc, mean, "mean"));
  // Never in sixteen bits: a matrix rounded is an error that all pixels share, and sums over them would show it.
  const Tensor from_dz = dz_matrix.to(pixels.acc).contiguous();
  const Tensor from_x = x_matrix.to(pixels.acc).contiguous();
  const Tensor offset = constant.to(pixels.acc).contiguous();

  const bool adding = add.has_value() && add->defined();
  Tensor added;
  if (adding) {
    TORCH_CHECK(add->sizes() == x.sizes(), "add: expected ", x.sizes(), ", got ", add->sizes());
    added = add->to(pixels.scalar).contiguous(at::MemoryFormat::ChannelsLast);
  }
  Tensor dx = at::empty_like(x);
  if (strided) adding ? dx.copy_(added) : dx.zero_();
  char* out = static_cast<char*>(dx.mutable_data_ptr());

  const Scratch gather(strided ? slabs.step * channels : 0, pixels.scalar);
  const Scratch centred(slabs.step * channels, pixels.acc);
  const Scratch products(strided || widened ? slabs.step * channels : 0, pixels.acc);
  const Scratch wide_dz(widened ? slabs.step * out_channels : 0, pixels.acc);
  const Widening widening(out_channels, slabs.step, pixels);
  for_slabs(0, slabs.count, [&](int64_t number) {
    const Slab slab = slabs.at(number);
    const auto pixel_rows = [&](void* data, at::ScalarType dtype) { return matrix(data, slab.rows, channels, dtype); };
    pixels.centred(slab, gather.mine(), centred.mine());
    const int64_t start = slab.first * pixels.row_bytes();
    Tensor image = pixel_rows(strided || widened ? products.mine() : out + start, pixels.acc);
    at::addmm_out(image, offset, pixel_rows(centred.mine(), pixels.acc), from_x);
    const void* dz_slab = static_cast<const char*>(dz_rows.const_data_ptr()) + slab.first * out_channels * item;
    if (widened) dz_slab = widening.run(slab, dz_slab, wide_dz.mine());
    at::addmm_out(image, image, matrix(dz_slab, slab.rows, out_channels, pixels.acc), from_dz);
    if (!strided) {
      if (adding) image.add_(pixel_rows(static_cast<char*>(added.mutable_data_ptr()) + start, pixels.scalar));
      if (widened) pixel_rows(out + start, pixels.scalar).copy_(image);
      return;
    }
    const int64_t bytes = channels * static_cast<int64_t>(image.element_size());
    char* row = static_cast<char*>(image.mutable_data_ptr());
    for (int64_t i = 0; i < slab.rows; ++i, row += bytes) {
      char* to = out + pixels.offset(slab.first + i);
      if (!adding && !widened) {
        std::memcpy(to, row, bytes);
        continue;
      }
      Tensor values = matrix(row, 1, channels, pixels.acc);
      Tensor pixel = matrix(to, 1, channels, pixels.scalar);
      pixel.copy_(adding ? values.add_(pixel) : values);
    }
  });
  return dx;
}

}  // namespace resnet_fast::cpu
