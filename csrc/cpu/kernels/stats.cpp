// Batch statistics, first stage: per chunk and column the mean and the centred sum of squares, in one read of x.
//
// Sums are taken of x - shift, where shift is the mean of the chunk's first values: that keeps them as accurate as a
// two-pass computation when |mean| is far larger than the standard deviation.
#include <cmath>

#include "blocks.h"
#include "kernels.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

constexpr int64_t kShiftSamples = 8;

template <typename scalar_t>
struct StatsOp {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  struct Params {
    L shift;
  };

  const scalar_t* x;
  const acc_t* shift;  // of the block's first column; one value in planes layout

  C10_ALWAYS_INLINE Params at(int64_t column) const { return {L::load_acc(shift + column)}; }
  C10_ALWAYS_INLINE Params splat(int64_t) const { return {L::fill(*shift)}; }

  C10_ALWAYS_INLINE void fetch(int64_t offset) const { fetch_to_read(x + offset); }

  template <typename Span>
  C10_ALWAYS_INLINE void reduce(int64_t offset, const Params& p, Sums<scalar_t>& sums, Span span) const {
    const L centred = (L::load(x + offset, span) - p.shift).keep(span);
    sums.first = sums.first + centred;
    sums.second = fmadd(centred, centred, sums.second);
  }
};

// An infinite shift would turn an infinite mean into NaN; without a shift both come out as PyTorch has them.
template <typename acc_t>
acc_t usable(acc_t shift) {
  return std::isfinite(shift) ? shift : acc_t(0);
}

void finish(double shift, double sum, double sum_squares, double count, double* mean, double* m2) {
  *mean = shift + sum / count;
  const double centred = sum_squares - sum * sum / count;
  *m2 = centred < 0 ? 0 : centred;  // rounding; NaN stays
}

template <typename scalar_t>
void stats_rows(RowsBlock block, const StatsArgs& args) {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  const auto* x = static_cast<const scalar_t*>(args.x);
  alignas(64) acc_t shift[kScratch];
  alignas(64) acc_t first[kScratch];
  alignas(64) acc_t second[kScratch];

  const int64_t samples = smaller(block.rows, kShiftSamples);
  for_each_vector<L::size>(block.cols, [&](int64_t col, auto span) RF_INLINE_LAMBDA {
    L sum = L::fill(0);
    for (int64_t i = 0; i < samples; ++i) sum = sum + L::load(x + block.offset + i * block.stride + col, span);
    (sum * L::fill(acc_t(1) / acc_t(samples))).store_acc(shift + col);
  });
  for (int64_t col = 0; col < block.cols; ++col) shift[col] = usable(shift[col]);

  block.column = 0;  // the only parameter, shift, starts at this block
  reduce_rows<scalar_t>(block, StatsOp<scalar_t>{x, shift}, first, second);
  for (int64_t col = 0; col < block.cols; ++col) {
    finish(shift[col], first[col], second[col], static_cast<double>(block.rows), args.mean + block.partial + col,
           args.m2 + block.partial + col);
  }
}

template <typename scalar_t>
void stats_planes(const PlanesBlock& block, const StatsArgs& args) {
  using acc_t = acc_type<scalar_t>;
  const auto* x = static_cast<const scalar_t*>(args.x);
  // A few values from each of the first planes: a plane's corner alone may be padding.
  const int64_t planes = smaller(block.planes, kShiftSamples);
  const int64_t values = smaller(block.size, kShiftSamples);
  acc_t shift = 0;
  for (int64_t plane = 0; plane < planes; ++plane) {
    for (int64_t i = 0; i < values; ++i) {
      shift += static_cast<acc_t>(x[block.offset + plane * block.stride + i * (block.size / values)]);
    }
  }
  shift = usable(shift / static_cast<acc_t>(planes * values));

  double first = 0;
  double second = 0;
  reduce_planes<scalar_t>(block, StatsOp<scalar_t>{x, &shift}, first, second);
  finish(shift, first, second, static_cast<double>(block.planes * block.size), args.mean + block.partial,
         args.m2 + block.partial);
}

}  // namespace

template <typename scalar_t>
void stats(const Plan& plan, const StatsArgs& args, int64_t begin, int64_t end) {
  for (int64_t item = begin; item < end; ++item) {
    if (plan.rows_layout) {
      stats_rows<scalar_t>(rows_block(plan, item), args);
    } else {
      stats_planes<scalar_t>(planes_block(plan, item), args);
    }
  }
}

template void stats<float>(const Plan&, const StatsArgs&, int64_t, int64_t);
template void stats<double>(const Plan&, const StatsArgs&, int64_t, int64_t);
template void stats<c10::BFloat16>(const Plan&, const StatsArgs&, int64_t, int64_t);
template void stats<c10::Half>(const Plan&, const StatsArgs&, int64_t, int64_t);

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
