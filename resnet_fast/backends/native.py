"""Backend `native`: the C++ extension resnet_fast._C. On CPUs, oneDNN convolutions and our vectorised batch norm; on
GPUs, cuDNN's convolutions or our own on tensor cores, and CUDA batch norm kernels.

Functions have the arguments of `resnet_fast.ops` without `backend` and return the same; see there for shapes. The
extension is imported once, on first use, and a failure is remembered: `available()` says what is wrong and what helps.
"""

import functools
import importlib
import logging
from types import ModuleType

import torch

from .. import _log, twin
from ..training import LIBRARY, PROLOGUE
from . import inference, train_ops

TILE_DTYPES = (torch.float32, torch.bfloat16)
"""Of the convolutions that a CPU with AMX computes itself."""

_MOST_THREADS = 8  # of dot products: oneDNN is so near that what is not measured is left to it

_MIB = 2**20
_LITTLE = 6 * _MIB  # `least_training_bytes`
_LITTLE_BY_WINOGRAD = {torch.bfloat16: 3 * _MIB // 8, torch.float32: 3 * _MIB // 4}
_LITTLE_IN_TILES = {torch.bfloat16: 3 * _MIB // 8, torch.float32: 3 * _MIB // 4}

_BLOCKS = ("residual_block", "residual_block_train")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_names: list[str] = []  # of the extension's ops that this package calls
_REINSTALL = "run `pip install -e .` in the source tree, or reinstall resnet-fast"

_module: ModuleType | None = None
_failure: str | None = None


def load() -> ModuleType | None:
    """The extension module, imported on the first call; None if it cannot be used, and then `available()` says why."""
    global _module, _failure
    if _module is None and _failure is None:
        try:
            module = importlib.import_module("resnet_fast._C")
        except ModuleNotFoundError as error:
            if error.name == "resnet_fast._C":
                # Not an accident: a pure-Python install. Reports and `info` say so.
                _failure = f"the C++ extension resnet_fast._C is not built: {_REINSTALL}, with a C++ compiler"
                _log.once(_failure, logging.INFO)
            else:
                _fail(f"the C++ extension resnet_fast._C needs {error.name}, which is not installed")
        except Exception as error:  # a broken library fails in many ways, and none may break the import of a model
            _fail(f"the C++ extension resnet_fast._C does not load ({_first_line(error)}): {_REINSTALL}")
        else:
            _failure = _mismatch(module)
            if _failure is None:
                _module = module
            else:
                _fail(_failure)
    return _module


def available() -> str | None:
    """None if the extension can be used, else one line that says why not and what would help."""
    load()
    return _failure


def build_info() -> dict | None:
    """What the extension was built with and the CPU capability it uses; None without the extension.

    Keys: torch_version, cuda_version (or None), compiler, cplusplus, cxx11_abi, openmp, capabilities, cpu_capability,
    cxx_flags; with CUDA also cuda_archs (as TORCH_CUDA_ARCH_LIST), cudnn_version (the one loaded), nvcc_flags.
    """
    module = load()
    return None if module is None else module.build_info()


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
    info = build_info()
    built, running = info["cuda_version"], torch.version.cuda
    if built is None:
        return "built without CUDA: install with nvcc and a CUDA build of PyTorch, RESNET_FAST_BUILD=cuda"
    if running is None or built.split(".")[0] != running.split(".")[0]:
        return f"its CUDA part was built for CUDA {built} and this PyTorch is of CUDA {running}: {_REINSTALL}"
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
    if op in _BLOCKS and unit(dtype) in (("tiles", "dots") if op == "residual_block" else ("tiles",)):
        or_winograd = " or Winograd" if _winograd().by_dots(dtype) else ""
        conv = f"{unit_name()}{or_winograd} conv, or oneDNN's where that was measured faster, + "
    elif op in _BLOCKS and _winograd().computes(dtype) and _winograd().why_not() is None:
        direct = op == "residual_block" and dtype == _direct().DTYPE
        conv = "oneDNN, Winograd or direct conv + " if direct else "oneDNN or Winograd conv + "
    small = ""
    if op == "residual_block_train":
        least = sorted({least_training_bytes(dtype, only_3x3, stride=1) for only_3x3 in (True, False)})
        small = f"; PyTorch's layers under {' or '.join(f'{size / _MIB:g}' for size in least)} MiB of input"
    return f"{conv}fused bn_act ({(build_info() or {}).get('cpu_capability', 'CPU')}){small}"


def train_stage(device_type: str, dtype: torch.dtype) -> int:
    """The stage of training that "auto" takes (`resnet_fast.training`)."""
    if device_type != "cpu" or dtype not in TILE_DTYPES:
        return LIBRARY
    winograd = dtype == _winograd().DTYPE and _winograd().why_not() is None
    return PROLOGUE if has_tiles() or winograd else LIBRARY


def least_training_bytes(dtype: torch.dtype, only_3x3: bool, stride: int) -> int:
    """Of a residual block's input on a CPU, in the convolutions' dtype: below, PyTorch's layers take less time for a
    training step, because the calls cost more than what is saved. Measured: benchmarks/NOTES.md.

    only_3x3: whether all of its convolutions but a downsample's are; stride: of the first.
    """
    if dtype in TILE_DTYPES and has_tiles():
        return _LITTLE_IN_TILES[dtype]
    if only_3x3 and _winograd().computes(dtype) and _winograd().why_not() is None:
        return _LITTLE_BY_WINOGRAD[dtype] * stride * stride  # which the first is not with a stride
    return _LITTLE


def why_no_vectors() -> str | None:
    """Why the extension's float32 convolutions cannot run on this CPU; None where they can."""
    reason = available()
    if reason is None and not _module.has_vectors():
        return "its convolutions in float32 need AVX2 or AVX-512, and PyTorch to use them (ATEN_CPU_CAPABILITY)"
    return reason


def unit(dtype: torch.dtype) -> str:
    """What multiplies in the extension's own convolutions of this dtype on this CPU, as its ops take it: "tiles", which
    are AMX's, "dots", which are AVX-512's products of bfloat16, or "" where oneDNN does."""
    return "" if why_no_unit(dtype) else "tiles" if has_tiles() else "dots"


def why_no_unit(dtype: torch.dtype) -> str | None:
    """Why there is no `unit`; None where there is."""
    if dtype not in TILE_DTYPES:
        return f"{dtype} is neither bfloat16 nor float32"
    reason = available()
    if reason is not None or has_tiles():
        return reason
    reason = "this CPU, system or build has no AMX with bfloat16"
    if dtype != torch.bfloat16:
        return reason
    if not has_dots():
        return f"{reason}, nor its products in AVX-512"
    if torch.get_num_threads() > _MOST_THREADS:
        return f"of dot products with more than {_MOST_THREADS} threads nothing is measured"
    return "this CPU multiplies bfloat16 slower than float32" if twin.bfloat16_is_slow() else None


def unit_name() -> str:
    """The `unit`, where there is one, for reports: AMX, or what the tests have put in its place, or AVX-512."""
    if not has_tiles():
        return "AVX-512 bfloat16"
    return next(name for name in build_info()["capabilities"] if "AMX" in name)


def has_tiles() -> bool:
    """Whether this CPU and system, and this build, have AMX's tiles of bfloat16."""
    return load() is not None and _module.amx_usable()


def has_dots() -> bool:
    """Whether they have AVX-512's dot products of bfloat16."""
    return load() is not None and _module.dots_usable()


def _fail(reason: str) -> None:
    global _failure
    _failure = reason
    _log.once(f"native backend off: {reason}")


def _mismatch(module: ModuleType) -> str | None:
    """Why an extension that was imported must not be used: it was made for another torch, ABI or version of ours."""
    info = module.build_info()
    built, running = info["torch_version"], torch.__version__
    if built.split(".")[:2] != running.split(".")[:2]:
        return f"the C++ extension resnet_fast._C was built for torch {built} and this is torch {running}: {_REINSTALL}"
    abi = info.get("cxx11_abi")
    if abi is not None and abi != torch.compiled_with_cxx11_abi():
        return f"the C++ extension resnet_fast._C has another C++ ABI than torch (cxx11_abi={abi}): {_REINSTALL}"
    missing = [name for name in _names if not hasattr(torch.ops.resnet_fast_native, name)]
    if missing:
        return f"the C++ extension resnet_fast._C is of another version and lacks {', '.join(missing)}: {_REINSTALL}"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _op(name: str):
    """The registered op `name`, looked up on the first call, when the extension has been loaded."""
    resolved = None
    _names.append(name)

    def call(*args):
        nonlocal resolved
        if resolved is None:
            if load() is None:
                raise RuntimeError(f"backend 'native' cannot run {name}: {_failure}")
            resolved = getattr(torch.ops.resnet_fast_native, name).default
        return resolved(*args)

    call.__name__ = call.__qualname__ = name
    return call


bn_act = _op("bn_act")
bn_act_train = _op("bn_act_train")
bn_act_backward = _op("bn_act_backward")
conv_bn_act = _op("conv_bn_act")
conv_bn_act_train = _op("conv_bn_act_train")
conv_bn_act_backward = _op("conv_bn_act_backward")
conv_epilogue = _op("conv_epilogue")
cpu_residual_block = _op("residual_block")
_cpu_stem = _op("stem")
autocast_cast = _op("autocast_cast")
direct_conv = _op("direct_conv")
_max_pool = _op("max_pool")


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
    which = unit(x.dtype)
    if which and not _programs().takes_block(x, *layers):
        which = ""
    return cpu_residual_block(x, *args, _winograd().layers(x, *layers), _direct().layers(x, *layers), which)


def stem(x: torch.Tensor, *args) -> torch.Tensor:
    """`ops.stem`, as `residual_block`."""
    if x.device.type != "cpu":
        return _by_layer_stem(x, *args)
    conv_weight, *_, geometry, _ = args
    by_direct = _direct().computes_stem(x, conv_weight, geometry)
    return _cpu_stem(x, *args, by_direct, unit(conv_weight.dtype))


def max_pool(x: torch.Tensor) -> torch.Tensor | None:
    """max_pool2d(x, 3, stride 2, padding 1) without a gradient; None where these kernels do not take x."""
    fits = available() is None and x.device.type == "cpu" and x.dim() == 4 and x.dtype in _DTYPES and x.numel() > 0
    return _max_pool(x) if fits and x.is_contiguous(memory_format=torch.channels_last) else None


@functools.cache
def _sibling(name: str) -> ModuleType:
    return importlib.import_module(f".{name}", __package__)  # which is made of what is here


_winograd, _direct, _programs = (functools.partial(_sibling, name) for name in ("winograd", "direct", "programs"))


residual_block_train, residual_block_backward, stem_train, stem_backward = train_ops.make(
    lambda: importlib.import_module(".primitives.native", __package__)
)
