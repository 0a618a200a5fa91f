"""Backend `native`: the C++ extension resnet_fast._C. On CPUs, oneDNN convolutions and our vectorised batch norm; on
GPUs, cuDNN's convolutions or our own on tensor cores, and CUDA batch norm kernels.

Functions have the arguments of `resnet_fast.ops` without `backend` and return the same; see there for shapes.
"""

from collections.abc import Callable, Sequence

import torch

from .. import extension
from ..extension import available
from ..training import LIBRARY, PROLOGUE
from . import direct, inference, programs, train_ops, units, winograd
from .primitives import native as primitives

_MIB = 2**20
_LITTLE = 6 * _MIB  # `least_training_bytes`
_LITTLE_BY_WINOGRAD = {torch.bfloat16: 3 * _MIB // 8, torch.float32: 3 * _MIB // 4}
_LITTLE_IN_TILES = {torch.bfloat16: 3 * _MIB // 8, torch.float32: 3 * _MIB // 4}

_BLOCKS = ("residual_block", "residual_block_train")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def why_not(op: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `op` cannot run here on tensors of this device and dtype; None where it can."""
    reason = available()
    if reason is not None:
        return reason
    if dtype not in _DTYPES:
        return f"{dtype} is not one of float32, float64, bfloat16, float16"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"no kernels for {device_type} tensors, only cpu and cuda"
    return _why_not_cuda()


def _why_not_cuda() -> str | None:
    """Why the CUDA part, whatever the op, cannot run on the current device, or on any GPU where there is none here."""
    info = extension.build_info()
    built, running = info["cuda_version"], torch.version.cuda
    if built is None:
        return "built without CUDA: install with nvcc and a CUDA build of PyTorch, RESNET_FAST_BUILD=cuda"
    if running is None or built.split(".")[0] != running.split(".")[0]:
        return f"its CUDA part was built for CUDA {built} and this PyTorch is of CUDA {running}: {extension.REINSTALL}"
    if not torch.cuda.is_available():
        return None
    capability = torch.cuda.get_device_capability()
    if covers(info["cuda_archs"], capability):
        return None
    own = "{}.{}".format(*capability)
    return f"its CUDA part was compiled for {info['cuda_archs']} and this GPU is {own}: set TORCH_CUDA_ARCH_LIST={own}"


def covers(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs`, as TORCH_CUDA_ARCH_LIST has them, runs on a GPU of this capability."""
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").rstrip("af")
        if not number.replace(".", "", 1).isdigit():
            return True  # a name, as "Hopper": torch knows them, and a launch will tell
        major, minor = (int(part) for part in number.split("."))
        if (major == capability[0] and minor <= capability[1]) or (
            arch.endswith("+PTX") and (major, minor) <= capability
        ):
            return True
    return False


def why_not_auto(device_type: str, op: str) -> str | None:
    """Why "auto" passes this backend over where it can run."""
    return None if device_type == "cpu" else "slower on GPUs than Triton's kernels, and its launches take the host long"


def kernel(op: str, device_type: str, dtype: torch.dtype) -> str:
    """Short name of what runs, for reports."""
    if device_type == "cuda":
        if op == "conv_epilogue":
            return "cuDNN's fused conv + residual + ReLU, or its conv + one fused pass (CUDA)"
        halves = dtype in (torch.float16, torch.bfloat16) and op in ("conv_bn_act", "conv_bn_shortcut_act")
        conv = "tensor-core conv_bn_act, or cuDNN conv + " if halves else "cuDNN conv + "
        return f"{'' if op.startswith('bn') else conv}fused bn_act (CUDA)"
    conv = "" if op.startswith("bn") else "oneDNN conv + "
    if op in _BLOCKS and units.unit(dtype) in (("tiles", "dots") if op == "residual_block" else ("tiles",)):
        or_winograd = " or Winograd" if winograd.by_dots(dtype) else ""
        conv = f"{units.unit_name()}{or_winograd} conv, or oneDNN's where that was measured faster, + "
    elif op in _BLOCKS and winograd.computes(dtype) and winograd.why_not() is None:
        or_direct = op == "residual_block" and dtype == direct.DTYPE
        conv = "oneDNN, Winograd or direct conv + " if or_direct else "oneDNN or Winograd conv + "
    small = ""
    if op == "residual_block_train":
        least = sorted({least_training_bytes(dtype, only_3x3, stride=1) for only_3x3 in (True, False)})
        small = f"; PyTorch's layers under {' or '.join(f'{size / _MIB:g}' for size in least)} MiB of input"
    return f"{conv}fused bn_act ({(extension.build_info() or {}).get('cpu_capability', 'CPU')}){small}"


def train_stage(device_type: str, dtype: torch.dtype) -> int:
    """The stage of training that "auto" takes (`resnet_fast.training`)."""
    if device_type != "cpu" or dtype not in units.TILE_DTYPES:
        return LIBRARY
    by_winograd = dtype == winograd.DTYPE and winograd.why_not() is None
    return PROLOGUE if units.has_tiles() or by_winograd else LIBRARY


def least_training_bytes(dtype: torch.dtype, only_3x3: bool, stride: int) -> int:
    """Of a residual block's input on a CPU, in the convolutions' dtype: below, PyTorch's layers take less time for a
    training step, because the calls cost more than what is saved. Measured: benchmarks/NOTES.md.

    only_3x3: whether all of its convolutions but a downsample's are; stride: of the first.
    """
    if dtype in units.TILE_DTYPES and units.has_tiles():
        return _LITTLE_IN_TILES[dtype]
    if only_3x3 and winograd.computes(dtype) and winograd.why_not() is None:
        return _LITTLE_BY_WINOGRAD[dtype] * stride * stride  # which the first is not with a stride
    return _LITTLE


bn_act = extension.op("bn_act")
bn_act_train = extension.op("bn_act_train")
bn_act_backward = extension.op("bn_act_backward")
conv_bn_act = extension.op("conv_bn_act")
conv_bn_act_train = extension.op("conv_bn_act_train")
conv_bn_act_backward = extension.op("conv_bn_act_backward")
conv_epilogue = extension.op("conv_epilogue")
cpu_residual_block = extension.op("residual_block")
_cpu_residual_stage = extension.op("residual_stage")
_cpu_stem = extension.op("stem")
autocast_cast = extension.op("autocast_cast")
_max_pool = extension.op("max_pool")


def conv_bn_shortcut_act(*args) -> torch.Tensor:
    """`ops.conv_bn_shortcut_act` as two calls: the convolutions take no second input."""
    *main, eps, shortcut, conv_weight, conv_bias, weight, bias, mean, var, stride, shortcut_eps, relu = args
    tensors, geometry = main[:7], main[7:]
    branch = (shortcut, conv_weight, conv_bias, weight, bias, mean, var)
    residual = conv_bn_act(*branch, None, stride, [0, 0], [1, 1], 1, shortcut_eps, False)
    return conv_bn_act(*tensors, residual, *geometry, eps, relu)


_by_layer_residual_block, _by_layer_stem = inference.make(conv_bn_act, conv_bn_shortcut_act)


def residual_block(x: torch.Tensor, *args) -> torch.Tensor:
    """`ops.residual_block`: one call on the CPU, one op a convolution on CUDA."""
    if x.device.type != "cpu":
        return _by_layer_residual_block(x, *args)
    _, conv_weights, *_, geometry, _, downsample = args
    layers = conv_weights, geometry, downsample
    which = units.unit(x.dtype)
    if which and not programs.takes_block(x, *layers):
        which = ""
    return cpu_residual_block(x, *args, winograd.layers(x, *layers), direct.layers(x, *layers), which)


def residual_stage(
    shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, blocks: Sequence[tuple]
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes on the CPU, in one call, blocks one behind another of inputs of these shapes (N, C, H, W), each as
    `residual_block` takes it behind its residual, to the same bits; None where not each would be a program.

    Between the blocks activations then stay where one has written and the next reads them.
    """
    unit = units.unit(dtype)
    if not unit:
        return None
    columns, geometry, eps, lengths, downsamples = ([], [], [], [], []), [], [], [], []
    by_winograd, by_direct = [], []
    for shape, (*tensors, numbers, epsilons, downsample) in zip(shapes, blocks, strict=True):
        x, layers = torch.empty(shape, dtype=dtype, device="meta"), (tensors[0], numbers, downsample)
        if not programs.takes_block(x, *layers):
            return None
        by_winograd += [len(eps) + number for number in winograd.layers(x, *layers)]
        by_direct += [len(eps) + number for number in direct.layers(x, *layers)]
        for column, more in zip(columns, tensors, strict=True):
            column += more
        geometry += numbers
        eps += epsilons
        lengths.append(len(epsilons))
        downsamples.append(downsample)
    rest = *columns, geometry, eps, lengths, downsamples, by_winograd, by_direct, unit
    return lambda x: _cpu_residual_stage(x, *rest)


def stem(x: torch.Tensor, *args) -> torch.Tensor:
    """`ops.stem`, as `residual_block`."""
    if x.device.type != "cpu":
        return _by_layer_stem(x, *args)
    conv_weight, *_, geometry, _ = args
    by_direct = direct.computes_stem(x, conv_weight, geometry)
    return _cpu_stem(x, *args, by_direct, units.unit(conv_weight.dtype))


def max_pool(x: torch.Tensor) -> torch.Tensor | None:
    """max_pool2d(x, 3, stride 2, padding 1) without a gradient; None where these kernels do not take x."""
    fits = available() is None and x.device.type == "cpu" and x.dim() == 4 and x.dtype in _DTYPES and x.numel() > 0
    return _max_pool(x) if fits and x.is_contiguous(memory_format=torch.channels_last) else None


residual_block_train, residual_block_backward, stem_train, stem_backward = train_ops.make(lambda: primitives)
