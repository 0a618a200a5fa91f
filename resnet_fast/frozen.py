"""The modules a frozen model is made of: batch norm folded, activation and residual inside the convolution.

Inference only. On the CPU the convolutions are PyTorch's own oneDNN ones (torch.ops.mkldnn), with weights packed into
the layout that oneDNN picks for the input's shape, or in float32 the extension's Winograd and direct kernels where they
are faster (kernels/selection.py, `resnet-fast tune`). Where those cannot run (CUDA, float64, torch.compile) the same
folded weights go through conv2d, or on CUDA through the native backend if it was asked for by name (cuDNN's fused
convolutions); what runs as one, on a GPU or by AMX, is in `planned.py`. NaN is not everywhere what it is in PyTorch:
oneDNN's and cuDNN's fused ReLU may turn it into 0; AMX and GPU kernels multiply by the zeros that groups packed
together and the stem's weights are padded with, so that a NaN or Inf may spread to outputs beside those that see it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.utils import _pair

from . import cpus, dispatch
from .backends import direct, native, winograd
from .context import is_followed
from .kernels import selection
from .kernels.config_types import Config, DirectConfig, WinogradConfig
from .kernels.direct import NAME as DIRECT
from .kernels.selection import Choice
from .kernels.winograd import NAME as WINOGRAD
from .layers import conv_of
from .memory import pooled
from .problems import ConvProblem

_mkldnn = torch.ops.mkldnn
_NAMES = {WinogradConfig: WINOGRAD, DirectConfig: DIRECT, type(None): "oneDNN"}


def as_input(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`. Raises TypeError where it is no tensor of floats, RuntimeError where a gradient of it is wanted."""
    if not isinstance(x, Tensor):
        raise TypeError(f"input must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"input is {x.dtype}; a frozen model takes float dtypes and computes in {dtype}")
    forward_mode = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
    if forward_mode or (x.requires_grad and torch.is_grad_enabled()):
        raise RuntimeError("a frozen model computes no gradients: run it under torch.no_grad(), or detach the input")
    return x.to(dtype)


class Frozen(nn.Module):
    """A module that has no training mode and computes no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> "Frozen":
        """Only eval mode exists. Raises RuntimeError for mode=True."""
        if mode:
            raise RuntimeError(
                "a frozen model is for inference only; train the model it was made from, then freeze again"
            )
        return super().train(False)


class FrozenConv2d(Frozen):
    """act(conv2d(x) + residual) with batch norm folded into weight and bias.

    x (N, Cin, H, W) of any float dtype -> (N, Cout, P, Q) in the weight's dtype, channels_last on the CPU.
    `backend` is `freeze`'s argument.
    """

    backend: str = "auto"

    def __init__(self, conv: nn.Conv2d, bn: nn.Module | None, relu: bool, dtype: torch.dtype | None) -> None:
        super().__init__()
        weight, bias = fold(conv, bn, dtype or conv.weight.dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.relu = relu
        self._forget_packed()
        self.eval()

    def forward(self, x: Tensor, residual: Tensor | None = None, overwrite_residual: bool = False) -> Tensor:
        """`residual` (N, Cout, P, Q) is added before the activation; its memory may become the output's if allowed."""
        x = as_input(x, self.weight.dtype)
        by_name = not torch.compiler.is_compiling() and x.is_cuda and dispatch.requested(self.backend) == "native"
        if by_name:  # raises BackendUnavailable where the extension or its CUDA part cannot run
            dispatch.select("conv_epilogue", "cuda", x.dtype, "native")
        if is_followed(x):
            with torch.no_grad():
                return self._conv2d(x, residual)
        with torch.no_grad(), pooled():
            if by_name:
                return self._conv_native(x, residual)
            if not self.runs_onednn():
                return self._conv2d(x, residual)
            if x.dim() != 4 or x.shape[1] != self.weight.shape[1] * self.groups:
                raise RuntimeError(f"input is {tuple(x.shape)}, not (N, {self.weight.shape[1] * self.groups}, H, W)")
            config = self._config(x.shape, residual is not None)
            y = None if config is None else self.by_kernel(config, x, residual)
            return self.by_onednn(x, residual, overwrite_residual) if y is None else y

    def _conv2d(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y += residual
        return y.relu_() if self.relu else y

    def _conv_native(self, x: Tensor, residual: Tensor | None) -> Tensor:
        conv = (self.stride, self.padding, self.dilation, self.groups)
        return native.conv_epilogue(x, self.weight, self.bias, [], 0.0, residual, *conv, self.relu, "auto")

    def by_onednn(self, x: Tensor, residual: Tensor | None, overwrite_residual: bool = False) -> Tensor:
        """What `forward` does by oneDNN; inside `no_grad`."""
        conv = (self._pack(x.shape), self.bias, self.padding, self.stride, self.dilation, self.groups)
        act = "relu" if self.relu else "none"
        if residual is None:
            return _mkldnn._convolution_pointwise.default(x, *conv, act, [], "")
        # oneDNN's accumulating sum is faster than its out-of-place binary add, even with a copy before it
        y = residual if overwrite_residual else residual.clone(memory_format=torch.channels_last)
        return _mkldnn._convolution_pointwise_.binary(y, x, *conv, "add", 1.0, act, [], "")

    def by_kernel(self, config: Config, x: Tensor, residual: Tensor | None) -> Tensor | None:
        """The same in float32 by a kernel that `choice` may choose; None where Winograd met a NaN or Inf."""
        layer = self._packed_for(config), self.bias, self.weight.shape[0], residual
        if isinstance(config, DirectConfig):
            geometry = (self.stride, self.padding, self.dilation)
            return direct.conv_packed(x, *layer, geometry, self.relu)
        return winograd.conv_packed(x, *layer, self.relu)

    def prepared(self, shape: torch.Size, residual: bool) -> dict:
        """What `resnet_fast._C.FrozenNetwork.conv` takes of this convolution for inputs of `shape` on the CPU."""
        config = self._config(shape, residual)
        return {
            # where Winograd's kernels have to give up, which is rare, oneDNN packs it there and then
            "onednn": self._reordered(shape) if config is None else self.weight,
            "winograd": self._packed_for(config) if isinstance(config, WinogradConfig) else None,
            "direct": self._packed_for(config) if isinstance(config, DirectConfig) else None,
            "bias": self.bias,
            "out_channels": self.weight.shape[0],
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "relu": self.relu,
        }

    def _packed_for(self, config: Config) -> Tensor:
        packed = self._of_kernel  # one read, as in `_pack`
        if packed is None or packed[0] != config:
            pack = direct.pack if isinstance(config, DirectConfig) else winograd.pack
            packed = self._of_kernel = config, pack(self.weight)
        return packed[1]

    def _config(self, shape: torch.Size, residual: bool) -> Config | None:
        if dispatch.requested(self.backend) == "reference":
            return None
        asked, chosen = (shape, residual), self._chosen
        if chosen is None or chosen[0] != asked:
            chosen = self._chosen = asked, self.choice(shape, residual)
        return chosen[1].config

    def choice(self, shape: torch.Size, residual: bool) -> Choice:
        """oneDNN's path or a kernel's for inputs of this shape on this CPU, and why."""
        reason = winograd.why_not()
        if reason is not None:
            return Choice(None, "library", reason)
        if self.weight.dtype != winograd.DTYPE:
            return Choice(None, "library", f"only {winograd.DTYPE} has kernels outside of programs")
        problem = ConvProblem(conv_of(self, shape), "float32", residual=residual, relu=self.relu)
        return selection.choose(problem, cpus.here())

    @property
    def kernel(self) -> str:
        """What computed the last input on the CPU: for reports."""
        if not self.runs_onednn():
            return "PyTorch conv2d"
        return _NAMES[type(None if self._chosen is None else self._chosen[1].config)]

    @property
    def reason(self) -> str:
        """Why `kernel` did: how a kernel of ours was found to be faster; of a 3x3, why none was; else ""."""
        if self._chosen is None:
            return ""
        choice = self._chosen[1]
        if choice.config is None and tuple(self.weight.shape[2:]) != (3, 3):
            return ""
        return choice.reason or choice.source

    def _pack(self, shape: torch.Size) -> Tensor:
        """The weight in oneDNN's layout for inputs of this shape and threads, kept until another of them comes.

        Packed for no shape in particular, ResNet-50's convolutions take 462 instead of 356 ms (bfloat16, batch 16);
        packed for two threads and run on one, 132 instead of 69 (float32, batch 1): oneDNN packs again in every call.
        """
        wanted = shape, torch.get_num_threads()
        packed = self._packed  # one read: another thread may replace it
        if packed is None or packed[0] != wanted:
            packed = self._packed = wanted, self._reordered(shape)
        return packed[1]

    def _reordered(self, shape: torch.Size) -> Tensor:
        conv = (self.padding, self.stride, self.dilation, self.groups)
        return _mkldnn._reorder_convolution_weight(self.weight, *conv, list(shape))

    def runs_onednn(self) -> bool:
        """Whether oneDNN computes this convolution where its weight is."""
        weight = self.weight
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
            return False
        return onednn_runs(weight.dtype)

    # what is made of the weight, and for which inputs
    _packed: tuple[tuple[torch.Size, int], Tensor] | None
    _of_kernel: tuple[Config, Tensor] | None
    _chosen: tuple[tuple[torch.Size, bool], Choice] | None
    _MADE = dict.fromkeys(("_packed", "_of_kernel", "_chosen"))

    def _forget_packed(self) -> None:
        self.__dict__ |= self._MADE

    def _apply(self, fn, recurse=True):
        self._forget_packed()  # .to() and friends change the weight under it
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **keywords) -> None:
        super()._load_from_state_dict(*args, **keywords)
        self._forget_packed()

    def __getstate__(self) -> dict:
        # oneDNN's opaque tensors neither copy nor pickle, and what is chosen may differ elsewhere
        return self.__dict__ | self._MADE

    def extra_repr(self) -> str:
        """As Conv2d's."""
        out_channels, in_channels, *kernel = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={tuple(kernel)}, stride={self.stride}, "
            f"relu={self.relu}, onednn={self.runs_onednn()}"
        )


class FrozenMaxPool2d(nn.MaxPool2d):
    """max_pool2d with its output in pooled memory, and a stem's without the indices PyTorch computes beside it."""

    def forward(self, x: Tensor) -> Tensor:
        """As MaxPool2d's."""
        if is_followed(x):
            return super().forward(x)
        with pooled():
            y = native.max_pool(x) if self._is_stems() and not (x.requires_grad and torch.is_grad_enabled()) else None
            return super().forward(x) if y is None else y

    def _is_stems(self) -> bool:
        window = (_pair(self.kernel_size), _pair(self.stride), _pair(self.padding), _pair(self.dilation))
        return window == ((3, 3), (2, 2), (1, 1), (1, 1)) and not self.ceil_mode and not self.return_indices


class FrozenBlock(Frozen):
    """A residual block: relu(convs(x) + shortcut(x)), from a torchvision BasicBlock's or Bottleneck's stages."""

    def __init__(self, stages, downsample: nn.Module | None, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FrozenConv2d(conv, bn, True, dtype) for conv, bn in stages)
        self.downsample = downsample
        self.eval()

    def forward(self, x: Tensor, overwrite_x: bool = False) -> Tensor:
        """`overwrite_x`: the caller needs x no more, so that the output may take its memory."""
        out = x
        for conv in self.convs[:-1]:
            out = conv(out)
        if self.downsample is None:
            return self.convs[-1](out, x, overwrite_x)
        return self.convs[-1](out, self.downsample(x), isinstance(self.downsample, FrozenConv2d))


class FrozenStage(nn.Sequential):
    """A Sequential of FrozenBlocks. Each may overwrite its input, unless a hook or a foreign module saw it."""

    def forward(self, x: Tensor) -> Tensor:
        """x (N, Cin, H, W) -> the last block's output."""
        seen = True  # the stage's input is the caller's
        for block in self:
            ours, hooked = isinstance(block, FrozenBlock), _has_hooks(block)
            x = block(x, not (seen or hooked)) if ours else block(x)
            seen = hooked or not ours  # a foreign module may keep its input or return it
        return x


def _has_hooks(block: nn.Module) -> bool:
    hooks = nn.modules.module
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or hooks._global_forward_hooks
        or hooks._global_forward_pre_hooks
    )


def onednn_runs(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes convolutions of this dtype on this CPU."""
    if dtype == torch.bfloat16:
        return _mkldnn_supports("bf16")
    if dtype == torch.float16:
        return _mkldnn_supports("fp16")
    return dtype == torch.float32


def _mkldnn_supports(name: str) -> bool:
    return getattr(_mkldnn, f"_is_mkldnn_{name}_supported")()


def fold(conv: nn.Conv2d, bn: nn.Module | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """conv's weight (Cout, Cin / groups, R, S) and bias (Cout,) with bn's running statistics folded in, as `dtype`.

    weight' = weight * g, bias' = bn.bias + (bias - running_mean) * g, g = bn.weight / sqrt(running_var + eps):
    Jacob et al. 2018, https://arxiv.org/abs/1712.05877, section 3.2. Done in float64 and rounded once.
    """
    weight = conv.weight.detach().double()
    bias = None if conv.bias is None else conv.bias.detach().double()
    if bn is not None:
        scale = torch.rsqrt(bn.running_var.double() + bn.eps)
        if bn.weight is not None:
            scale = scale * bn.weight.detach().double()
        shift = -bn.running_mean.double() if bias is None else bias - bn.running_mean.double()
        bias = shift * scale
        if bn.bias is not None:
            bias = bias + bn.bias.detach().double()
        weight = weight * scale.view(-1, 1, 1, 1)
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    return weight, None if bias is None else bias.to(dtype)
