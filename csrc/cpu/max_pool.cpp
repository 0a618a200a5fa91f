// Images are cut into bands of rows: what a band's pooled rows are the maxima of, or its pixels' gradients, stays in the
// second cache level between the kernels. Bands depend on shapes only and their sums are merged in a fixed order, so no
// bit depends on the number of threads.
#include "max_pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "bands.h"
#include "guards.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kBandBytes = 256 * 1024;  // of activations, or of their gradients

// Of the pooled images' rows, or of the pixels', `most` at a time but for small images.
Bands bands_of(int64_t rows, int64_t most) { return {rows, std::min(std::max<int64_t>(most, 2), rows)}; }

struct Images {
  Tensor x;
  DType dtype;
  at::ScalarType acc;
  int64_t count, channels, height, width;

  explicit Images(const Tensor& x)
      : x(x), dtype(dtype_index(x)), acc(acc_type_of(x)), count(x.size(0)), channels(x.size(1)), height(x.size(2)),
        width(x.size(3)) {
    TORCH_CHECK(
        x.dim() == 4 && x.numel() > 0 && x.device().is_cpu() && x.is_contiguous(at::MemoryFormat::ChannelsLast),
        "max_pool: expected a CPU tensor in channels_last that is not empty, got ", x.sizes(), ", strides ", x.strides());
  }

  int64_t row_bytes() const { return width * channels * static_cast<int64_t>(x.element_size()); }
  int64_t rows_in_band() const { return kBandBytes / row_bytes(); }
  // The byte of a row of an image
  int64_t offset(int64_t image, int64_t row) const { return (image * height + row) * row_bytes(); }
  Plan plan(int64_t rows) const { return make_plan(1, channels, rows * width, true); }

  Tensor like_pooled(at::ScalarType dtype) const {
    return at::empty(
        {count, channels, pooled_size(height), pooled_size(width)}, x.options().dtype(dtype), at::MemoryFormat::ChannelsLast);
  }
  // The kernels' arguments for an image's pooled pixels
  MaxPoolArgs args(const Tensor& y, const Tensor& index, int64_t image) const {
    MaxPoolArgs out{channels, height, width, pooled_size(height), pooled_size(width)};
    const int64_t first = image * out.pooled_height * out.pooled_width * channels;
    out.y = static_cast<char*>(y.data_ptr()) + first * static_cast<int64_t>(y.element_size());
    out.index = index.numel() == 0 ? nullptr : index.data_ptr<uint8_t>() + first;
    return out;
  }
};

const void* at_byte(const Tensor& t, int64_t byte) { return static_cast<const char*>(t.const_data_ptr()) + byte; }

Tensor no_index(const Tensor& x) { return at::empty({0}, x.options().dtype(at::kByte)); }

// What both passes backward set up alike, and their walk: f(band's number, rows' plan, arguments).
class Backward {
 public:
  Backward(
      const Tensor& dy, const Tensor& index, const Tensor& conv_out, const NormTensors& norm, double eps,
      const OptionalTensor& mean_dz = std::nullopt, const OptionalTensor& mean_dzx = std::nullopt)
      : images(conv_out),
        bands(bands_of(images.height, images.rows_in_band() / 2 * 2)),  // windows begin at every second row
        dy_(dy.to(conv_out.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast)),
        index_(index.contiguous(at::MemoryFormat::ChannelsLast)),
        columns_(images.plan(bands.step), kBackwardColumns, images.acc) {
    TORCH_CHECK(
        dy.sizes() == images.like_pooled(at::kByte).sizes() && index.sizes() == dy.sizes() &&
            index.scalar_type() == at::kByte,
        "dy and index: expected the shape of the pooled ", conv_out.sizes(), ", index in uint8, got ", dy.sizes(), " and ",
        index.sizes(), " in ", index.scalar_type());
    args_.params =
        backward_params(required_norm(images.channels, images.acc, norm, eps), columns_, mean_dz, mean_dzx);
    args_.mask = Mask::from_x;
  }

  template <typename F>
  void each(const F& f) const {
    const Scratch scratch(bands.step * images.width * images.channels, images.x.scalar_type());
    bands.each(images.count, [&](const Band& band) {
      MaxPoolArgs pool = images.args(dy_, index_, band.image);
      pool.x = scratch.mine();
      pool.first_row = band.first;
      kernels().max_unpool[images.dtype](pool, band.first, band.last);
      BackwardArgs args = args_;
      args.dy = pool.x;
      const int64_t offset = images.offset(band.image, band.first);
      args.x = at_byte(images.x, offset);
      f(band.number, images.plan(band.last - band.first), offset, args);
    });
  }

  const Images images;
  const Bands bands;

 private:
  const Tensor dy_, index_;
  Columns columns_;
  BackwardArgs args_;
};

}  // namespace

Tensor max_pool(const Tensor& x) {
  const OpGuard guard;
  const Images images(x);
  const Tensor y = images.like_pooled(x.scalar_type()), index = no_index(x);
  bands_of(y.size(2), images.rows_in_band()).each(images.count, [&](const Band& band) {
    MaxPoolArgs args = images.args(y, index, band.image);
    args.x = const_cast<void*>(at_byte(x, images.offset(band.image, 0)));
    kernels().max_pool[images.dtype](args, band.first, band.last);
  });
  return y;
}

std::tuple<Tensor, Tensor> bn_max_pool(const Tensor& conv_out, const NormTensors& norm, double eps, bool wants_index) {
  const OpGuard guard;
  const Images images(conv_out);
  const Tensor y = images.like_pooled(conv_out.scalar_type());
  const Tensor index = wants_index ? images.like_pooled(at::kByte) : no_index(conv_out);
  const Bands bands = bands_of(y.size(2), (images.rows_in_band() - 1) / 2);
  const int64_t most = std::min(2 * bands.step + 1, images.height);
  Columns columns(images.plan(most), Norm::kColumns, images.acc);
  const ColumnParams params = required_norm(images.channels, images.acc, norm, eps).columns(columns);
  const Scratch scratch(most * images.width * images.channels, conv_out.scalar_type());
  bands.each(images.count, [&](const Band& band) {
    const int64_t first = std::max<int64_t>(2 * band.first - 1, 0), last = std::min(2 * band.last, images.height);
    const Plan plan = images.plan(last - first);
    ApplyArgs args;
    args.x = at_byte(conv_out, images.offset(band.image, first));
    args.y = scratch.mine();
    args.params = params;
    args.relu = true;
    kernels().apply[images.dtype](plan, args, 0, plan.items);
    MaxPoolArgs pool = images.args(y, index, band.image);
    pool.x = args.y;
    pool.first_row = first;
    kernels().max_pool[images.dtype](pool, band.first, band.last);
  });
  return {y, index};
}

std::tuple<Tensor, Tensor> bn_max_pool_backward_reduce(
    const Tensor& dy, const Tensor& index, const Tensor& conv_out, const NormTensors& norm, double eps) {
  const OpGuard guard;
  const Backward backward(dy, index, conv_out, norm, eps);
  const Images& images = backward.images;
  const int64_t channels = images.channels, bands = images.count * backward.bands.in_image;
  const Tensor sums = at::empty({bands, 2, channels}, at::kDouble);
  backward.each([&](int64_t number, const Plan& plan, int64_t, BackwardArgs& args) {
    std::vector<double> partials(2 * plan.chunks * plan.width);
    args.sum_dz = partials.data();
    args.sum_dzx = args.sum_dz + plan.chunks * plan.width;
    kernels().backward_reduce[images.dtype](plan, args, 0, plan.items);
    double* out = sums.mutable_data_ptr<double>() + number * 2 * channels;
    merge(plan, out, [&](double, int64_t i, int64_t) { return args.sum_dz[i]; });
    merge(plan, out + channels, [&](double, int64_t i, int64_t) { return args.sum_dzx[i]; });
  });
  const Tensor total = at::zeros({2, channels}, at::kDouble);
  double* out = total.mutable_data_ptr<double>();
  const double* from = sums.const_data_ptr<double>();
  for (int64_t band = 0; band < bands; ++band) {
    for (int64_t i = 0; i < 2 * channels; ++i) out[i] += from[band * 2 * channels + i];
  }
  const Tensor merged = total.to(images.acc);
  return {merged.select(0, 0).clone(), merged.select(0, 1).clone()};
}

Tensor bn_max_pool_backward_apply(
    const Tensor& dy, const Tensor& index, const Tensor& conv_out, const NormTensors& norm, double eps,
    const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx) {
  const OpGuard guard;
  const Backward backward(dy, index, conv_out, norm, eps, mean_dz, mean_dzx);
  const Tensor dconv_out = at::empty_like(conv_out);
  const Kernels& k = kernels();
  backward.each([&](int64_t, const Plan& plan, int64_t offset, BackwardArgs& args) {
    args.dx = static_cast<char*>(dconv_out.mutable_data_ptr()) + offset;
    const auto& kernel = args.params.mean_dz == nullptr ? k.backward_apply_eval : k.backward_apply_train;
    kernel[backward.images.dtype](plan, args, 0, plan.items);
  });
  return dconv_out;
}

}  // namespace resnet_fast::cpu
