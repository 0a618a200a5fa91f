// What every op around a batch norm shares: tensors as the kernels of kernels.h want them, and merged partial sums.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "kernels.h"
#include "shared_items.h"

namespace resnet_fast::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using NormTensors = c10::List<OptionalTensor>;  // mean, var, weight, bias; empty for no norm

DType dtype_index(const Tensor& x);

// The type of statistics and sums: double for double, else float.
at::ScalarType acc_type_of(const Tensor& x);

struct Problem {
  Tensor x;  // dense in `format`
  at::MemoryFormat format;
  DType dtype;
  at::ScalarType acc;
  Plan plan;
  int64_t channels;
  double count;  // values per channel
};

Problem make_problem(const Tensor& x);

// t with x's dtype and element order.
Tensor like_x(const Problem& p, const Tensor& t, const char* name);

// A per-channel argument in the accumulation type; undefined if absent.
Tensor channel_param(int64_t channels, at::ScalarType acc, const OptionalTensor& t, const char* name);

inline double value_at(const Tensor& param, int64_t channel, double if_absent) {
  if (!param.defined()) return if_absent;
  return param.scalar_type() == at::kDouble ? param.const_data_ptr<double>()[channel]
                                            : param.const_data_ptr<float>()[channel];
}

// The kernels' per-column arrays, in one buffer. They serve every plan of these channels that is not wider.
class Columns {
 public:
  Columns(const Plan& plan, int64_t rows, at::ScalarType acc)
      : channels_(plan.channels), width_(plan.width), buffer_(at::empty({rows, plan.width + kLanePadding}, acc)) {}

  template <typename F>
  const void* fill(int64_t row, const F& value_of_channel) {
    const int64_t offset = row * buffer_.size(1);
    if (buffer_.scalar_type() == at::kDouble) {
      return fill_from(buffer_.mutable_data_ptr<double>() + offset, value_of_channel);
    }
    return fill_from(buffer_.mutable_data_ptr<float>() + offset, value_of_channel);
  }

 private:
  template <typename T, typename F>
  const void* fill_from(T* column, const F& value) const {
    for (int64_t c = 0; c < channels_; ++c) column[c] = static_cast<T>(value(c));
    int64_t filled = channels_;
    for (; filled < width_; filled += channels_) std::copy_n(column, channels_, column + filled);
    std::fill_n(column + filled, kLanePadding, T(0));
    return column;
  }

  int64_t channels_, width_;
  Tensor buffer_;
};

// weight, bias, mean and var of a call, and what the kernels want to know of them.
struct Norm {
  static constexpr int64_t kColumns = 3;  // that columns() fills

  Tensor weight, bias, mean, var;
  double eps;

  double rstd(int64_t c) const { return 1 / std::sqrt(value_at(var, c, 0) + eps); }
  double scale(int64_t c) const { return rstd(c) * value_at(weight, c, 1); }

  ColumnParams columns(Columns& buffer, int64_t row = 0) const {
    ColumnParams out;
    out.mean = buffer.fill(row, [&](int64_t c) { return value_at(mean, c, 0); });
    out.scale = buffer.fill(row + 1, [&](int64_t c) { return scale(c); });
    out.bias = buffer.fill(row + 2, [&](int64_t c) { return value_at(bias, c, 0); });
    return out;
  }
};

Norm make_norm(
    int64_t channels, at::ScalarType acc, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean,
    const Tensor& var, double eps);

// From the ops' list of mean, var, weight, bias; none from an empty list.
std::optional<Norm> make_norm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps);
Norm required_norm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps);

// The columns of a norm that is pending on rows of `channels` values; null where there is none.
class PendingNorm {
 public:
  PendingNorm(int64_t channels, at::ScalarType acc, const NormTensors& tensors, double eps);
  ColumnParams params;

 private:
  std::optional<Columns> columns_;
};

// What the gradient needs of a norm: with the means of dz and of dz * (x - mean), that of batch statistics.
constexpr int64_t kBackwardColumns = Norm::kColumns + 2;
ColumnParams backward_params(
    const Norm& norm, Columns& columns, const OptionalTensor& mean_dz, const OptionalTensor& mean_dzx);

template <typename F>
void for_items(const Plan& plan, const F& f) {
  share_pieces(plan.items, piece_of(plan.items, plan.grain), f);
}

// y = act(norm(x) + residual), or + residual_norm(residual).
void apply(
    const Problem& p, const Norm& norm, const OptionalTensor& residual, const std::optional<Norm>& residual_norm,
    bool relu, const Tensor& y);

// f(values in the chunk, repeats of the channels in it, its offset in the partial sums) for every chunk, in order.
template <typename F>
void for_chunks(const Plan& plan, const F& f) {
  for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
    const int64_t offset = chunk * plan.width;
    if (!plan.rows_layout) {
      const int64_t image = (chunk / plan.plane_blocks) * plan.batch_block;
      const int64_t pixel = (chunk % plan.plane_blocks) * plan.plane_block;
      f(std::min(plan.batch_block, plan.batch - image) * std::min(plan.plane_block, plan.plane - pixel), 1, offset);
    } else if (chunk == plan.row_blocks) {
      f(plan.tail_rows, 1, offset);
    } else {
      f(std::min(plan.row_block, plan.rows - chunk * plan.row_block), plan.repeat, offset);
    }
  }
}

// out[c] = sum of term(values, index of a partial of channel c, c) in fixed order, in double.
template <typename F>
void merge(const Plan& plan, double* out, const F& term) {
  const int64_t grain = std::max<int64_t>(1, 32768 / (plan.chunks * plan.repeat));
  at::parallel_for(0, plan.channels, grain, [&](int64_t begin, int64_t end) {
    std::fill(out + begin, out + end, 0.0);
    for_chunks(plan, [&](int64_t values, int64_t repeats, int64_t offset) {
      for (int64_t r = 0; r < repeats; ++r) {
        const int64_t partial = offset + r * plan.channels;
        for (int64_t c = begin; c < end; ++c) out[c] += term(static_cast<double>(values), partial + c, c);
      }
    });
  });
}

// A plan's partial moments (`stats` of kernels.h) as one mean and one centred sum of squares per channel.
void merge_moments(
    const Plan& plan, double count, const double* part_mean, const double* part_m2, double* mean, double* m2);

// Partial sums [2, chunks, width] and merged ones [2, channels].
struct Reduction {
  Tensor partials, merged;

  explicit Reduction(const Problem& p)
      : partials(at::empty({2, p.plan.chunks, p.plan.width}, at::kDouble)),
        merged(at::empty({2, p.channels}, at::kDouble)) {}

  double* partial(int64_t i) const { return partials.mutable_data_ptr<double>() + i * partials.stride(0); }
  double* result(int64_t i) const { return merged.mutable_data_ptr<double>() + i * merged.stride(0); }
};

// sum(dz) and sum(dz * (x - mean)) into `sums`; what else `args` asks for is written on the way.
void backward_sums(const Problem& p, BackwardArgs& args, const Reduction& sums);

// mean and biased variance per channel, in the accumulation type.
std::tuple<Tensor, Tensor> batch_stats(const Problem& p);

}  // namespace resnet_fast::cpu
