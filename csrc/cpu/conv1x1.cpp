// The pixels are cut into slabs that stay in a core's cache from the first pass over them to the last: activation,
// product, statistics or epilogue. Threads take slabs; inside, PyTorch's products run on one thread. Slabs depend on
// shapes only and their sums are merged in a fixed order, so no bit depends on the number of threads.
#include "conv1x1.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <cstring>
#include <vector>

#include "guards.h"
#include "scratch.h"

namespace resnet_fast::cpu {

namespace {

constexpr int64_t kSlabBytes = 768 * 1024;  // of a slab's input and output
constexpr int64_t kMinSlab = 256;           // rows; fewer, and packing the weight for the product shows
constexpr int64_t kMaxSlab = 1024;
// Rows that are summed over: of more, the library's order of sums depends on how many threads call it side by side.
constexpr int64_t kMaxSummed = 256;
constexpr int64_t kMinSummed = 32;    // where there are few, a chain of sums is kept as short as PyTorch's
constexpr int64_t kEvenSlabs = 16;    // as many or fewer are a power of two, which divides evenly among threads
constexpr int64_t kGroups = 16;       // of slabs, each with its partial product
constexpr int64_t kShiftPixels = 64;  // whose mean is near enough to the mean for sums of squares not to cancel

struct Slab {
  int64_t number, first, rows;
};

struct Slabs {
  int64_t rows, step, count;

  Slabs(int64_t rows, int64_t row_bytes, int64_t longest = kMaxSlab) : rows(rows) {
    const int64_t most = std::clamp(kSlabBytes / row_bytes, std::min(kMinSlab, longest), longest);
    // Two at least: a single one would leave the threads to the library, and the order of its sums with them.
    for (count = 2; count < kEvenSlabs && count * most < rows;) count *= 2;
    count = std::max(count, (rows + most - 1) / most);
    step = (rows + count - 1) / count;
    count = (rows + step - 1) / step;
  }

  Slab at(int64_t number) const { return {number, number * step, std::min(step, rows - number * step)}; }
};

// The longest slab whose rows are summed over.
int64_t longest_sum(int64_t rows) { return std::clamp(rows / kEvenSlabs, kMinSummed, kMaxSummed); }

// Worker threads start with a dispatch state of their own.
template <typename F>
void for_slabs(int64_t begin, int64_t end, const F& f) {
  at::parallel_for(begin, end, 1, [&](int64_t first, int64_t last) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
    for (int64_t i = first; i < last; ++i) f(i);
  });
}

Tensor matrix(const void* data, int64_t rows, int64_t cols, at::ScalarType dtype) {
  return at::from_blob(const_cast<void*>(data), {rows, cols}, at::TensorOptions(dtype));
}

// The pixels that a 1x1 convolution reads, and the batch norm and ReLU pending on them.
class Pixels {
 public:
  Pixels(const Tensor& x, const NormTensors& norm, double eps, at::IntArrayRef stride)
      : dtype(dtype_index(x)), scalar(x.scalar_type()), acc(acc_type_of(x)), channels(x.size(1)) {
    TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x: expected a 4-D tensor that is not empty, got ", x.sizes());
    TORCH_CHECK(
        x.device().is_cpu() && x.is_contiguous(at::MemoryFormat::ChannelsLast),
        "x: expected a CPU tensor in channels_last, got strides ", x.strides());
    TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "stride: expected two numbers, got ", stride);
    x_ = x;
    down_ = stride[0], right_ = stride[1];
    height = (x.size(2) + down_ - 1) / down_, width = (x.size(3) + right_ - 1) / right_;
    rows = x.size(0) * height * width;
    norm_ = make_norm(channels, acc, norm, eps);
  }

  bool strided() const { return down_ != 1 || right_ != 1; }
  bool plain() const { return !strided() && !norm_.has_value(); }
  int64_t row_bytes() const { return channels * static_cast<int64_t>(c10::elementSize(scalar)); }
  int64_t images() const { return x_.size(0); }

  // Before the others: columns for slabs of at most so many rows. shift: (C,), or undefined for none.
  void prepare(int64_t most_rows, const Tensor& shift) {
    columns_.emplace(make_plan(1, channels, most_rows, true), Norm::kColumns + 1, acc);
    if (norm_.has_value()) params_ = norm_->columns(*columns_);
    shift_ = columns_->fill(Norm::kColumns, [&](int64_t c) { return value_at(shift, c, 0); });
  }

  // act(x), in scratch or where it is.
  const void* activated(const Slab& slab, void* scratch) const {
    const void* source = gathered(slab, scratch);
    if (!norm_.has_value()) return source;
    const Plan plan = make_plan(1, channels, slab.rows, true);
    ApplyArgs args;
    args.x = source;
    args.y = scratch;
    args.params = params_;
    args.relu = true;
    kernels().apply[dtype](plan, args, 0, plan.items);
    return scratch;
  }

  // act(x) - shift into y, in the accumulation type. gather: as large as the slab where strided.
  void centred(const Slab& slab, void* gather, void* y) const {
    const Plan plan = make_plan(1, channels, slab.rows, true);
    CentreArgs args;
    args.x = gathered(slab, gather);
    args.y = y;
    args.params = params_;
    args.shift = shift_;
    kernels().centre[dtype](plan, args, 0, plan.items);
  }

  // The byte at which a row's pixel starts in x.
  int64_t offset(int64_t row) const {
    const int64_t image = row / (height * width), down = row / width % height, right = row % width;
    return ((image * x_.size(2) + down * down_) * x_.size(3) + right * right_) * row_bytes();
  }

  const DType dtype;
  const at::ScalarType scalar, acc;
  const int64_t channels;
  int64_t height, width, rows;

 private:
  const void* gathered(const Slab& slab, void* scratch) const {
    const char* x = static_cast<const char*>(x_.const_data_ptr());
    if (!strided()) return x + slab.first * row_bytes();
    char* to = static_cast<char*>(scratch);
    for (int64_t row = 0; row < slab.rows; ++row, to += row_bytes()) {
      std::memcpy(to, x + offset(slab.first + row), row_bytes());
    }
    return scratch;
  }

  Tensor x_;
  int64_t down_, right_;
  std::optional<Norm> norm_;
  std::optional<Columns> columns_;
  ColumnParams params_;
  const void* shift_ = nullptr;
};

// A mean and a centred sum of squares a slab and column, [slabs, columns].
struct Moments {
  int64_t columns;
  Tensor buffer;

  Moments(const Slabs& slabs, int64_t columns)
      : columns(columns), buffer(at::empty({2, slabs.count, columns}, at::kDouble)) {}

  double* mean(int64_t slab) const { return buffer.mutable_data_ptr<double>() + slab * columns; }
  double* m2(int64_t slab) const { return mean(slab) + buffer.stride(0); }

  void add(const Slab& slab, DType dtype, const void* rows) const {
    const Plan plan = make_plan(1, columns, slab.rows, true);
    std::vector<double> partials(2 * plan.chunks * plan.width);
    StatsArgs args;
    args.x = rows;
    args.mean = partials.data();
    args.m2 = args.mean + plan.chunks * plan.width;
    kernels().stats[dtype](plan, args, 0, plan.items);
    merge_moments(plan, static_cast<double>(slab.rows), args.mean, args.m2, mean(slab.number), m2(slab.number));
  }

  // mean and m2 over all slabs, [2, columns]
  Tensor merged(const Slabs& slabs) const {
    Tensor out = at::zeros({2, columns}, at::kDouble);
    double* total_mean = out.mutable_data_ptr<double>();
    double* total_m2 = total_mean + columns;
    for (int64_t i = 0; i < slabs.count; ++i) {
      const double share = static_cast<double>(slabs.at(i).rows) / static_cast<double>(slabs.rows);
      for (int64_t c = 0; c < columns; ++c) total_mean[c] += share * mean(i)[c];
    }
    for (int64_t i = 0; i < slabs.count; ++i) {
      const double values = static_cast<double>(slabs.at(i).rows);
      for (int64_t c = 0; c < columns; ++c) {
        const double off = mean(i)[c] - total_mean[c];
        total_m2[c] += m2(i)[c] + values * off * off;
      }
    }
    return out;
  }
};

// sum of a slab's rows, by column. Not by way of a mean: where values cancel, a shift would cost accuracy.
void sum_rows(const Slab& slab, int64_t columns, DType dtype, const void* rows, const void* zeros, double* out) {
  const Plan plan = make_plan(1, columns, slab.rows, true);
  std::vector<double> partials(2 * plan.chunks * plan.width);
  BackwardArgs args;
  args.dy = args.x = rows;
  args.params.mean = args.params.scale = zeros;
  args.sum_dz = partials.data();
  args.sum_dzx = args.sum_dz + plan.chunks * plan.width;  // of no use here
  kernels().backward_reduce[dtype](plan, args, 0, plan.items);
  merge(plan, out, [&](double, int64_t i, int64_t) { return args.sum_dz[i]; });
}

// Rows of the storage type in the accumulation type.
class Widening {
 public:
  Widening(int64_t columns, int64_t most_rows, const Pixels& pixels)
      : dtype_(pixels.dtype), columns_(columns), buffer_(make_plan(1, columns, most_rows, true), 1, pixels.acc) {
    zeros_ = buffer_.fill(0, [](int64_t) { return 0.0; });
  }

  const void* zeros() const { return zeros_; }

  const void* run(const Slab& slab, const void* rows, void* wide) const {
    const Plan plan = make_plan(1, columns_, slab.rows, true);
    CentreArgs args;
    args.x = rows;
    args.y = wide;
    args.shift = zeros_;
    kernels().centre[dtype_](plan, args, 0, plan.items);
    return wide;
  }

 private:
  DType dtype_;
  int64_t columns_;
  Columns buffer_;
  const void* zeros_;
};

// Partial products [groups, rows, cols] of the accumulation type; a group takes consecutive slabs, in order.
class Products {
 public:
  Products(const Slabs& slabs, int64_t rows, int64_t cols, at::ScalarType acc)
      : slabs_(slabs), groups_(std::min(slabs.count, kGroups)), buffer_(at::empty({groups_, rows, cols}, acc)) {}

  // f(slab, the group's product, 0 where that is to be overwritten, else 1)
  template <typename F>
  void for_each_slab(const F& f) const {
    for_slabs(0, groups_, [&](int64_t group) {
      Tensor product = buffer_.select(0, group);
      const int64_t begin = group * slabs_.count / groups_, end = (group + 1) * slabs_.count / groups_;
      for (int64_t i = begin; i < end; ++i) f(slabs_.at(i), product, i == begin ? 0 : 1);
    });
  }

  // finish(sum of the groups' products, row, column) at every place, as a matrix.
  template <typename F>
  Tensor merged(const F& finish) const {
    Tensor out = at::empty({buffer_.size(1), buffer_.size(2)}, buffer_.options());
    if (out.scalar_type() == at::kDouble) {
      merge_as<double>(out, finish);
    } else {
      merge_as<float>(out, finish);
    }
    return out;
  }

 private:
  template <typename T, typename F>
  void merge_as(const Tensor& out, const F& finish) const {
    const int64_t rows = out.size(0), cols = out.size(1), size = rows * cols;
    const T* parts = buffer_.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    at::parallel_for(0, rows, std::max<int64_t>(1, 32768 / (cols * groups_)), [&](int64_t begin, int64_t end) {
      std::vector<double> sums(cols);
      for (int64_t row = begin; row < end; ++row) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t group = 0; group < groups_; ++group) {
          const T* part = parts + group * size + row * cols;
          for (int64_t col = 0; col < cols; ++col) sums[col] += static_cast<double>(part[col]);
        }
        for (int64_t col = 0; col < cols; ++col) to[row * cols + col] = static_cast<T>(finish(sums[col], row, col));
      }
    });
  }

  const Slabs& slabs_;
  int64_t groups_;
  Tensor buffer_;
};

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
