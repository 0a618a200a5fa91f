"""Gradients of the ops, at the dispatcher's Autograd key, so that FX, torch.compile and export see one op per stage.

Each backward is one op too. Under create_graph=True it is computed again in differentiable PyTorch instead, so double
backward is right rather than silently absent.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import ops
from .backends import inference
from .context import is_batched

_ops = torch.ops.resnet_fast


def _setup_bn_act(ctx, inputs, output):
    x, weight, bias, mean, var, residual, eps, relu, backend = inputs
    _save(ctx, x, output if relu and residual is not None else None, weight, bias, mean, var)
    ctx.call = (eps, relu, False)
    ctx.backend = backend


def _setup_bn_act_train(ctx, inputs, output):
    x, weight, bias, residual, eps, relu, backend = inputs
    y, mean, var = output
    ctx.mark_non_differentiable(mean, var)
    _save(ctx, x, y if relu and residual is not None else None, weight, bias, mean, var)
    ctx.call = (eps, relu, True)
    ctx.backend = backend


def _bn_act_grads(ctx, dy: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, bias, residual."""
    x, y, weight, bias, mean, var = ctx.saved_tensors
    eps, relu, training = ctx.call
    if torch.is_grad_enabled():
        if relu and y is None:
            y = _ops.bn_act(x, weight, bias, mean, var, None, eps, False, ctx.backend).detach()
        return _differentiable_grads(x, (x, weight, bias), dy, y, weight, bias, mean, var, *ctx.call, mask)
    grads = _ops.bn_act_backward(dy, x, y, weight, bias, mean, var, eps, relu, training, mask, ctx.backend)
    return _as(grads, mask, (x, weight, bias, dy))


def _bn_act_backward(ctx, dy):
    if dy is None:
        return (None,) * 9
    needs_x, needs_weight, needs_bias, _, _, needs_residual = ctx.needs_input_grad[:6]
    dx, dweight, dbias, dresidual = _bn_act_grads(ctx, dy, [needs_x, needs_weight, needs_bias, needs_residual])
    return dx, dweight, dbias, None, None, dresidual, None, None, None


def _bn_act_train_backward(ctx, dy, _dmean, _dvar):
    if dy is None:
        return (None,) * 7
    return *_bn_act_grads(ctx, dy, list(ctx.needs_input_grad[:4])), None, None, None


def _setup_conv_bn_act(ctx, inputs, output):
    x, conv_weight, conv_bias, weight, bias, mean, var, _residual, *conv, eps, relu, backend = inputs
    # No convolution output exists to recompute the mask from, so y is kept.
    _save(ctx, x, conv_weight, conv_bias, None, output if relu else None, weight, bias, mean, var)
    ctx.conv, ctx.call, ctx.backend = conv, (eps, relu, False), backend


def _setup_conv_bn_act_train(ctx, inputs, output):
    x, conv_weight, conv_bias, weight, bias, residual, *conv, eps, relu, backend = inputs
    y, conv_out, mean, var = output
    ctx.mark_non_differentiable(conv_out, mean, var)
    y = y if relu and residual is not None else None
    _save(ctx, x, conv_weight, conv_bias, conv_out, y, weight, bias, mean, var)
    ctx.conv, ctx.call, ctx.backend = conv, (eps, relu, True), backend


def _conv_bn_act_grads(ctx, dy: Tensor, mask: list[bool]) -> tuple[Tensor | None, ...]:
    """Gradients of x, conv_weight, conv_bias, weight, bias, residual."""
    x, conv_weight, conv_bias, conv_out, y, weight, bias, mean, var = ctx.saved_tensors
    eps, relu, training = ctx.call
    if torch.is_grad_enabled():
        if relu and y is None:
            y = _ops.bn_act(conv_out, weight, bias, mean, var, None, eps, False, ctx.backend).detach()
        stride, padding, dilation, groups = ctx.conv
        conv_out = F.conv2d(x, conv_weight, conv_bias, tuple(stride), tuple(padding), tuple(dilation), groups)
        inputs = (x, conv_weight, conv_bias, weight, bias)
        return _differentiable_grads(conv_out, inputs, dy, y, weight, bias, mean, var, *ctx.call, mask)
    if conv_out is None:  # inference statistics: only weight's gradient needs the convolution's output
        if mask[3] or not relu:
            conv_out = torch.ops.aten.convolution(x, conv_weight, conv_bias, *ctx.conv[:3], False, [0, 0], ctx.conv[3])
        else:
            conv_out = y
    grads = _ops.conv_bn_act_backward(
        dy, x, conv_weight, conv_out, y, weight, bias, mean, var, *ctx.conv, eps, relu, training, mask, ctx.backend
    )
    return _as(grads, mask, (x, conv_weight, conv_bias, weight, bias, dy))


def _conv_bn_act_backward(ctx, dy):
    if dy is None:
        return (None,) * 15
    needs = ctx.needs_input_grad
    *grads, dresidual = _conv_bn_act_grads(ctx, dy, [*needs[:5], needs[7]])
    return *grads, None, None, dresidual, *(None,) * 7


def _conv_bn_act_train_backward(ctx, dy, _dconv_out, _dmean, _dvar):
    if dy is None:
        return (None,) * 13
    return *_conv_bn_act_grads(ctx, dy, list(ctx.needs_input_grad[:6])), *(None,) * 7


def _setup_conv_bn_shortcut_act(ctx, inputs, output):
    ctx.tensor_at = [place for place, value in enumerate(inputs) if isinstance(value, Tensor)]
    ctx.save_for_backward(*(inputs[place] for place in ctx.tensor_at))
    ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]


def _conv_bn_shortcut_act_backward(ctx, dy):
    """An op for inference: its gradient is that of the two it stands for, computed again."""
    inputs = list(ctx.inputs)
    for place, tensor in zip(ctx.tensor_at, ctx.saved_tensors, strict=True):
        inputs[place] = tensor
    wanted = [place for place in ctx.tensor_at if ctx.needs_input_grad[place]]
    differentiable = torch.is_grad_enabled()  # create_graph=True
    with torch.enable_grad():
        if not differentiable:
            for place in wanted:
                inputs[place] = inputs[place].detach().requires_grad_()
        *main, eps = inputs[:12]
        *branch, stride, shortcut_eps, relu, backend = inputs[12:]
        residual = _ops.conv_bn_act(*branch, None, stride, [0, 0], [1, 1], 1, shortcut_eps, False, backend)
        y = _ops.conv_bn_act(*main[:7], residual, *main[7:], eps, relu, backend)
        grads = torch.autograd.grad(y, [inputs[place] for place in wanted], dy, create_graph=differentiable)
    result: list[Tensor | None] = [None] * len(inputs)
    for place, grad in zip(wanted, grads, strict=True):
        result[place] = grad
    return tuple(result)


def _setup_residual_block(ctx, inputs, output):
    x, residual, conv_weights, weights, biases, means, variances, *rest = inputs
    ctx.save_for_backward(x, residual, *conv_weights, *weights, *biases, *means, *variances)
    ctx.count, ctx.rest = len(conv_weights), rest


def _residual_block_backward(ctx, dy):
    """As `_conv_bn_shortcut_act_backward`: layer by layer, computed again."""
    count, (*rest, backend) = ctx.count, ctx.rest

    def block(x, residual, *columns):
        columns = [list(columns[at : at + count]) for at in range(0, 5 * count, count)]
        return _layer_by_layer(backend)[0](x, residual, *columns, *rest)

    needed = [*ctx.needs_input_grad[:2], *(flag for column in ctx.needs_input_grad[2:7] for flag in column)]
    grads = _recomputed_grads(block, ctx.saved_tensors, needed, dy)
    lists = (grads[at : at + count] for at in range(2, len(grads), count))
    return *grads[:2], *lists, *(None,) * len(ctx.rest)


def _setup_stem(ctx, inputs, output):
    *tensors, geometry, eps, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.rest = geometry, eps, backend


def _stem_backward(ctx, dy):
    *rest, backend = ctx.rest
    grads = _recomputed_grads(
        lambda *tensors: _layer_by_layer(backend)[1](*tensors, *rest), ctx.saved_tensors, ctx.needs_input_grad, dy
    )
    return *grads, *(None,) * len(ctx.rest)


def _layer_by_layer(backend: str):
    """residual_block and stem by differentiable ops."""
    return inference.make(
        lambda *args: _ops.conv_bn_act(*args, backend), lambda *args: _ops.conv_bn_shortcut_act(*args, backend)
    )


def _recomputed_grads(function, saved, needed, dy: Tensor) -> list[Tensor | None]:
    """The gradients of function(*saved) that are needed, differentiable under create_graph=True."""
    tensors, differentiable = list(saved), torch.is_grad_enabled()
    wanted = [place for place in range(len(tensors)) if needed[place]]
    with torch.enable_grad():
        if not differentiable:
            for place in wanted:
                tensors[place] = tensors[place].detach().requires_grad_()
        inputs = [tensors[place] for place in wanted]
        found = torch.autograd.grad(function(*tensors), inputs, dy, create_graph=differentiable)
    grads: list[Tensor | None] = [None] * len(tensors)
    for place, grad in zip(wanted, found, strict=True):
        grads[place] = grad
    return grads


def _differentiable_grads(z_input, inputs, dy, y, weight, bias, mean, var, eps, relu, training, mask):
    """The gradients as a differentiable function of `inputs` and `dy`; the residual's gradient, dz, comes last."""
    dz = dy.masked_fill(y <= 0, 0.0) if relu else dy
    statistics = (None, None) if training else (mean.to(z_input.dtype), var.to(z_input.dtype))
    if weight is not None and not training:
        statistics = tuple(s.to(weight.dtype) for s in statistics)
    z = F.batch_norm(z_input, *statistics, weight, bias, training, 0.0, eps)
    wanted = [tensor for tensor, wants in zip(inputs, mask, strict=False) if wants]
    grads = iter(torch.autograd.grad(z, wanted, dz, create_graph=True) if wanted else ())
    return *(next(grads) if wants else None for wants in mask[:-1]), dz if mask[-1] else None


def seen_through(backward: Callable) -> Callable:
    """`backward`, in differentiable PyTorch where vmap has to see what becomes of the gradients: is_grads_batched."""

    @functools.wraps(backward)
    def run(ctx, *grads, **rest):
        if torch.is_grad_enabled() or not any(isinstance(grad, Tensor) and is_batched(grad) for grad in grads):
            return backward(ctx, *grads, **rest)
        with torch.enable_grad():
            found = backward(ctx, *grads, **rest)
        return tree_map_only(Tensor, torch.clone, found)  # without their graph; is_grads_batched knows no detach

    return run


def _save(ctx, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)  # the statistics have no gradient; zeros for them would be memory traffic


def _as(grads, mask, inputs) -> tuple[Tensor | None, ...]:
    """Unwanted gradients become None, the others take their input's dtype."""
    return tuple(g.to(tensor.dtype) if wanted else None for g, wanted, tensor in zip(grads, mask, inputs, strict=True))


for _name, _setup, _backward in (
    ("bn_act", _setup_bn_act, _bn_act_backward),
    ("bn_act_train", _setup_bn_act_train, _bn_act_train_backward),
    ("conv_bn_act", _setup_conv_bn_act, _conv_bn_act_backward),
    ("conv_bn_shortcut_act", _setup_conv_bn_shortcut_act, _conv_bn_shortcut_act_backward),
    ("residual_block", _setup_residual_block, _residual_block_backward),
    ("stem", _setup_stem, _stem_backward),
    ("conv_bn_act_train", _setup_conv_bn_act_train, _conv_bn_act_train_backward),
):
    torch.library.register_autograd(
        f"resnet_fast::{_name}", seen_through(_backward), setup_context=_setup, lib=ops.library
    )
