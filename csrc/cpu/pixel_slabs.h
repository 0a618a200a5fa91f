// What 1x1 convolutions in training are made of. The pixels are cut into slabs that stay in a core's cache from the first
// pass over them to the last: activation, product, statistics or epilogue. Threads take slabs; inside, PyTorch's products run
// on one thread. Slabs depend on shapes only and their sums are merged in a fixed order, so no bit depends on the number of
// threads.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "bn.h"
#include "guards.h"
#include "scratch.h"
#include "shared_items.h"

namespace resnet_fast::cpu::pixel_slabs {

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
inline int64_t longest_sum(int64_t rows) { return std::clamp(rows / kEvenSlabs, kMinSummed, kMaxSummed); }

// Worker threads start with a dispatch state of their own.
template <typename F>
void for_slabs(int64_t begin, int64_t end, const F& f) {
  share_items(end - begin, [&](const auto& take) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
    take([&](int64_t i) { f(begin + i); });
  });
}

inline Tensor matrix(const void* data, int64_t rows, int64_t cols, at::ScalarType dtype) {
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
inline void sum_rows(const Slab& slab, int64_t columns, DType dtype, const void* rows, const void* zeros, double* out) {
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

}  // namespace resnet_fast::cpu::pixel_slabs
