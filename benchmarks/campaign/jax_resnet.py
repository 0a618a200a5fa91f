"""A torchvision ResNet's inference in JAX, for XLA to compile: NHWC, batch norm folded, the same weights."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from torch import Tensor, nn

from resnet_fast.frozen import fold


def compiled(model: nn.Module, images: Tensor) -> Callable[[Tensor], jax.Array]:
    """`model` under jax.jit on `images` (N, 3, H, W), which are handed over once. A call waits for its logits.

    Raises:
        RuntimeError: the images are on a GPU that JAX does not use.
    """
    if images.is_cuda and jax.default_backend() != "gpu":
        raise RuntimeError(f"JAX runs on {jax.default_backend()!r} here")
    dtype = str(images.dtype).removeprefix("torch.")
    weights, layers = _weights(model, dtype), _layers(model)
    forward = jax.jit(lambda weights, x: _forward(layers, weights, x))
    x = _array(images.permute(0, 2, 3, 1), dtype)
    return lambda _: forward(weights, x).block_until_ready()


def to_torch(images: Tensor) -> Callable[[jax.Array], Tensor]:
    """Makes tensors like `images` of logits."""
    return lambda logits: torch.from_numpy(np.array(logits.astype(jnp.float32))).to(images.device, images.dtype)


def _layers(model: nn.Module) -> list:
    """The network's structure: of each block, the settings of its convolutions and whether it has a downsample."""
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    return [_settings(model.conv1)] + [
        ([_settings(conv) for conv, _ in _stages(block)], block.downsample and _settings(block.downsample[0]))
        for block in blocks
    ]


def _weights(model: nn.Module, dtype: str) -> dict:
    """The arrays in the order of `_layers`."""
    blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
    return {
        "stem": _folded(model.conv1, model.bn1, dtype),
        "blocks": [
            (
                [_folded(conv, bn, dtype) for conv, bn in _stages(block)],
                block.downsample and _folded(*block.downsample, dtype),
            )
            for block in blocks
        ],
        "fc": (_array(model.fc.weight.t(), dtype), _array(model.fc.bias, dtype)),
    }


def _forward(layers: list, weights: dict, x: jax.Array) -> jax.Array:
    stem, *blocks = layers
    x = jax.nn.relu(_conv(x, weights["stem"], stem))
    x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for (settings, downsample), (arrays, downsample_arrays) in zip(blocks, weights["blocks"], strict=True):
        y = x
        for place, (setting, array) in enumerate(zip(settings, arrays, strict=True), 1):
            y = _conv(y, array, setting)
            if place < len(settings):
                y = jax.nn.relu(y)
        x = jax.nn.relu(y + (_conv(x, downsample_arrays, downsample) if downsample else x))
    weight, bias = weights["fc"]
    return x.mean((1, 2)) @ weight + bias


def _conv(x: jax.Array, arrays: tuple, settings: tuple) -> jax.Array:
    (weight, bias), (stride, padding, dilation, groups) = arrays, settings
    y = lax.conv_general_dilated(
        x,
        weight,
        stride,
        [(size, size) for size in padding],
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + bias


def _stages(block: nn.Module) -> list[tuple[nn.Conv2d, nn.Module]]:
    numbers = (1, 2, 3) if hasattr(block, "conv3") else (1, 2)
    return [(getattr(block, f"conv{number}"), getattr(block, f"bn{number}")) for number in numbers]


def _settings(conv: nn.Conv2d) -> tuple:
    return conv.stride, conv.padding, conv.dilation, conv.groups


def _folded(conv: nn.Conv2d, bn: nn.Module, dtype: str) -> tuple[jax.Array, jax.Array]:
    weight, bias = fold(conv, bn, torch.float32)
    return _array(weight.permute(2, 3, 1, 0), dtype), _array(bias, dtype)


def _array(tensor: Tensor, dtype: str) -> jax.Array:
    return jnp.asarray(tensor.detach().float().cpu().numpy(), dtype)
