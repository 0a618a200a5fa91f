// Gradients of bn_act: the reduction over each channel, then the input's gradient.
//
// dz is dy where the ReLU let the value through. The mask is recomputed from x, or read from the saved y when a
// residual took part; the reduction can leave dz behind (it is the residual's gradient), and then the second pass
// reads that instead of dy and the mask.
#include "blocks.h"
#include "kernels.h"
#include "normalize.h"

namespace resnet_fast::cpu {
namespace CPU_CAPABILITY {

namespace {

template <typename scalar_t, Mask mask, bool training>
struct BackwardOp {
  using L = Lanes<scalar_t>;
  using acc_t = acc_type<scalar_t>;
  struct Params {
    L mean, scale, bias, mean_dz, mean_dzx;
  };

  const scalar_t* dy;
  const scalar_t* x;
  const scalar_t* y;
  scalar_t* dz;
  scalar_t* dx;
  const acc_t* mean;
  const acc_t* scale;
  const acc_t* bias;
  const acc_t* mean_dz;
  const acc_t* mean_dzx;

  explicit BackwardOp(const BackwardArgs& args)
      : dy(static_cast<const scalar_t*>(args.dy)),
        x(static_cast<const scalar_t*>(args.x)),
        y(static_cast<const scalar_t*>(args.y)),
        dz(static_cast<scalar_t*>(args.dz)),
        dx(static_cast<scalar_t*>(args.dx)),
        mean(static_cast<const acc_t*>(args.params.mean)),
        scale(static_cast<const acc_t*>(args.params.scale)),
        bias(static_cast<const acc_t*>(args.params.bias)),
        mean_dz(static_cast<const acc_t*>(args.params.mean_dz)),
        mean_dzx(static_cast<const acc_t*>(args.params.mean_dzx)) {}

  C10_ALWAYS_INLINE Params at(int64_t column) const {
    Params p;
    p.mean = L::load_acc(mean + column);
    p.scale = L::load_acc(scale + column);
    if constexpr (mask == Mask::from_x) p.bias = L::load_acc(bias + column);
    if constexpr (training) {
      p.mean_dz = L::load_acc(mean_dz + column);
      p.mean_dzx = L::load_acc(mean_dzx + column);
    }
    return p;
  }
  C10_ALWAYS_INLINE Params splat(int64_t channel) const {
    Params p;
    p.mean = L::fill(mean[channel]);
    p.scale = L::fill(scale[channel]);
    if constexpr (mask == Mask::from_x) p.bias = L::fill(bias[channel]);
    if constexpr (training) {
      p.mean_dz = L::fill(mean_dz[channel]);
      p.mean_dzx = L::fill(mean_dzx[channel]);
    }
    return p;
  }

  C10_ALWAYS_INLINE void fetch(int64_t offset) const {
    fetch_to_read(dy + offset);
    fetch_to_read(x + offset);
    if constexpr (mask == Mask::from_y) fetch_to_read(y + offset);
    if (dz != nullptr) fetch_to_write(dz + offset);
    if (dx != nullptr) fetch_to_write(dx + offset);
  }

  template <typename Span>
  C10_ALWAYS_INLINE L masked_dy(int64_t offset, const Params& p, const L& x_value, Span span) const {
    const L grad = L::load(dy + offset, span);
    if constexpr (mask == Mask::from_x) {
      return masked(grad, normalize(x_value, p.mean, p.scale, p.bias), rounds_to_zero<scalar_t>());
    } else if constexpr (mask == Mask::from_y) {
      return masked(grad, L::load(y + offset, span), acc_t(0));
    } else {
      return grad;
    }
  }

  template <typename Span>
  C10_ALWAYS_INLINE void reduce(int64_t offset, const Params& p, Sums<scalar_t>& sums, Span span) const {
    const L x_value = L::load(x + offset, span);
    const L grad = masked_dy(offset, p, x_value, span);
    if (dz != nullptr) grad.store(dz + offset, span);
    if (dx != nullptr) (p.scale * grad).store(dx + offset, span);
    sums.first = sums.first + grad;
    sums.second = fmadd(grad, x_value - p.mean, sums.second);
  }

  template <typename Span>
  C10_ALWAYS_INLINE void map(int64_t offset, const Params& p, Span span) const {
    if constexpr (training) {
      const L x_value = L::load(x + offset, span);
      const L grad = masked_dy(offset, p, x_value, span);
      const L zero = L::fill(0);
      const L centred = grad - p.mean_dz;
      (p.scale * fmadd(zero - (x_value - p.mean), p.mean_dzx, centred)).store(dx + offset, span);
    } else {
      L x_value;
      if constexpr (mask == Mask::from_x) x_value = L::load(x + offset, span);
      const L grad = masked_dy(offset, p, x_value, span);
      if (dz != nullptr) grad.store(dz + offset, span);
      if (dx != nullptr) (p.scale * grad).store(dx + offset, span);
    }
  }
};

template <typename scalar_t, typename Op>
void reduce_items(const Plan& plan, const BackwardArgs& args, const Op& op, int64_t begin, int64_t end) {
  using acc_t = acc_type<scalar_t>;
  alignas(64) acc_t first[kScratch];
  alignas(64) acc_t second[kScratch];
  for (int64_t item = begin; item < end; ++item) {
    if (plan.rows_layout) {
      const RowsBlock block = rows_block(plan, item);
      reduce_rows<scalar_t>(block, op, first, second);
      for (int64_t col = 0; col < block.cols; ++col) {
        args.sum_dz[block.partial + col] = first[col];
        args.sum_dzx[block.partial + col] = second[col];
      }
    } else {
      const PlanesBlock block = planes_block(plan, item);
      reduce_planes<scalar_t>(block, op, args.sum_dz[block.partial], args.sum_dzx[block.partial]);
    }
  }
}

// f(std::integral_constant<Mask, mask>) for the mask known at run time.
template <typename F>
void with_mask(Mask mask, const F& f) {
  switch (mask) {
    case Mask::none:
      return f(std::integral_constant<Mask, Mask::none>{});
    case Mask::from_x:
      return f(std::integral_constant<Mask, Mask::from_x>{});
    case Mask::from_y:
      return f(std::integral_constant<Mask, Mask::from_y>{});
  }
}

}  // namespace

template <typename scalar_t>
void backward_reduce(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end) {
  with_mask(args.mask, [&](auto mask) {
    reduce_items<scalar_t>(plan, args, BackwardOp<scalar_t, decltype(mask)::value, false>(args), begin, end);
  });
}

template <typename scalar_t>
void backward_apply_train(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end) {
  with_mask(args.mask, [&](auto mask) {
    map_items<scalar_t>(plan, BackwardOp<scalar_t, decltype(mask)::value, true>(args), begin, end);
  });
}

template <typename scalar_t>
void backward_apply_eval(const Plan& plan, const BackwardArgs& args, int64_t begin, int64_t end) {
  with_mask(args.mask, [&](auto mask) {
    map_items<scalar_t>(plan, BackwardOp<scalar_t, decltype(mask)::value, false>(args), begin, end);
  });
}

#define RF_INSTANTIATE(scalar_t)                                                                       \
  template void backward_reduce<scalar_t>(const Plan&, const BackwardArgs&, int64_t, int64_t);         \
  template void backward_apply_train<scalar_t>(const Plan&, const BackwardArgs&, int64_t, int64_t);    \
  template void backward_apply_eval<scalar_t>(const Plan&, const BackwardArgs&, int64_t, int64_t);
RF_INSTANTIATE(float)
RF_INSTANTIATE(double)
RF_INSTANTIATE(c10::BFloat16)
RF_INSTANTIATE(c10::Half)

}  // namespace CPU_CAPABILITY
}  // namespace resnet_fast::cpu
