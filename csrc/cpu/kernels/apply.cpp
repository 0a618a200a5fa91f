// y = act((x - mean) * scale + bias + residual) in one pass, in place over x if wanted.
#include "blocks.h"
#include "kernels.h"
#include "normalize.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

template <typename scalar_t, bool with_relu, bool with_residual>
struct ApplyOp {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  struct Params {
    L mean, scale, bias;
  };

  const scalar_t* x;
  const scalar_t* residual;
  scalar_t* y;
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* bias;

  explicit ApplyOp(const ApplyArgs& args)
      : x(static_cast<const scalar_t*>(args.x)),
        residual(static_cast<const scalar_t*>(args.residual)),
        y(static_cast<scalar_t*>(args.y)),
        mean(static_cast<const acc_t*>(args.params.mean)),
        scale(static_cast<const acc_t*>(args.params.scale)),
        bias(static_cast<const acc_t*>(args.params.bias)) {}

  C10_ALWAYS_INLINE Params at(int64_t column) const {
    return {L::load_acc(mean + column), L::load_acc(scale + column), L::load_acc(bias + column)};
  }
  C10_ALWAYS_INLINE Params splat(int64_t channel) const {
    return {L::fill(mean[channel]), L::fill(scale[channel]), L::fill(bias[channel])};
  }

  C10_ALWAYS_INLINE void fetch(int64_t offset) const {
    fetch_to_read(x + offset);
    if constexpr (with_residual) fetch_to_read(residual + offset);
    fetch_to_write(y + offset);
  }

  template <typename Span>
  C10_ALWAYS_INLINE void map(int64_t offset, const Params& p, Span span) const {
    L out = normalize(L::load(x + offset, span), p.mean, p.scale, p.bias);
    if constexpr (with_residual) out = out + L::load(residual + offset, span);
    if constexpr (with_relu) out = relu(out);
    out.store(y + offset, span);
  }
};

}  // namespace

template <typename scalar_t>
void apply(const Plan& plan, const ApplyArgs& args, int64_t begin, int64_t end) {
  if (args.relu && args.residual != nullptr) {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, true, true>(args), begin, end);
  } else if (args.relu) {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, true, false>(args), begin, end);
  } else if (args.residual != nullptr) {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, false, true>(args), begin, end);
  } else {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, false, false>(args), begin, end);
  }
}

template void apply<float>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<double>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<c10::BFloat16>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<c10::Half>(const Plan&, const ApplyArgs&, int64_t, int64_t);

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
