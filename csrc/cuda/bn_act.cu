// bn_act, bn_act_train, bn_act_backward on CUDA: shapes, buffers and launches around the kernels of bn_act.cuh.
//
// Compiled for sm_80 and sm_90 without spills, but NOT YET RUN ON A GPU: nothing chooses it by itself, only
// backend="native" on a CUDA tensor does. Build: RESNET_FAST_BUILD=cuda pip install --no-build-isolation -e .
//
// Only torch/library-level and c10/cuda headers: ATen/cuda/CUDAContext.h doubles the compile time.
#include "bn_act.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/cuda/CUDAGuard.h>

#include "bn_act.cuh"

namespace resnet_fast::cuda {

namespace {

// Below autograd (the op has its own formula) and autocast (dtypes were settled by the caller), on x's device.
struct OpGuard {
  explicit OpGuard(const Tensor& x) : device(x.device()) {}

  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCUDA};
  c10::cuda::CUDAGuard device;
};

struct Problem {
  Tensor x;  // dense in `format`
  at::MemoryFormat format;
  at::ScalarType acc;
  Matrix matrix;
  int64_t count;  // values per channel
  bool vectorise;  // until a pointer that is not 16-byte aligned is met
  cudaStream_t stream;
};

Problem make_problem(const Tensor& x) {
  TORCH_CHECK(x.dim() == 4, "x: expected a 4-D tensor, got ", x.dim(), "-D");
  TORCH_CHECK(x.device().is_cuda(), "x: expected a CUDA tensor, got ", x.device());
  TORCH_CHECK(x.numel() > 0, "x: expected a non-empty tensor, got shape ", x.sizes());
  Problem p;
  p.format = x.suggest_memory_format();
  p.x = x.contiguous(p.format);
  p.acc = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const int64_t channels = x.size(1);
  const int64_t plane = x.size(2) * x.size(3);
  p.count = x.size(0) * plane;
  // With one channel or one pixel both layouts are the same memory.
  const bool channels_last = p.x.is_contiguous(at::MemoryFormat::ChannelsLast);
  p.matrix = channels_last ? Matrix{p.count, channels, channels, true}
                           : Matrix{x.size(0) * channels, plane, channels, false};
  p.vectorise = p.matrix.cols % (16 / x.element_size()) == 0;
  p.stream = c10::cuda::getCurrentCUDAStream();
  return p;
}

// t with x's dtype and element order.
Tensor like_x(const Problem& p, const Tensor& t, const char* name) {
  TORCH_CHECK(t.sizes() == p.x.sizes(), name, ": expected shape ", p.x.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.device() == p.x.device(), name, ": expected a tensor on ", p.x.device(), ", got ", t.device());
  return t.to(p.x.scalar_type()).contiguous(p.format);
}

Tensor like_x(const Problem& p, const OptionalTensor& t, const char* name) {
  return t.has_value() && t->defined() ? like_x(p, *t, name) : Tensor();
}

// A per-channel argument in the accumulation type; undefined if absent.
Tensor channel_param(const Problem& p, const OptionalTensor& t, const char* name) {
  if (!t.has_value() || !t->defined()) return {};
  TORCH_CHECK(t->numel() == p.matrix.channels, name, ": expected ", p.matrix.channels, " values, got ", t->sizes());
  TORCH_CHECK(t->device() == p.x.device(), name, ": expected a tensor on ", p.x.device(), ", got ", t->device());
  return t->to(p.acc).contiguous();
}

Tensor channel_output(const Problem& p) { return at::empty({p.matrix.channels}, p.x.options().dtype(p.acc)); }

Tensor output_like_x(const Problem& p) { return at::empty_like(p.x, p.x.options(), p.format); }

// Null for an undefined tensor.
template <typename T>
T* pointer(const Tensor& t) {
  if (!t.defined()) return nullptr;
  if constexpr (std::is_const_v<T>) {
    return static_cast<T*>(t.const_data_ptr());
  } else {
    return static_cast<T*>(t.mutable_data_ptr());
  }
}

struct NormTensors {
  Tensor weight;
  Tensor bias;
  Tensor mean;
  Tensor var;
  double eps;

  template <typename Acc>
  Norm<Acc> get() const {
    return {
        pointer<const Acc>(weight), pointer<const Acc>(bias), pointer<const Acc>(mean), pointer<const Acc>(var),
        static_cast<Acc>(eps)};
  }
};

NormTensors norm_tensors(
    const Problem& p, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    double eps) {
  return {
      channel_param(p, weight, "weight"), channel_param(p, bias, "bias"), channel_param(p, mean, "mean"),
      channel_param(p, var, "var"), eps};
}

template <typename T, typename Acc, typename F>
void with_vector(bool vectorise, const F& f) {
  if (vectorise) {
    f(Traits<T, Acc, 16 / sizeof(T)>{});
  } else {
    f(Traits<T, Acc, 1>{});
  }
}

// Calls f(Traits<...>{}) for x's dtype, vectorised where the shape and every tensor's address allow.
template <typename F>
void dispatch(const Problem& p, std::initializer_list<Tensor> tensors, const F& f) {
  bool vectorise = p.vectorise;
  for (const Tensor& t : tensors) vectorise &= reinterpret_cast<uintptr_t>(pointer<const void>(t)) % 16 == 0;
  switch (p.x.scalar_type()) {
    case at::kFloat:
      return with_vector<float, float>(vectorise, f);
    case at::kDouble:
      return with_vector<double, double>(vectorise, f);
    case at::kBFloat16:
      return with_vector<c10::BFloat16, float>(vectorise, f);
    case at::kHalf:
      return with_vector<c10::Half, float>(vectorise, f);
    default:
      TORCH_CHECK_TYPE(false, "x: expected float32, float64, bfloat16 or float16, got ", p.x.scalar_type());
  }
}

template <typename Op, typename Finish>
void reduce(const Problem& p, const Op& op, const Finish& finish) {
  Tensor partials;  // freed in stream order: the kernels that read it are enqueued by then
  const auto allocate = [&](int64_t bytes) {
    partials = at::empty({bytes}, p.x.options().dtype(at::kByte));
    return partials.mutable_data_ptr();
  };
  launch_reduce(op, p.matrix, finish, allocate, p.stream);
}

Tensor apply(const Problem& p, const NormTensors& norm, const OptionalTensor& residual, bool relu) {
  const Tensor added = like_x(p, residual, "residual");
  Tensor y = output_like_x(p);
  dispatch(p, {p.x, added, y}, [&](auto traits) {
    using Tr = decltype(traits);
    using T = typename Tr::T;
    const Apply<Tr> op{
        {}, pointer<const T>(p.x), pointer<const T>(added), pointer<T>(y), norm.get<typename Tr::Acc>(), relu};
    launch_map(op, p.matrix, p.stream);
  });
  return y;
}

}  // namespace

Tensor bn_act(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    const OptionalTensor& residual, double eps, bool relu) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  return apply(p, norm_tensors(p, weight, bias, mean, var, eps), residual, relu);
}

std::tuple<Tensor, Tensor, Tensor> bn_act_train(
    const Tensor& x, const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual, double eps,
    bool relu) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  const Tensor mean = channel_output(p);
  const Tensor var = channel_output(p);
  dispatch(p, {p.x}, [&](auto traits) {
    using Tr = decltype(traits);
    using Acc = typename Tr::Acc;
    const Statistics<Tr> op{{}, pointer<const typename Tr::T>(p.x)};
    reduce(p, op, FinishStatistics<Acc>{pointer<Acc>(mean), pointer<Acc>(var)});
  });
  return {apply(p, norm_tensors(p, weight, bias, mean, var, eps), residual, relu), mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& dy, const Tensor& x, const OptionalTensor& y, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, double eps, bool relu, bool training, std::array<bool, 4> output_mask) {
  const OpGuard guard(x);
  const Problem p = make_problem(x);
  const NormTensors norm = norm_tensors(p, weight, bias, mean, var, eps);
  const Tensor grad = like_x(p, dy, "dy");
  const Tensor kept = relu ? like_x(p, y, "y") : Tensor();
  const Mask mask = !relu ? Mask::none : kept.defined() ? Mask::from_y : Mask::from_x;
  const auto [want_dx, want_dweight, want_dbias, want_dresidual] = output_mask;
  const bool reduces = want_dweight || want_dbias || (training && want_dx);
  const Tensor dweight = reduces ? channel_output(p) : Tensor();
  const Tensor dbias = reduces ? channel_output(p) : Tensor();
  const Tensor dx = want_dx ? output_like_x(p) : Tensor();
  const Tensor dresidual = want_dresidual ? output_like_x(p) : Tensor();

  dispatch(p, {p.x, grad, kept, dx, dresidual}, [&](auto traits) {
    using Tr = decltype(traits);
    using T = typename Tr::T;
    using Acc = typename Tr::Acc;
    const Gradient<Tr> gradient{
        {}, pointer<const T>(grad), pointer<const T>(p.x), pointer<const T>(kept), norm.get<Acc>(), mask};
    if (reduces) {
      const FinishBackward<Acc> finish{norm.get<Acc>(), pointer<Acc>(dweight), pointer<Acc>(dbias)};
      reduce(p, BackwardReduce<Tr>{gradient}, finish);
    }
    if (dx.defined() || dresidual.defined()) {
      const BackwardApply<Tr> op{
          gradient,
          training ? pointer<const Acc>(dweight) : nullptr,
          training ? pointer<const Acc>(dbias) : nullptr,
          Acc(1) / static_cast<Acc>(p.count),
          pointer<T>(dx),
          pointer<T>(dresidual)};
      launch_map(op, p.matrix, p.stream);
    }
  });

  const auto wanted = [&](bool want, const Tensor& t) { return want ? t : at::empty({0}, x.options()); };
  return {
      wanted(want_dx, dx), wanted(want_dweight, dweight), wanted(want_dbias, dbias),
      wanted(want_dresidual, dresidual)};
}

}  // namespace resnet_fast::cuda
