// y = act((x - mean) * scale + bias + residual) in one pass, in place over x if wanted; the residual may have a batch
// norm of its own.
#include "blocks.h"
#include "kernels.h"
#include "normalize.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

enum class Residual { none, plain, normed };

template <typename scalar_t, bool with_relu, Residual residual_kind>
struct ApplyOp {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  struct Params {
    L mean, scale, bias, residual_mean, residual_scale, residual_bias;
  };

  const scalar_t* x;
  const scalar_t* residual;
  scalar_t* y;
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* bias;
  const acc_t* residual_mean;
  const acc_t* residual_scale;
  const acc_t* residual_bias;

  explicit ApplyOp(const ApplyArgs& args)
      : x(static_cast<const scalar_t*>(args.x)),
        residual(static_cast<const scalar_t*>(args.residual)),
        y(static_cast<scalar_t*>(args.y)),
        mean(static_cast<const acc_t*>(args.params.mean)),
        scale(static_cast<const acc_t*>(args.params.scale)),
        bias(static_cast<const acc_t*>(args.params.bias)),
        residual_mean(static_cast<const acc_t*>(args.residual_params.mean)),
        residual_scale(static_cast<const acc_t*>(args.residual_params.scale)),
        residual_bias(static_cast<const acc_t*>(args.residual_params.bias)) {}

  C10_ALWAYS_INLINE Params at(int64_t column) const {
    return params([column](const acc_t* values) RF_INLINE_LAMBDA { return L::load_acc(values + column); });
  }
  C10_ALWAYS_INLINE Params splat(int64_t channel) const {
    return params([channel](const acc_t* values) RF_INLINE_LAMBDA { return L::fill(values[channel]); });
  }

  C10_ALWAYS_INLINE void fetch(int64_t offset) const {
    fetch_to_read(x + offset);
    if constexpr (residual_kind != Residual::none) fetch_to_read(residual + offset);
    fetch_to_write(y + offset);
  }

  template <typename Span>
  C10_ALWAYS_INLINE void map(int64_t offset, const Params& p, Span span) const {
    L out = normalize(L::load(x + offset, span), p.mean, p.scale, p.bias);
    if constexpr (residual_kind == Residual::plain) {
      out = out + L::load(residual + offset, span);
    } else if constexpr (residual_kind == Residual::normed) {
      out = out + normalize(L::load(residual + offset, span), p.residual_mean, p.residual_scale, p.residual_bias);
    }
    if constexpr (with_relu) out = relu(out);
    out.store(y + offset, span);
  }

 private:
  template <typename F>
  C10_ALWAYS_INLINE Params params(const F& read) const {
    Params p;
    p.mean = read(mean);
    p.scale = read(scale);
    p.bias = read(bias);
    if constexpr (residual_kind == Residual::normed) {
      p.residual_mean = read(residual_mean);
      p.residual_scale = read(residual_scale);
      p.residual_bias = read(residual_bias);
    }
    return p;
  }
};

template <typename scalar_t, bool with_relu>
void apply_items(const Plan& plan, const ApplyArgs& args, int64_t begin, int64_t end) {
  if (args.residual == nullptr) {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, with_relu, Residual::none>(args), begin, end);
  } else if (args.residual_params.mean == nullptr) {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, with_relu, Residual::plain>(args), begin, end);
  } else {
    map_items<scalar_t>(plan, ApplyOp<scalar_t, with_relu, Residual::normed>(args), begin, end);
  }
}

}  // namespace

template <typename scalar_t>
void apply(const Plan& plan, const ApplyArgs& args, int64_t begin, int64_t end) {
  if (args.relu) {
    apply_items<scalar_t, true>(plan, args, begin, end);
  } else {
    apply_items<scalar_t, false>(plan, args, begin, end);
  }
}

template void apply<float>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<double>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<c10::BFloat16>(const Plan&, const ApplyArgs&, int64_t, int64_t);
template void apply<c10::Half>(const Plan&, const ApplyArgs&, int64_t, int64_t);

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
