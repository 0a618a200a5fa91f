// Rows for a matrix product: activated where a batch norm is pending, less a value per column, in the accumulation type.
#include "blocks.h"
#include "kernels.h"
#include "normalize.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

template <typename scalar_t, bool normed>
struct CentreOp {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  struct Params {
    L mean, scale, bias, shift;
  };

  const scalar_t* x;
  acc_t* y;
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* bias;
  const acc_t* shift;

  explicit CentreOp(const CentreArgs& args)
      : x(static_cast<const scalar_t*>(args.x)),
        y(static_cast<acc_t*>(args.y)),
        mean(static_cast<const acc_t*>(args.params.mean)),
        scale(static_cast<const acc_t*>(args.params.scale)),
        bias(static_cast<const acc_t*>(args.params.bias)),
        shift(static_cast<const acc_t*>(args.shift)) {}

  C10_ALWAYS_INLINE Params at(int64_t column) const {
    Params p;
    if constexpr (normed) {
      p.mean = L::load_acc(mean + column);
      p.scale = L::load_acc(scale + column);
      p.bias = L::load_acc(bias + column);
    }
    p.shift = L::load_acc(shift + column);
    return p;
  }

  C10_ALWAYS_INLINE void fetch(int64_t offset) const { fetch_to_read(x + offset); }

  template <typename Span>
  C10_ALWAYS_INLINE void map(int64_t offset, const Params& p, Span span) const {
    L value = L::load(x + offset, span);
    if constexpr (normed) value = relu(normalize(value, p.mean, p.scale, p.bias)).rounded();
    (value - p.shift).store_acc(y + offset, span);
  }
};

template <typename scalar_t, bool normed>
void centre_items(const Plan& plan, const CentreArgs& args, int64_t begin, int64_t end) {
  const CentreOp<scalar_t, normed> op(args);
  for (int64_t item = begin; item < end; ++item) map_rows<scalar_t>(rows_block(plan, item), op);
}

}  // namespace

template <typename scalar_t>
void centre(const Plan& plan, const CentreArgs& args, int64_t begin, int64_t end) {
  if (args.params.scale != nullptr) {
    centre_items<scalar_t, true>(plan, args, begin, end);
  } else {
    centre_items<scalar_t, false>(plan, args, begin, end);
  }
}

template void centre<float>(const Plan&, const CentreArgs&, int64_t, int64_t);
template void centre<double>(const Plan&, const CentreArgs&, int64_t, int64_t);
template void centre<c10::BFloat16>(const Plan&, const CentreArgs&, int64_t, int64_t);
template void centre<c10::Half>(const Plan&, const CentreArgs&, int64_t, int64_t);

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
