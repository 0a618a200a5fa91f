"""A residual block's training step, forward and backward, in a backend's primitives; and the stem's.

    y = relu(bn_n(conv_n(... relu(bn_1(conv_1(x))))) + shortcut),   shortcut: x, a given tensor, or bn_d(conv_d(x))

What is saved for the backward are the convolutions' raw outputs, and no activation between them: those are computed
again from raw output and statistics. Each layer has its stage (`resnet_fast.training`); in stage 4 not even its raw
output exists:

The Gram form of a 1x1 convolution c = W a. With m = mean(a) and S = cov(a), (C, C):
    mean(c) = W m,  var(c) = rowsum((W S) * W)
so that the statistics are known before c is, and c is normalised, joined and activated where it is made. Backward, with
dz the gradient of bn(c), M pixels, G = sum(dz (outer) (a - m)), s = sum(dz), scale = weight * rstd,
d = W m - mean(c) (zero, but for statistics that other processes contributed to):
    t = sum(dz * (c - mean(c))) = rowsum(G * W) + s * d
    dweight = t * rstd,  dbias = s,  k = scale * rstd^2 * t / M,  q = scale * s / M
    dW = scale * (G + s (outer) m) - q (outer) sum(a) - k * (M_here * W S + d (outer) sum(a))
    da = (dz * scale - q - k * (W (a - m) + d)) @ W

Statistics of a SyncBatchNorm are merged between the kernels, in the order of ranks.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..training import GRAM, PROLOGUE
from .primitives import Geometry, Norm, Shortcut


@dataclass(frozen=True)
class Layer:
    """One convolution and its batch norm. `batch_statistics`: the batch's own, else the running ones."""

    conv_weight: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    geometry: Geometry
    eps: float
    batch_statistics: bool
    stage: int

    def norm(self, mean: Tensor, var: Tensor) -> Norm:
        return Norm(mean, var, self.weight, self.bias, self.eps)

    def count(self, x: Tensor) -> int:
        """How many values a channel of this convolution's output has, for a 1x1 input x."""
        (down, right), (batch, _, height, width) = self.geometry.stride, x.shape
        return batch * (-(-height // down)) * (-(-width // right))


@dataclass
class Record:
    """What a layer's forward leaves for its backward; None where there is no such thing.

    conv_out: raw output. mean, var: what it was normalised with, (K,). count: values behind them, a 0-dim tensor where
    other processes contributed. input_mean, input_cov: of stage 4, (C,) and (C, C), of this process's pixels. index: of
    a max-pool behind the layer's ReLU, `reference.pool`'s.
    """

    conv_out: Tensor | None = None
    mean: Tensor | None = None
    var: Tensor | None = None
    count: Tensor | None = None
    input_mean: Tensor | None = None
    input_cov: Tensor | None = None
    index: Tensor | None = None


@dataclass
class Grads:
    """A layer's gradients; None where not wanted. unscaled_weight: weight's before `_scale` multiplies it by rstd."""

    conv_weight: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    unscaled_weight: Tensor | None = None


@dataclass(frozen=True)
class Wants:
    """Which of a layer's gradients are wanted; `input`: whether that of its input is, for whatever is before it."""

    conv_weight: bool
    weight: bool
    bias: bool
    input: bool

    @property
    def anything(self) -> bool:
        return self.conv_weight or self.weight or self.bias or self.input


def forward(
    primitives, x: Tensor, residual: Tensor | None, layers: list[Layer], downsample: bool, group: str
) -> tuple[Tensor, list[Record]]:
    """The block's output and a record a layer. layers: in order, the downsample's last; residual: instead of x."""
    main = layers[:-1] if downsample else layers
    records, value, norm = [], x, None
    for layer in main[:-1]:
        value, norm, record = _raw(primitives, layer, value, norm, group)
        records.append(record)

    last = main[-1]
    if last.stage == GRAM:
        records.append(_gram(primitives, last, value, norm, group))
    else:
        value, norm, record = _raw(primitives, last, value, norm, group)
        records.append(record)
    own = records[-1]
    if not downsample:
        added, added_norm, shortcut = (x if residual is None else residual), None, None
    elif (branch := layers[-1]).stage == GRAM:
        records.append(_gram(primitives, branch, x, None, group))
        branch_norm = branch.norm(records[-1].mean, records[-1].var)
        added, added_norm, shortcut = None, None, Shortcut(x, branch.conv_weight, branch.geometry, branch_norm)
    else:
        added, added_norm, record = _raw(primitives, branch, x, None, group)
        records.append(record)
        shortcut = None

    if last.stage == GRAM:
        main_norm = last.norm(own.mean, own.var)
        y = primitives.conv_join(value, norm, last.conv_weight, last.geometry, main_norm, added, added_norm, shortcut)
    elif shortcut is not None:
        y = primitives.conv_join(shortcut.x, None, *shortcut[1:], value, norm)
    else:
        y = primitives.apply(value, norm, added, added_norm)
    return y, records


def backward(
    primitives,
    dy: Tensor,
    x: Tensor,
    y: Tensor,
    layers: list[Layer],
    records: list[Record],
    wants: list[Wants],
    downsample: bool,
    identity: bool,
    group: str,
) -> tuple[Tensor | None, Tensor, list[Grads]]:
    """dx (None unless wanted), dz, which is the gradient of a given residual, and the gradients a layer.

    identity: the shortcut is x itself, so that dz is added to dx.
    """
    dz = primitives.mask(dy, y, x)
    main = layers[:-1] if downsample else layers
    grads: list[Grads] = [Grads() for _ in layers]
    dx = None
    if downsample and wants[-1].anything:
        dx, grads[-1] = _layer_backward(primitives, dz, layers[-1], records[-1], wants[-1], x, None, False, None, group)
    elif identity:
        dx = dz
    upstream: Tensor | None = dz
    for number in reversed(range(len(main))):
        if not wants[number].anything:
            break
        value, norm = x, None
        if number > 0:
            before = records[number - 1]
            value, norm = before.conv_out, main[number - 1].norm(before.mean, before.var)
        upstream, grads[number] = _layer_backward(
            primitives,
            upstream,
            main[number],
            records[number],
            wants[number],
            value,
            norm,
            number < len(main) - 1,
            dx if number == 0 and wants[0].input else None,
            group,
        )
    _scale(layers, records, grads)
    return upstream if wants[0].input else None, dz, grads


def _scale(layers: list[Layer], records: list[Record], grads: list[Grads]) -> None:
    """The gradients of the norms' weights, in a few launches for all layers."""
    wanted = [number for number, grad in enumerate(grads) if grad.unscaled_weight is not None]
    if wanted:
        variances = [records[number].var for number in wanted]
        rstds = torch._foreach_rsqrt(torch._foreach_add(variances, [layers[number].eps for number in wanted]))
        weights = torch._foreach_mul([grads[number].unscaled_weight for number in wanted], rstds)
        for number, weight in zip(wanted, weights, strict=True):
            grads[number].weight = weight


def stem_forward(primitives, x: Tensor, layer: Layer, group: str) -> tuple[Tensor, Record]:
    """max_pool(relu(bn(conv(x)))) and the record."""
    conv_out, norm, record = _raw(primitives, layer, x, None, group)
    y, record.index = primitives.pool(conv_out, norm)
    return y, record


def stem_backward(
    primitives, dy: Tensor, x: Tensor, layer: Layer, record: Record, wants: Wants, group: str
) -> tuple[Tensor | None, Grads]:
    """dx and the layer's gradients."""
    dx, grads = _layer_backward(primitives, dy, layer, record, wants, x, None, True, None, group)
    _scale([layer], [record], [grads])
    return dx, grads


def _raw(primitives, layer: Layer, value: Tensor, norm: Norm | None, group: str):
    """The layer's raw output, the norm that is pending on it, the record; `norm` is pending on `value`."""
    if norm is not None and layer.stage < PROLOGUE:
        value, norm = primitives.apply(value, norm), None
    conv_out, mean, var = primitives.conv(
        value, norm, layer.conv_weight, layer.geometry, layer.stage, layer.batch_statistics
    )
    count = None
    if layer.batch_statistics:
        mean, var, count = _merged(mean, var, conv_out.numel() // conv_out.shape[1], group)
    else:
        wide = torch.float64 if conv_out.dtype == torch.float64 else torch.float32
        mean, var = (vector.to(wide, copy=True) for vector in (layer.running_mean, layer.running_var))
    return conv_out, layer.norm(mean, var), Record(conv_out, mean, var, count)


def _gram(primitives, layer: Layer, value: Tensor, norm: Norm | None, group: str) -> Record:
    """The record of a layer whose raw output is not made: its statistics, from those of its input."""
    input_mean, input_cov = primitives.gram(value, norm, layer.geometry)
    matrix = _matrix(layer, input_mean)
    mean, var = matrix @ input_mean, ((matrix @ input_cov) * matrix).sum(1).clamp_(min=0)
    mean, var, count = _merged(mean, var, layer.count(value), group)
    return Record(None, mean, var, count, input_mean, input_cov)


def _layer_backward(
    primitives, dy, layer: Layer, record: Record, wants: Wants, value, norm, relu: bool, add, group: str
) -> tuple[Tensor | None, Grads]:
    """The gradient of act(value), plus `add`, and the layer's. relu: a ReLU follows the layer, and then a max-pool if
    the record has its index."""
    if record.input_cov is not None:
        return _gram_backward(primitives, dy, layer, record, wants, value, norm, add, group)
    conv_out, own = record.conv_out, layer.norm(record.mean, record.var)
    grads, mean_dz, mean_dzx = Grads(), None, None
    wants_conv = wants.input or wants.conv_weight
    if wants.weight or wants.bias or (wants_conv and layer.batch_statistics):
        sum_dz, sum_dzx = primitives.backward_reduce(dy, conv_out, own, relu, record.index)
        if wants.weight:
            grads.unscaled_weight = sum_dzx
        if wants.bias:
            grads.bias = sum_dz
        if wants_conv and layer.batch_statistics:
            count = conv_out.numel() // conv_out.shape[1] if record.count is None else record.count
            mean_dz, mean_dzx = torch._foreach_div(_summed(sum_dz, sum_dzx, group), count)
    if not wants_conv:
        return None, grads
    dconv_out = primitives.backward_apply(dy, conv_out, own, relu, mean_dz, mean_dzx, record.index)
    dvalue, grads.conv_weight = primitives.conv_backward(
        dconv_out, value, norm, layer.conv_weight, layer.geometry, layer.stage, wants.input, wants.conv_weight, add
    )
    return dvalue, grads


def _gram_backward(
    primitives, dz, layer: Layer, record: Record, wants: Wants, value, norm, add, group: str
) -> tuple[Tensor | None, Grads]:
    """`_layer_backward` in the Gram form; the names are those of the formulas above."""
    m, cov, here = record.input_mean, record.input_cov, layer.count(value)
    pixels = here if record.count is None else record.count
    matrix = _matrix(layer, m)
    rstd = torch.rsqrt(record.var + layer.eps)
    scale = layer.norm(record.mean, record.var).scale(m.dtype)
    d = matrix @ m - record.mean if record.count is not None else torch.zeros_like(record.mean)
    outer, s = primitives.outer(dz, value, norm, layer.geometry, m)
    t = (outer * matrix).sum(1) + s * d
    grads = Grads(weight=t * rstd if wants.weight else None, bias=s if wants.bias else None)
    s_all, t_all = _summed(s, t, group)
    q, k = scale * s_all / pixels, scale * rstd * rstd * t_all / pixels
    if wants.conv_weight:
        dmatrix = scale[:, None] * (outer + torch.outer(s, m)) - torch.outer(q + k * d, here * m)
        dmatrix -= k[:, None] * (here * (matrix @ cov))
        grads.conv_weight = _like_weight(dmatrix, layer.conv_weight)
    dvalue = None
    if wants.input:
        x_matrix = -(matrix * k[:, None]).t() @ matrix
        constant = -((q + k * d) @ matrix)
        dz_matrix = matrix * scale[:, None]
        dvalue = primitives.gram_dgrad(dz, value, norm, layer.geometry, dz_matrix, x_matrix, m, constant, add)
    return dvalue, grads


def _matrix(layer: Layer, like: Tensor) -> Tensor:
    """A 1x1's weight as (K, C), in the accumulation dtype."""
    return layer.conv_weight.flatten(1).to(like.dtype)


def _like_weight(matrix: Tensor, conv_weight: Tensor) -> Tensor:
    return torch.empty_like(conv_weight).copy_(matrix.view(conv_weight.shape))


def _merged(mean: Tensor, var: Tensor, count: int, group: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Statistics over all processes of `group`, and how many values they are of; of this one's if it is ""."""
    if not group:
        return mean, var, None
    members = _members(group)
    channels, rank = mean.numel(), dist.get_rank(members)
    rows = mean.new_zeros(dist.get_world_size(members), 2 * channels + 1)
    if count:
        rows[rank, :channels], rows[rank, channels:-1], rows[rank, -1] = mean, var, count
    dist.all_reduce(rows, group=members)
    means, variances, counts = rows[:, :channels], rows[:, channels:-1], rows[:, -1:]
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = ((variances + (means - mean).square()) * counts).sum(0) / total
    return mean, var, total


def _summed(first: Tensor, second: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """Both summed over all processes of `group`."""
    if not group:
        return first, second
    both = torch.stack((first, second))
    dist.all_reduce(both, group=_members(group))
    return both[0], both[1]


def _members(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)
