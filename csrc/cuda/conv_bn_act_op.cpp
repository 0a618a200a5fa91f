// conv_bn_act and its gradient on CUDA. In training convolutions are PyTorch's, that is cuDNN's, and what surrounds them
// is ours. In inference there are three paths; conv_epilogue takes them by name:
//
//     mma        one kernel of our own on tensor cores (conv_bn_act.cu): any norm, residual and ReLU; NaN is kept
//     cudnn      cuDNN's fused convolution + bias [+ residual] + ReLU: no norm, so for frozen models; NaN may become 0
//     separate   PyTorch's convolution, then norm, residual and ReLU in one pass in place: always possible
//     auto       what should be fastest of those that fit, by prediction: no GPU has measured it yet
#include <ATen/Context.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/cudnn_convolution_add_relu.h>
#include <ATen/ops/cudnn_convolution_relu.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>

#include <atomic>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../conv_gradients.h"
#include "bn.h"
#include "conv_bn_act.h"

namespace resnet_fast::cuda {

namespace {

// Terms of a sum up to which the epilogue's saved pass outweighs the products' lower rate: 4 bytes of memory traffic
// saved an output against 2 FLOPs a term at mma.sync's predicted 55 % instead of cuDNN's 75 % of sm_80's peak, and 35 % of
// sm_90's, whose peak needs wgmma. See benchmarks/NOTES.md.
constexpr int64_t kMmaTerms = 576;
constexpr int64_t kMmaTermsHopper = 256;

struct Call {
  const Tensor& x;
  const Tensor& conv_weight;
  OptionalTensor conv_bias;
  NormTensors norm;
  double eps;
  OptionalTensor residual;
  at::IntArrayRef stride, padding, dilation;
  int64_t groups;
  bool relu;

  bool has_residual() const { return residual.has_value() && residual->defined(); }
  int64_t out_size(int axis) const {  // 0: rows, 1: columns; not positive where the kernel does not fit
    const int64_t span = x.size(2 + axis) + 2 * padding[axis] - dilation[axis] * (conv_weight.size(2 + axis) - 1) - 1;
    return span < 0 ? 0 : span / stride[axis] + 1;
  }
};

OptionalTensor as_dtype(const OptionalTensor& t, at::ScalarType dtype) {
  if (!t.has_value() || !t->defined()) return std::nullopt;
  return t->to(dtype);
}

Tensor convolve(const Call& c) {
  return at::convolution(
      c.x, c.conv_weight, as_dtype(c.conv_bias, c.x.scalar_type()), c.stride, c.padding, c.dilation,
      /*transposed=*/false, /*output_padding=*/{0, 0}, c.groups);
}

// ---- separate ----

Tensor run_separate(const Call& c) {
  const Tensor conv_out = convolve(c);
  if (conv_out.numel() == 0 || (c.norm.empty() && !c.has_residual() && !c.relu)) return conv_out;
  const Problem p = make_problem(conv_out);  // the convolution's output is nobody else's, so this works in place
  const NormVectors none{{}, {}, {}, {}, 0};
  apply_into(p, norm_vectors(p, c.norm, c.eps).value_or(none), c.residual, std::nullopt, c.relu, p.x);
  return p.x;
}

// ---- cudnn ----

std::string why_not_cudnn(const Call& c) {
  if (!c.norm.empty()) return "it has no norm in its epilogue: freeze() folds that";
  if (!c.relu) return "its fused calls end with a ReLU";
  if (c.x.scalar_type() == at::kDouble) return "it has no fused float64";
  if (!at::globalContext().userEnabledCuDNN() || !at::detail::getCUDAHooks().hasCuDNN()) return "cuDNN is off";
  if (c.x.numel() == 0 || c.out_size(0) < 1 || c.out_size(1) < 1) return "there is nothing to compute";
  return "";
}

// Raises where cuDNN has no engine for it, which no query foretells.
Tensor run_cudnn(const Call& c) {
  const at::MemoryFormat format = c.x.suggest_memory_format();
  const Tensor x = c.x.contiguous(format);
  const OptionalTensor bias = as_dtype(c.conv_bias, x.scalar_type());
  const Tensor y =
      c.has_residual()
          ? at::cudnn_convolution_add_relu(
                x, c.conv_weight, c.residual->to(x.scalar_type()).contiguous(format), 1.0, bias, c.stride, c.padding,
                c.dilation, c.groups)
          : at::cudnn_convolution_relu(x, c.conv_weight, bias, c.stride, c.padding, c.dilation, c.groups);
  return y.contiguous(format);
}

// The calls that cuDNN had no engine for, which are not tried again.
class Refusals {
 public:
  using Key = std::vector<int64_t>;

  static Key key_of(const Call& c) {
    Key key{c.x.device().index(), static_cast<int64_t>(c.x.scalar_type()), c.groups, c.has_residual(),
            static_cast<int64_t>(c.x.suggest_memory_format())};
    for (const at::IntArrayRef part : {c.x.sizes(), c.conv_weight.sizes(), c.stride, c.padding, c.dilation}) {
      key.insert(key.end(), part.begin(), part.end());
    }
    return key;
  }
  bool has(const Call& c) {
    if (!any_.load(std::memory_order_relaxed)) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    return keys_.count(key_of(c)) != 0;
  }
  void add(const Call& c) {
    const std::lock_guard<std::mutex> lock(mutex_);
    keys_.insert(key_of(c));
    any_.store(true, std::memory_order_relaxed);
  }

 private:
  std::atomic<bool> any_{false};
  std::mutex mutex_;
  std::set<Key> keys_;
};

Tensor run_cudnn_or_separate(const Call& c) {
  static Refusals refusals;
  if (refusals.has(c)) return run_separate(c);
  try {
    return run_cudnn(c);
  } catch (const c10::OutOfMemoryError&) {
    throw;
  } catch (const c10::Error& error) {
    refusals.add(c);
    TORCH_WARN_ONCE(
        "resnet_fast: cuDNN refuses its fused convolution for ", c.x.sizes(), " ", c.x.scalar_type(), " (",
        error.what_without_backtrace(), "); its convolution and one fused pass run instead");
  }
  return run_separate(c);
}

// ---- mma ----

int capability_major(const Tensor& x) {
  int major = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, x.device().index()));
  return major;
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

int64_t terms_of(const Call& c) { return c.conv_weight.numel() / std::max<int64_t>(c.conv_weight.size(0), 1); }

ConvGeometry geometry_of(const Call& c) {
  const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
  ConvGeometry g{};
  g.batch = c.x.size(0);
  g.channels = narrow(c.x.size(1));
  g.height = narrow(c.x.size(2));
  g.width = narrow(c.x.size(3));
  g.out_channels = narrow(c.conv_weight.size(0));
  g.out_height = narrow(c.out_size(0));
  g.out_width = narrow(c.out_size(1));
  g.kernel_height = narrow(c.conv_weight.size(2));
  g.kernel_width = narrow(c.conv_weight.size(3));
  g.stride_height = narrow(c.stride[0]);
  g.stride_width = narrow(c.stride[1]);
  g.padding_height = narrow(c.padding[0]);
  g.padding_width = narrow(c.padding[1]);
  g.dilation_height = narrow(c.dilation[0]);
  g.dilation_width = narrow(c.dilation[1]);
  return g;
}

std::string why_not_mma(const Call& c) {
  const Tensor& w = c.conv_weight;
  const auto dtype = c.x.scalar_type();
  if (dtype != at::kHalf && dtype != at::kBFloat16) return "x is not bfloat16 or float16";
  if (w.scalar_type() != dtype) return "conv_weight has another dtype than x";
  if (c.groups != 1) return "groups is not 1";
  if (c.x.size(1) % kChunk != 0 || w.size(0) % kChunk != 0) return "channels are not multiples of 8";
  if (!c.x.is_contiguous(at::MemoryFormat::ChannelsLast)) return "x is not dense in channels_last";
  if (!is_aligned(c.x)) return "x does not start at a multiple of 16 bytes";
  if (c.x.numel() == 0 || c.out_size(0) < 1 || c.out_size(1) < 1) return "there is nothing to compute";
  const auto extent = [&](int axis) {
    return c.x.size(2 + axis) + 2 * c.padding[axis] + c.dilation[axis] * w.size(2 + axis) + c.stride[axis];
  };
  if (!fits(extent(0), extent(1), c.x.size(1), w.size(0), w.size(2) * w.size(3))) return "a dimension is too large";
  if (NarrowTiling::blocks(geometry_of(c)) > kMaxGridX) return "too many pixels for one launch";
  if (!has_conv_kernel()) return "no tensor-core kernel is compiled for this GPU: sm_80 or newer, in TORCH_CUDA_ARCH_LIST";
  return "";
}

Tensor run_mma(const Call& c) {
  const auto format = at::MemoryFormat::ChannelsLast;
  Tensor y = at::empty(
      {c.x.size(0), c.conv_weight.size(0), c.out_size(0), c.out_size(1)}, c.x.options().memory_format(format));
  Problem p = make_problem(y);
  p.format = format;
  const Tensor weight = c.conv_weight.contiguous(format);
  const Tensor aligned = is_aligned(weight) ? weight : weight.clone(format);
  Tensor residual = like_x(p, c.residual, "residual");
  if (residual.defined() && !is_aligned(residual)) residual = residual.clone(format);
  const Tensor conv_bias = channel_param(p, c.conv_bias, "conv_bias");
  const std::optional<NormVectors> norm = norm_vectors(p, c.norm, c.eps);
  ConvParams params;
  params.geometry = geometry_of(c);
  params.dtype = p.dtype;
  params.x = data(c.x);
  params.weight = data(aligned);
  params.conv_bias = data(conv_bias);
  if (norm.has_value()) params.norm = norm->params();
  params.residual = data(residual);
  params.y = mutable_data(y);
  params.relu = c.relu;
  launch_conv(params, p.stream);
  return y;
}

Tensor run_auto(const Call& c) {
  if (why_not_cudnn(c).empty()) return run_cudnn_or_separate(c);
  // Of one pixel x may be dense in channels_last and yet not be taken for it; then the output follows what it is taken for.
  const bool channels_last = c.x.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  if (!channels_last || !why_not_mma(c).empty()) return run_separate(c);
  return terms_of(c) <= (capability_major(c.x) >= 9 ? kMmaTermsHopper : kMmaTerms) ? run_mma(c) : run_separate(c);
}

}  // namespace

Tensor conv_epilogue(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const NormTensors& norm, double eps,
    const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
    int64_t groups, bool relu, std::string_view path) {
  const OpGuard guard(x);
  TORCH_CHECK(x.dim() == 4, "x: expected a 4-D tensor, got ", x.dim(), "-D");
  TORCH_CHECK(conv_weight.dim() == 4, "conv_weight: expected a 4-D tensor, got ", conv_weight.dim(), "-D");
  const Call c{x, conv_weight, conv_bias, norm, eps, residual, stride, padding, dilation, groups, relu};
  if (path == "auto") return run_auto(c);
  if (path == "separate") return run_separate(c);
  TORCH_CHECK_VALUE(path == "mma" || path == "cudnn", "path: expected auto, mma, cudnn or separate, got ", path);
  const std::string reason = path == "mma" ? why_not_mma(c) : why_not_cudnn(c);
  TORCH_CHECK(reason.empty(), "path ", path, " cannot run this convolution: ", reason);
  return path == "mma" ? run_mma(c) : run_cudnn(c);
}

Tensor conv_bn_act(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const Tensor& mean, const Tensor& var, const OptionalTensor& residual,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu) {
  const NormTensors norm({mean, var, weight, bias});
  return conv_epilogue(
      x, conv_weight, conv_bias, norm, eps, residual, stride, padding, dilation, groups, relu, "auto");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_bn_act_train(
    const Tensor& x, const Tensor& conv_weight, const OptionalTensor& conv_bias, const OptionalTensor& weight,
    const OptionalTensor& bias, const OptionalTensor& residual, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, double eps, bool relu) {
  const OpGuard guard(x);
  Tensor conv_out = convolve({x, conv_weight, conv_bias, NormTensors(), eps, residual, stride, padding, dilation, groups, relu});
  auto [y, mean, var] = bn_act_train(conv_out, weight, bias, residual, eps, relu);
  return {y, conv_out, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_bn_act_backward(
    const Tensor& dy, const Tensor& x, const Tensor& conv_weight, const Tensor& conv_out, const OptionalTensor& y,
    const OptionalTensor& weight, const OptionalTensor& bias, const Tensor& mean, const Tensor& var,
    at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, int64_t groups, double eps, bool relu,
    bool training, std::array<bool, 6> output_mask) {
  const OpGuard guard(x);
  const auto [want_dx, want_dconv_weight, want_dconv_bias, want_dweight, want_dbias, want_dresidual] = output_mask;
  const bool want_conv = want_dx || want_dconv_weight || want_dconv_bias;
  auto [dconv_out, dweight, dbias, dresidual] = bn_act_backward(
      dy, conv_out, y, weight, bias, mean, var, eps, relu, training,
      {want_conv, want_dweight, want_dbias, want_dresidual});
  const auto [dx, dconv_weight, dconv_bias] = conv_gradients(
      dconv_out, x, conv_weight, stride, padding, dilation, groups, {want_dx, want_dconv_weight, want_dconv_bias});
  return {dx, dconv_weight, dconv_bias, dweight, dbias, dresidual};
}

}  // namespace resnet_fast::cuda
