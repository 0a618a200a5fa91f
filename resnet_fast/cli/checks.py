"""One op, block or network, run three ways on the same inputs and compared: ours, PyTorch's, and PyTorch in float64.

Used by `verify` (all cases), `info` (its self-test) and `bench` (before timing). Inputs come from a seed made of the
case's name; while ours runs, fresh memory is filled with NaN, so an element that is never written is seen.
"""

import contextlib
import copy
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops.misc import FrozenBatchNorm2d

from .. import functional, numerics, optimize
from ..numerics import Comparison

MODES = ("train", "eval", "frozen")
"""Batch statistics; running statistics with trainable weight and bias; running statistics with constant ones."""

_COIN_TOSS = {torch.float64: 64, torch.float32: 64, torch.bfloat16: 8, torch.float16: 8}
"""Nearer to zero than this (in eps * rms), an activation's sign is rounding's choice, and so is its gradient's mask."""


@dataclass(frozen=True)
class OpCase:
    """Shapes and options of one call of `functional.conv_bn_act` or `functional.bn_act` (kernel 0)."""

    name: str
    n: int = 2
    c_in: int = 64
    size: tuple[int, int] = (8, 8)
    c_out: int = 64
    kernel: int = 0
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    act: str | None = "relu"
    residual: bool = False
    conv_bias: bool = False
    affine: bool = True
    offset: float = 0.0
    poison: bool = False

    @property
    def op(self) -> str:
        return "conv_bn_act" if self.kernel else "bn_act"


@dataclass(frozen=True)
class BlockCase:
    """One torchvision residual block: its constructor's arguments and the input's size."""

    name: str
    block: type
    inplanes: int
    planes: int
    stride: int = 1
    groups: int = 1
    base_width: int = 64
    dilation: int = 1
    downsample: bool = False
    size: int = 8
    n: int = 2

    op = "block"


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh floating-point tensors are full of NaN inside."""
    settings = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(settings[0], warn_only=settings[1])


def check_op(
    case: OpCase, mode: str, dtype: torch.dtype, channels_last: bool, backend: str, device: str = "cpu"
) -> list[Comparison]:
    """Output, every gradient and the running statistics of one op."""
    tensors, dy = _op_inputs(case, mode, dtype, channels_last)
    if case.act:
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        dy = dy.masked_fill(_coin_toss(_stock_op(replace(case, act=None), mode, backend, **exact), dtype), 0.0)
    trainable = {name for name in tensors if not name.startswith("running")}
    if mode == "frozen":
        trainable -= {"weight", "bias"}

    def run(function: Callable, convert: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaves = {name: _leaf(convert(tensor), name in trainable) for name, tensor in tensors.items()}
        y = function(case, mode, backend, **leaves)
        y.backward(convert(dy))
        results = {"y": y} | {f"grad {name}": leaves[name].grad for name in tensors if name in trainable}
        return results | ({name: leaves[name] for name in tensors if name not in trainable} if mode == "train" else {})

    reference = run(_stock_op, lambda tensor: tensor.to(device).double())
    stock = run(_stock_op, lambda tensor: tensor.to(device))
    with poisoned_memory():
        ours = run(_fast_op, lambda tensor: tensor.to(device))
    size = dy.double().square().sum(dim=(0, 2, 3)).mean().sqrt().item()
    terms = dict.fromkeys(("grad weight", "grad bias", "grad conv_bias"), size)
    return numerics.compare_all(ours, stock, reference, compute_dtype=dtype, terms=terms)


def check_block(
    case: BlockCase, mode: str, dtype: torch.dtype, channels_last: bool, backend: str, device: str = "cpu"
) -> list[Comparison]:
    """Output, every gradient and buffer of one fast block against torchvision's.

    Halves run under autocast; with frozen statistics, which autocast would promote, in a block converted to the dtype.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    autocast = half and mode != "frozen"
    generator = _generator(case.name)
    stock = build_block(case, generator, frozen=mode == "frozen")
    stock.to(device=device, dtype=torch.float32 if autocast else dtype).train(mode == "train")
    x = torch.randn(case.n, case.inplanes, case.size, case.size, generator=generator)
    x = x.to(device, stock.conv1.weight.dtype).to(memory_format=_layout(channels_last))
    return compare_block(stock, x, dtype, autocast, backend)


def compare_block(
    stock: nn.Module, x: Tensor, dtype: torch.dtype, autocast: bool, backend: str, train_stage: int | str = "auto"
) -> list[Comparison]:
    """`stock`, a torchvision block whose biases are shifted in place, against its fast twin on `x`, small."""
    y = _avoid_coin_tosses(stock, x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(y.numel())).to(y.device)
    ours = optimize(nn.Sequential(copy.deepcopy(stock)), backend=backend, strict=True, train_stage=train_stage)
    reference = run_block(copy.deepcopy(stock).double(), x.double(), dy)
    with torch.autocast(x.device.type, dtype, enabled=autocast):
        expected = run_block(stock, x, dy)
        with poisoned_memory():
            actual = run_block(ours[0], x, dy)
    return numerics.compare_all(actual, expected, reference, compute_dtype=dtype)


def build_block(case: BlockCase, generator: torch.Generator, frozen: bool = False) -> nn.Module:
    """torchvision's block with batch-norm parameters and buffers that are nowhere trivial."""
    norm = FrozenBatchNorm2d if frozen else nn.BatchNorm2d
    downsample = None
    if case.downsample:
        out = case.planes * case.block.expansion
        downsample = nn.Sequential(nn.Conv2d(case.inplanes, out, 1, case.stride, bias=False), norm(out))
    options = (case.groups, case.base_width, case.dilation, norm)
    block = case.block(case.inplanes, case.planes, case.stride, downsample, *options)
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.weight[0].numel()
            module.weight.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
    randomise_batch_norm(block, generator)
    return block


def run_block(block: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The block's output for `x`, and what one forward and backward leave in its gradients and buffers."""
    x = x.detach().clone().requires_grad_()
    y = block(x)
    y.backward(dy.to(y.dtype))
    results = {"y": y, "grad x": x.grad}
    results |= {f"grad {name}": parameter.grad for name, parameter in block.named_parameters()}
    return results | {name: buffer for name, buffer in block.named_buffers() if buffer.is_floating_point()}


def randomise_batch_norm(model: nn.Module, generator: torch.Generator) -> None:
    """Affine parameters and running statistics away from 1 and 0, in place."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
                channels = module.running_mean.shape
                draw = torch.rand(4, *channels, generator=generator, device="cpu").to(module.running_mean)
                module.running_mean.copy_(draw[0] - 0.5)
                module.running_var.copy_(draw[1] + 0.5)
                if module.weight is not None:
                    module.weight.copy_(draw[2] + 0.5)
                    module.bias.copy_(0.5 * draw[3] - 0.25)


def _fast_op(case: OpCase, mode: str, backend: str, x, conv_weight=None, conv_bias=None, residual=None, **bn) -> Tensor:
    options = {"residual": residual, "training": mode == "train", "act": case.act, "backend": backend}
    if not case.kernel:
        return functional.bn_act(x, **bn, **options)
    options |= {"stride": case.stride, "padding": case.padding, "dilation": case.dilation, "groups": case.groups}
    return functional.conv_bn_act(x, conv_weight, **bn, conv_bias=conv_bias, **options)


def _stock_op(
    case: OpCase, mode: str, backend: str, x, conv_weight=None, conv_bias=None, residual=None, **bn
) -> Tensor:
    y = x
    if case.kernel:
        y = F.conv2d(x, conv_weight, conv_bias, case.stride, case.padding, case.dilation, case.groups)
    y = F.batch_norm(y, **bn, training=mode == "train")
    if residual is not None:
        y = y + residual
    return F.relu(y) if case.act else y


def _op_inputs(case: OpCase, mode: str, dtype: torch.dtype, channels_last: bool) -> tuple[dict[str, Tensor], Tensor]:
    """The call's tensors by argument name, and dy."""
    generator = _generator(case.name)
    vector_dtype = dtype if dtype == torch.float64 else torch.float32

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        tensor = (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        return tensor.to(memory_format=_layout(channels_last)) if len(shape) == 4 else tensor

    x = draw(case.n, case.c_in, *case.size) + case.offset
    if case.poison:
        x[0, 0, 0, 0], x[-1, -1, -1, -1] = float("nan"), float("inf")
    tensors = {"x": x}
    out, channels = case.size, case.c_in
    if case.kernel:
        fan_in = case.c_in // case.groups * case.kernel**2
        channels = case.c_out
        tensors["conv_weight"] = draw(channels, case.c_in // case.groups, case.kernel, case.kernel, scale=fan_in**-0.5)
        if case.conv_bias:
            tensors["conv_bias"] = draw(channels)
        reach = case.dilation * (case.kernel - 1) + 1
        out = tuple((size + 2 * case.padding - reach) // case.stride + 1 for size in case.size)
    vectors = torch.rand(4, channels, generator=generator, dtype=torch.float64).to(vector_dtype)
    tensors["running_mean"], tensors["running_var"] = vectors[0] - 0.5 + case.offset, vectors[1] + 0.5
    if case.affine:
        tensors["weight"], tensors["bias"] = vectors[2] + 0.5, vectors[3] - 0.5
    if case.residual:
        tensors["residual"] = draw(case.n, channels, *out)
    return tensors, draw(case.n, channels, *out)


def _coin_toss(z: Tensor, dtype: torch.dtype) -> Tensor:
    """Where pre-activation `z`, exact, is too near zero for arithmetic in `dtype` to be held to its sign."""
    rms = z[z.isfinite()].square().mean().sqrt()
    return z.abs() < _COIN_TOSS[dtype] * torch.finfo(dtype).eps * rms


@torch.no_grad()
def _avoid_coin_tosses(block: nn.Module, x: Tensor) -> Tensor:
    """Shift each batch norm's bias, in place, so that zero falls into the widest gap of its pre-activations.

    A sign that rounding decides would flip a gradient in one of two right answers and not in the other. Returns y.
    """
    norms = iter([module for name, module in block.named_children() if name.startswith("bn")])

    def shift(_, inputs: tuple[Tensor]) -> Tensor:
        (z,) = inputs
        values = z.transpose(0, 1).flatten(1).sort().values
        middle = (values[:, 1:] + values[:, :-1]) / 2
        gap = values.diff() * (middle.abs() < z.std())
        offset = middle.gather(1, gap.argmax(1, keepdim=True))[:, 0]
        next(norms).bias.sub_(offset.to(x.dtype))
        return z - offset.view(1, -1, 1, 1)

    exact = copy.deepcopy(block).double()
    exact.relu.register_forward_pre_hook(shift)
    return exact(x.double())


def _layout(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _leaf(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().clone().requires_grad_(requires_grad)


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


SELF_TEST = (
    OpCase("self_test_bn_act", size=(7, 9), c_in=67, residual=True),
    OpCase("self_test_conv_bn_act", kernel=3, padding=1, c_in=32, c_out=48, residual=True),
)

_BN = OpCase("")
_CONV = OpCase("", kernel=3, padding=1)
OP_CASES = tuple(
    replace(base, name=name, **options)
    for base, name, options in (
        (_BN, "56x56_c64", {"size": (56, 56)}),
        (_BN, "7x7_c2048_residual", {"size": (7, 7), "c_in": 2048, "residual": True}),
        (_BN, "odd_c65_no_act", {"size": (5, 9), "c_in": 65, "act": None}),
        (_BN, "c3_large_plane", {"size": (113, 115), "c_in": 3, "residual": True}),
        (_BN, "c1", {"size": (17, 13), "c_in": 1}),
        (_BN, "one_pixel", {"size": (1, 1), "n": 5, "c_in": 100, "residual": True}),
        (_BN, "no_affine", {"affine": False, "residual": True}),
        (_BN, "mean_100_std_1", {"offset": 100.0, "size": (14, 14)}),
        (_BN, "nan_and_inf_inputs", {"poison": True, "residual": True}),
        (_CONV, "3x3", {}),
        (_CONV, "3x3_residual", {"residual": True, "size": (14, 14)}),
        (_CONV, "1x1_expand_residual", {"kernel": 1, "padding": 0, "c_out": 256, "residual": True}),
        (_CONV, "1x1_reduce", {"kernel": 1, "padding": 0, "c_in": 256}),
        (_CONV, "stride2_3x3", {"stride": 2, "size": (15, 14)}),
        (_CONV, "stride2_downsample_no_act", {"kernel": 1, "padding": 0, "stride": 2, "c_out": 128, "act": None}),
        (_CONV, "groups32", {"groups": 32, "c_in": 128, "c_out": 128}),
        (_CONV, "dilation2", {"dilation": 2, "padding": 2, "size": (11, 11)}),
        (_CONV, "7x7_stem", {"kernel": 7, "padding": 3, "stride": 2, "c_in": 3, "size": (32, 32)}),
        (_CONV, "odd_channels_conv_bias", {"c_in": 5, "c_out": 65, "conv_bias": True, "residual": True}),
        (_CONV, "no_affine", {"affine": False}),
        (_CONV, "7x7_c512", {"c_in": 512, "c_out": 512, "size": (7, 7), "residual": True}),
    )
)

BLOCK_CASES = (
    BlockCase("basic", BasicBlock, 64, 64),
    BlockCase("basic_stride2_downsample", BasicBlock, 32, 64, stride=2, downsample=True, size=9),
    BlockCase("bottleneck", Bottleneck, 256, 64),
    BlockCase("bottleneck_stride2_downsample", Bottleneck, 128, 64, stride=2, downsample=True, size=9),
    BlockCase("bottleneck_resnext_groups32", Bottleneck, 256, 64, groups=32, base_width=4),
    BlockCase("bottleneck_wide", Bottleneck, 128, 32, base_width=128),
    BlockCase("bottleneck_dilation2", Bottleneck, 128, 32, dilation=2, size=9),
)
