"""Backend `triton`: convolution, batch norm, residual and ReLU in one Triton kernel, for inference on NVIDIA GPUs.

Functions have the arguments of `resnet_fast.ops` without `backend` and return the same; see there for shapes. Each
convolution takes the kernel that `kernels.selection` names for its problem, or the library's path: cuDNN's convolution
with everything behind it in one pointwise kernel. Gradients are PyTorch's own (`reference`).

On a machine without a GPU the kernels run under Triton's interpreter (TRITON_INTERPRET=1), for tests and by request.
"""

import functools
import importlib
import importlib.metadata
import logging
import os

import torch
from torch import Tensor

from .. import _log, gpus
from ..kernels import selection, tables
from ..kernels.configs import why_only_frozen
from ..layout import memory_format
from ..problems import KERNEL_DTYPES, ConvProblem, dtype_name
from ..shapes import Conv
from ..training import LIBRARY, PROLOGUE
from . import inference, reference, train_ops

OLDEST_TRITON = (3, 6)
"""The kernels are compiled and tested with 3.6."""

_OPS = (
    "bn_act",
    "conv_bn_act",
    "conv_bn_shortcut_act",
    "bn_act_backward",
    "conv_bn_act_backward",
    "residual_block",
    "stem",
    "residual_block_train",
    "residual_block_backward",
    "stem_train",
    "stem_backward",
)


@functools.cache
def available() -> str | None:
    """None if Triton can be used at all, else one line that says why not and what would help."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is too old: pip install 'triton>=3.6'"
    if torch.version.hip is not None:
        return "PyTorch is a ROCm build; the kernels are tested for NVIDIA GPUs only"
    try:
        launcher()
    except Exception as error:  # a broken Triton fails in many ways, and none may break the import of a model
        return f"Triton {version} does not load ({type(error).__name__}: {error})"
    return None


def launcher():
    """The module that launches kernels. It needs Triton, so it is imported when first used."""
    from . import triton_launch

    return triton_launch


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run here on tensors of this device and dtype; None where it can."""
    reason = available()
    if reason is not None:
        return reason
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for {device_type} tensors, only cuda"
    if device_type == "cpu" and not interpreted():
        return "Triton kernels run on GPUs"
    if device_type == "cuda" and (reason := _why_not_gpu()):
        return reason
    if op not in _OPS:
        return f"{op} has no Triton kernel: inference, frozen statistics and whole residual blocks have"
    if dtype_name(dtype) not in KERNEL_DTYPES:
        return f"{dtype} is not one of {', '.join(KERNEL_DTYPES)}"
    return None


def _why_not_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    gpu = gpus.of_device(torch.cuda.current_device())
    if gpu.capability < (8, 0):
        return f"{gpu.name} is sm_{gpu.capability[0]}{gpu.capability[1]}; the kernels need sm_80 or newer"
    return None


def why_not_auto(device_type: str, op: str) -> str | None:
    """Why "auto" passes this backend over where it can run: it takes only GPUs that something was measured on, and ops
    whose launches take the host no longer than the GPU."""
    if device_type != "cuda":
        return "Triton's interpreter is for tests"
    if op.endswith(("_train", "_backward")) and not op.startswith("bn"):
        return "its launches in training take the host longer than they save the GPU, unless a CUDA graph replays them"
    return tables.why_none(gpus.of_device(torch.cuda.current_device()))


def kernel(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Short name of what runs, for reports."""
    where = " (interpreted)" if device_type == "cpu" else ""
    if op == "residual_block_train":
        return f"one Triton kernel a convolution with its statistics, or cuDNN + Triton passes, layer by layer{where}"
    if op.startswith("conv") or op in ("residual_block", "stem"):
        return f"one Triton kernel a convolution, or cuDNN + Triton bn_act, layer by layer{where}"
    return f"Triton bn_act{where}"


def train_stage(device_type: str, dtype: torch.dtype) -> int:
    """The stage of training that "auto" takes (`resnet_fast.training`)."""
    return LIBRARY if dtype == torch.float32 and selection.why_not_float32() else PROLOGUE


def bn_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    eps: float,
    relu: bool,
) -> Tensor:
    """`ops.bn_act`, one pass over x."""
    layout = memory_format(x)
    x = x.contiguous(memory_format=layout)
    y = torch.empty_like(x, memory_format=layout)
    norm = launcher().Norm(None, mean, var, weight, bias, eps)
    launcher().bn_act(x, y, norm, _in(residual, layout), relu)
    return y


def conv_bn_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    residual: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    relu: bool,
) -> Tensor:
    """`ops.conv_bn_act` in one kernel, or the library's convolution and one pass behind it."""
    geometry = Conv.of(x.shape, conv_weight.shape, stride, padding, dilation, groups)
    problem = ConvProblem(geometry, dtype_name(x.dtype), residual is not None, folded=False, relu=relu)
    launch, layout = launcher(), _out_layout(x, conv_weight)

    def run(config, y):
        norm = launch.Norm(conv_bias, mean, var, weight, bias, eps)
        packed = launch.pack_conv(conv_weight, problem)
        launch.conv(_in(x, layout), packed, y, problem, config, norm, _in(residual, layout))

    y = _in_one_kernel(problem, x, layout, run)
    if y is not None:
        return y
    conv_out = torch.ops.aten.convolution(x, conv_weight, conv_bias, stride, padding, dilation, False, [0, 0], groups)
    return bn_act(conv_out, weight, bias, mean, var, residual, eps, relu)


def conv_bn_shortcut_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    eps: float,
    shortcut: Tensor,
    shortcut_conv_weight: Tensor,
    shortcut_conv_bias: Tensor | None,
    shortcut_weight: Tensor | None,
    shortcut_bias: Tensor | None,
    shortcut_mean: Tensor,
    shortcut_var: Tensor,
    shortcut_stride: list[int],
    shortcut_eps: float,
    relu: bool,
) -> Tensor:
    """`ops.conv_bn_shortcut_act` in one kernel: the shortcut is a second run of terms. Else two `conv_bn_act`."""
    main = (x, conv_weight, conv_bias, weight, bias, mean, var)
    branch = (shortcut, shortcut_conv_weight, shortcut_conv_bias, shortcut_weight, shortcut_bias)
    pointwise = (shortcut_stride, [0, 0], [1, 1], 1)
    geometry = Conv.of(x.shape, conv_weight.shape, stride, padding, dilation, groups)
    branch_geometry = Conv.of(shortcut.shape, shortcut_conv_weight.shape, *pointwise)
    problem = ConvProblem(geometry, dtype_name(x.dtype), False, branch_geometry, folded=False, relu=relu)
    launch, layout = launcher(), _out_layout(x, conv_weight)

    def run(config, y):
        launch.conv(
            _in(x, layout),
            launch.pack_conv(conv_weight, problem),
            y,
            problem,
            config,
            launch.Norm(conv_bias, mean, var, weight, bias, eps),
            shortcut=_in(shortcut, layout),
            shortcut_weight=launch.pack_conv(shortcut_conv_weight, ConvProblem(branch_geometry, problem.dtype)),
            shortcut_norm=launch.Norm(
                shortcut_conv_bias, shortcut_mean, shortcut_var, shortcut_weight, shortcut_bias, shortcut_eps
            ),
        )

    y = _in_one_kernel(problem, x, layout, run)
    if y is not None:
        return y
    residual = conv_bn_act(*branch, shortcut_mean, shortcut_var, None, *pointwise, shortcut_eps, False)
    return conv_bn_act(*main, residual, stride, padding, dilation, groups, eps, relu)


def bias_act_(y: Tensor, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    """act(y + bias + residual) in place, one pass: what follows a folded convolution; y dense, which it stays."""
    if bias is not None or residual is not None or relu:
        launcher().bn_act(y, y, launcher().Norm(conv_bias=bias), _in(residual, memory_format(y)), relu)
    return y


def max_pool(x: Tensor) -> Tensor:
    """max_pool2d(x, 3, stride 2, padding 1), of the kernel where it reads x: channels_last, of KERNEL_DTYPES."""
    dense = x.dim() == 4 and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)
    if not dense or why_not("bn_act", x.device.type, x.dtype) is not None:
        return inference.max_pool(x)
    y = launcher().pooled_like(x)
    launcher().max_pool(x, y)
    return y


residual_block, stem = inference.make(conv_bn_act, conv_bn_shortcut_act, max_pool)
residual_block_train, residual_block_backward, stem_train, stem_backward = train_ops.make(
    lambda: importlib.import_module(".primitives.triton", __package__)
)
bn_act_backward = reference.bn_act_backward
conv_bn_act_backward = reference.conv_bn_act_backward


def why_not_convolution(x, conv_weight, stride, padding, dilation, groups, residual: bool, relu: bool) -> str | None:
    """Why no kernel computes this convolution of inference statistics at all; None where one does, or the library is
    merely faster."""
    geometry = Conv.of(x.shape, conv_weight.shape, stride, padding, dilation, groups)
    problem = ConvProblem(geometry, dtype_name(x.dtype), residual, folded=False, relu=relu)
    choice = selection.choose(problem, gpus.of_tensor(x))
    return choice.reason if choice.config is None and choice.source in ("predicted", "refused") else None


def _in_one_kernel(problem: ConvProblem, x: Tensor, layout: torch.memory_format, run) -> Tensor | None:
    """The output that `run(config, y)` wrote, or None, with the reason logged, where the library's path is taken."""
    gpu = gpus.of_tensor(x)
    reason = _why_library(problem, layout)
    if reason is None:
        choice = selection.choose(problem, gpu)
        if choice.config is not None:
            y = torch.empty(problem.conv.y_shape, dtype=x.dtype, device=x.device, memory_format=layout)
            try:
                run(choice.config, y)
                return y
            except launcher().REFUSALS as error:
                selection.refuse(problem, gpu, f"{type(error).__name__}: {error}")
        reason = selection.choose(problem, gpu).reason
    _log.once(f"triton: {problem.key} takes cuDNN and one pass behind it: {reason}", logging.INFO)
    return None


def _why_library(problem: ConvProblem, layout: torch.memory_format) -> str | None:
    if layout != torch.channels_last:
        return "the convolution kernels read channels_last, and x and the weight are contiguous"
    return why_only_frozen(problem)


def _out_layout(x: Tensor, conv_weight: Tensor) -> torch.memory_format:
    """The memory format of PyTorch's convolution: channels_last if either operand is."""
    return (
        torch.channels_last
        if torch.channels_last in (memory_format(x), memory_format(conv_weight))
        else memory_format(x)
    )


def _in(tensor: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=layout)
