"""Launching the Triton kernels: views, descriptors, grids, constants. Nothing is chosen and no output allocated here.

Activations are (N, C, H, W) tensors dense in channels_last; weights come from the `pack_*` functions. Importing this
module needs Triton; `backends.triton` imports it once it knows that Triton is usable.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels.bn_act import bn_act as bn_act_kernel
from ..kernels.configs import (
    GramDgradConfig,
    PointerConfig,
    PrologueConfig,
    StemConfig,
    TailConfig,
    TmaConfig,
    box_count,
    group_shape,
    programs,
)
from ..kernels.conv_pointer import conv_bn_act_pointer
from ..kernels.conv_prologue import conv_prologue as conv_prologue_kernel
from ..kernels.conv_tma import conv_bn_act_tma
from ..kernels.gram_dgrad import gram_dgrad as gram_dgrad_kernel
from ..kernels.max_pool import max_pool as max_pool_kernel
from ..kernels.stem import pack as pack_kernel
from ..kernels.tail import bottleneck_tail
from ..problems import (
    STEM_CHANNELS,
    STEM_WINDOW,
    ConvProblem,
    GramDgradProblem,
    PrologueProblem,
    StemProblem,
    TailProblem,
)
from ..shapes import Conv
from .descriptors import aligned, image, matrix, split_by_stride, strided, windows

REFUSALS = (OutOfResources, CompilationError, PTXASError)
"""What a launch raises where a configuration does not fit the GPU or its compiler: another path can be taken."""

_BN_ACT_BLOCK = 1024
_PACKED_TILE = (4, 256)  # rows, columns: a row of an image of ImageNet's size, padded
_POOLED = 2048  # values a program pools


class Norm(NamedTuple):
    """What the epilogue applies: (acc + conv_bias - mean) * rsqrt(var + eps) * weight + bias; None is left out.

    Vectors (C,) of any float dtype. A folded convolution has conv_bias alone; then mean is None.
    """

    conv_bias: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


class Statistics(NamedTuple):
    """Where a convolution leaves its output's statistics by tile of pixels, float32: see `kernels.statistics`."""

    mean: Tensor | None = None
    m2: Tensor | None = None
    count: Tensor | None = None


def pack_conv(weight: Tensor, problem: ConvProblem) -> Tensor:
    """conv2d's weight (K, C / groups, R, S) as the kernels read it, (K, R, S, channels of a group as they see it).

    Small groups are packed together, each output channel with zeros for the inputs that are not its group's: a NaN or
    Inf in one of those spreads to it. For channels_last dense weights this is a view.
    """
    weight = weight.permute(0, 2, 3, 1)
    groups, group_in, group_out = group_shape(problem)
    together = problem.conv.groups // groups
    if together == 1:
        return weight.contiguous()
    taps = weight.shape[1:3]
    weight = weight.reshape(groups, together, group_out // together, *taps, 1, group_in // together)
    own = torch.eye(together, dtype=torch.bool, device=weight.device).view(1, together, 1, 1, 1, together, 1)
    return torch.where(own, weight, 0.0).reshape(groups * group_out, *taps, group_in).contiguous()


def pack_stem(weight: Tensor) -> Tensor:
    """The stem's weight (K, C, R, S) as (K, R * a window's numbers): columns and channels filled up with zeros."""
    out_channels, channels, rows, columns = weight.shape
    packed = weight.new_zeros(out_channels, rows, STEM_WINDOW, STEM_CHANNELS)
    packed[:, :, :columns, :channels] = weight.permute(0, 2, 3, 1)
    return packed.flatten(1)


def conv(
    x: Tensor | TensorDescriptor,
    weight: Tensor,
    y: Tensor,
    problem: ConvProblem,
    config: PointerConfig | TmaConfig | StemConfig,
    norm: Norm,
    residual: Tensor | None = None,
    shortcut: Tensor | None = None,
    shortcut_weight: Tensor | None = None,
    shortcut_norm: Norm | None = None,
    residual_norm: Norm | None = None,
    statistics: Statistics | None = None,
    packed: bool = False,
) -> None:
    """Write `problem`'s result to y: act(norm(conv(x)) + residual, or + shortcut_norm(conv1x1(shortcut))).

    x: for a config with a box it may be a descriptor, split by the stride (`kernels.conv_tma`), of what is no tensor.
    residual_norm: pending on the residual. statistics: where y's go, `pixel_tiles(config, problem)` rows. packed: x is
    a stem's image, of which `problem`'s pixels are windows that begin two pixels apart (`kernels.stem`).
    """
    geometry, (groups, group_in, group_out) = problem.conv, group_shape(problem)
    branch = problem.shortcut or Conv(1, 1, 1, 1, 1)
    common = {
        "GROUP_IN": group_in,
        "GROUP_OUT": group_out,
        "R": geometry.kernel[0],
        "S": geometry.kernel[1],
        "PAD_H": geometry.padding[0],
        "PAD_W": geometry.padding[1],
        "DILATION_H": geometry.dilation[0],
        "DILATION_W": geometry.dilation[1],
        "SHORTCUT_IN": branch.in_channels,
        "RELU": problem.relu,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
    }
    norms = (tuple(residual_norm or Norm()), tuple(norm))
    more = (tuple(shortcut_norm or Norm()), tuple(statistics or Statistics()))
    if isinstance(config, PointerConfig):
        args = (x, weight, y, residual, *norms, shortcut, shortcut_weight, *more)
        width = x.shape[3] // 2 if packed else geometry.width
        sizes = (geometry.batch, geometry.height, width, geometry.out_height, geometry.out_width)
        constants = common | {
            "GROUPS": groups,
            "STRIDE_H": geometry.stride[0],
            "STRIDE_W": geometry.stride[1],
            "SHORTCUT_STRIDE_H": branch.stride[0],
            "SHORTCUT_STRIDE_W": branch.stride[1],
            "BLOCK_PIXELS": config.block_pixels,
            "PIXEL_STRIDE": 2 * STEM_CHANNELS if packed else groups * group_in,
        }
        kernel, args = conv_bn_act_pointer, (*args, *sizes, branch.height, branch.width)
    else:
        box, weights = config.box, [config.block_out, config.block_in]
        pixels = (*box, config.block_in)
        args = (
            x if isinstance(x, TensorDescriptor) else split_by_stride(x, geometry, pixels),
            matrix(weight, weights),
            image(y, (*box, config.block_out)),
            None if residual is None else image(aligned(residual), (*box, config.block_out)),
            *norms,
            None if shortcut is None else strided(shortcut, branch, pixels),
            None if shortcut is None else matrix(shortcut_weight, weights),
            *more,
            geometry.batch,
            geometry.out_height,
            geometry.out_width,
        )
        constants = common | {
            "OUT_CHANNELS": geometry.out_channels,
            "IN_CHANNELS": geometry.in_channels,
            "STRIDE": _kernel_stride(geometry),
            "EVEN": problem.statistics and box_count(box, geometry) * config.block_pixels == geometry.pixels,
            **_box(box),
        }
        kernel = conv_bn_act_tma
    launch(kernel, y, programs(config, problem), args, constants, config)


def conv_prologue(
    x: Tensor,
    x_norm: Norm,
    weight: Tensor,
    y: Tensor,
    problem: PrologueProblem,
    config: PrologueConfig,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    residual_norm: Norm | None = None,
    statistics: Statistics | None = None,
) -> None:
    """Write conv1x1(relu(x_norm(x))) to y, raw, and its statistics; or relu(norm(.) + residual)."""
    geometry = problem.conv
    constants = {
        "CHANNELS": geometry.in_channels,
        "OUT_CHANNELS": geometry.out_channels,
        "RELU": problem.joined,
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
        "SPLITS": config.splits,
        "EVEN": problem.statistics and geometry.pixels % config.block_pixels == 0,
    }
    norms = tuple(norm or Norm()), residual, tuple(residual_norm or Norm())
    args = (x, tuple(x_norm), weight, y, *norms, tuple(statistics or Statistics()), geometry.pixels)
    launch(conv_prologue_kernel, x, programs(config, problem), args, constants, config)


def gram_dgrad(
    dz: Tensor,
    x: Tensor,
    x_norm: Norm | None,
    dz_matrix: Tensor,
    x_matrix: Tensor,
    mean: Tensor,
    constant: Tensor,
    add: Tensor | None,
    dx: Tensor,
    problem: GramDgradProblem,
    config: GramDgradConfig,
) -> None:
    """Write the Gram form's data gradient to dx. The matrices are (C, K) and (C, C), a row a channel of dx, and dense,
    of x's dtype; mean and constant (C,) float32."""
    constants = {
        "CHANNELS": problem.conv.in_channels,
        "OUT_CHANNELS": problem.conv.out_channels,
        "BLOCK_PIXELS": config.block_pixels,
        "BLOCK_OUT": config.block_out,
        "BLOCK_IN": config.block_in,
    }
    args = (dz, x, tuple(x_norm or Norm()), dz_matrix, x_matrix, mean, constant, add, dx, problem.conv.pixels)
    launch(gram_dgrad_kernel, x, programs(config, problem), args, constants, config)


def tail(
    x: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    y: Tensor,
    next_y: Tensor | None,
    problem: TailProblem,
    config: TailConfig,
    shortcut: Tensor,
) -> None:
    """Write `problem`'s results to y and next_y.

    weights, biases: packed, of conv2, conv3, then the shortcut's and the next convolution's where `problem` has them.
    shortcut: the shortcut convolution's input, or the residual where there is no such convolution.
    """
    conv2, branch, following = problem.conv2, problem.shortcut, problem.next_conv
    more = iter(zip(weights[2:], biases[2:], strict=True))
    branch_weight, branch_bias = next(more) if branch else (None, None)
    next_weight, next_bias = next(more) if following else (None, None)
    box, last, mid = config.box, problem.conv3.out_channels, conv2.out_channels
    out_box = (*box, config.block_out)
    args = (
        split_by_stride(x, conv2, (*box, config.block_in)),
        matrix(weights[0], [mid, config.block_in]),
        biases[0],
        matrix(weights[1], [config.block_out, mid]),
        biases[1],
        None if branch else image(aligned(shortcut), out_box),
        strided(shortcut, branch, (*box, branch.in_channels)) if branch else None,
        matrix(branch_weight, [config.block_out, branch.in_channels]) if branch else None,
        branch_bias,
        image(y, out_box),
        matrix(next_weight, [following.out_channels, config.block_out]) if following else None,
        next_bias,
        image(next_y, (*box, following.out_channels)) if following else None,
        conv2.out_height,
        conv2.out_width,
    )
    constants = {
        "MID": mid,
        "OUT": last,
        "NEXT": following.out_channels if following else 0,
        "SHORTCUT_IN": branch.in_channels if branch else 0,
        "STRIDE": _kernel_stride(conv2),
        "DILATION": conv2.dilation[0],
        "BLOCK_IN": config.block_in,
        "BLOCK_OUT": config.block_out,
        **_box(box),
    }
    launch(bottleneck_tail, x, programs(config, problem), args, constants, config)


def stem(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    problem: StemProblem,
    config: StemConfig | PointerConfig,
    norm: Norm,
    packed: Tensor,
    conv_out: Tensor,
) -> None:
    """Write max_pool(relu(norm(conv(x)))) to y, in three launches.

    x: of any strides and float dtype. weight: from `pack_stem`. packed, conv_out: what lies between the launches,
    tensors of `problem.packed_shape` and of the convolution's output, in channels_last and of y's dtype.
    """
    stem_pack(x, packed, problem)
    stem_conv(packed, weight, conv_out, problem, config, norm)
    max_pool(conv_out, y)


def stem_pack(x: Tensor, packed: Tensor, problem: StemProblem) -> None:
    """Write x, zeros around it, to `packed`."""
    (_, channels, height, width), (batch, _, rows, columns) = x.shape, packed.shape
    tile_h, tile_w = _PACKED_TILE
    constants = {"CHANNELS": channels, "TILE_H": tile_h, "TILE_W": tile_w}
    args = (x, packed, *x.stride(), height, width, rows, columns, *problem.conv.padding)
    launch(pack_kernel, x, batch * -(-rows // tile_h) * -(-columns // tile_w), args, constants, None)


def stem_conv(
    packed: Tensor,
    weight: Tensor,
    conv_out: Tensor,
    problem: StemProblem,
    config: StemConfig | PointerConfig,
    norm: Norm,
) -> None:
    """Write relu(norm(conv(x))) to conv_out, x packed."""
    x = packed
    if isinstance(config, StemConfig):
        x = windows(packed, problem, (*config.box, config.block_in))
    conv(x, weight, conv_out, problem.windows, config, norm, packed=True)


def max_pool(x: Tensor, y: Tensor) -> None:
    """Write max_pool(x, 3, stride 2, padding 1) to y; both dense in channels_last and of one dtype."""
    (batch, channels, height, width), (rows, columns) = x.shape, y.shape[2:]
    tile, count = pool_tile(channels, batch, rows, columns)
    args = (x, y, height, width, rows, columns)
    launch(max_pool_kernel, x, count, args, {"CHANNELS": channels, **tile}, None)


def pooled_like(x: Tensor) -> Tensor:
    """An empty tensor for the max-pool of x, in channels_last."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, (height - 1) // 2 + 1, (width - 1) // 2 + 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def pool_tile(channels: int, batch: int, rows: int, columns: int, values: int = _POOLED) -> tuple[dict[str, int], int]:
    """What a program of the pooling kernels has of so many pooled pixels, and how many programs there are."""
    block_channels = min(128, 1 << (channels - 1).bit_length())
    tile_h = 4
    tile_w = values // block_channels // tile_h
    count = batch * -(-rows // tile_h) * -(-columns // tile_w) * -(-channels // block_channels)
    return {"TILE_H": tile_h, "TILE_W": tile_w, "BLOCK_CHANNELS": block_channels}, count


def bn_act(x: Tensor, y: Tensor, norm: Norm, residual: Tensor | None, relu: bool) -> None:
    """Write act(norm(x) + residual) to y; all three dense in the same memory format, channels_last or contiguous."""
    plane = 1 if x.is_contiguous(memory_format=torch.channels_last) else x.shape[2] * x.shape[3]
    constants = {"CHANNELS": x.shape[1], "PLANE": plane, "RELU": relu, "BLOCK": _BN_ACT_BLOCK}
    args = (x, y, residual, tuple(norm), x.numel())
    launch(bn_act_kernel, x, -(-x.numel() // _BN_ACT_BLOCK), args, constants, None)


def launch(kernel, x: Tensor, grid: int, args: tuple, constants: dict, config) -> None:
    """The one place where a kernel starts, on x's device; the compile-only tests put theirs in its place.

    What was compiled is looked up here: Triton's own look-up, made for any kernel, takes the host three times as long,
    and a training step has hundreds of launches.
    """
    key = (kernel.fn, x.device, config, *constants.values(), *_kinds(args, []))
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    with torch.cuda.device(x.device) if elsewhere else contextlib.nullcontext():
        if (compiled := _compiled.get(key)) is not None:
            compiled[grid, 1, 1](*args, *(constants[name] for name in kernel.arg_names[len(args) :]))
            return
        compiled = kernel[(grid,)](*args, **constants, **_options(config))
        if isinstance(compiled, CompiledKernel):  # Triton's interpreter compiles nothing
            _compiled[key] = compiled


_compiled: dict[tuple, CompiledKernel] = {}


def compile_only(kernel, x: Tensor, grid: int, args: tuple, constants: dict, config) -> None:
    """Compile what `launch`, in whose place this is put, would start."""
    kernel.warmup(*args, grid=(grid,), **constants, **_options(config))


def _options(config) -> dict[str, int]:
    return {} if config is None else {"num_warps": config.warps, "num_stages": config.stages}


def _kinds(args: tuple, found: list) -> list:
    """What Triton compiles a kernel for, of each argument: dtypes, alignment, blocks, sizes that are 1 or multiples."""
    for arg in args:
        if arg is None:
            found.append(None)
        elif isinstance(arg, Tensor):
            found += arg.dtype, arg.data_ptr() % 16 == 0
        elif isinstance(arg, tuple):
            _kinds(arg, found)
        elif isinstance(arg, int):
            found += arg == 1, arg % 16 == 0, arg > _INT32_MAX
        elif isinstance(arg, TensorDescriptor):
            found += arg.base.dtype, *arg.block_shape
        else:
            found.append(type(arg))
    return found


_INT32_MAX = 2**31 - 1


def _kernel_stride(geometry: Conv) -> int:
    return 1 if geometry.pointwise else geometry.stride[0]


def _box(box: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("BOX_N", "BOX_H", "BOX_W"), box, strict=True))
