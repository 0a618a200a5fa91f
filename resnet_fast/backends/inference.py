"""`ops.residual_block` and `ops.stem` for backends without kernels of their own for them: one op a convolution."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

_Op = Callable[..., Tensor]


def max_pool(x: Tensor) -> Tensor:
    """max_pool2d(x, 3, stride 2, padding 1), PyTorch's."""
    return F.max_pool2d(x, 3, 2, 1)


def make(conv_bn_act: _Op, conv_bn_shortcut_act: _Op, max_pool: _Op = max_pool) -> tuple[_Op, _Op]:
    """residual_block and stem by the ops, which are a backend's."""

    def residual_block(
        x, residual, conv_weights, weights, biases, running_means, running_vars, geometry, eps, downsample
    ):
        """relu(F(x) + shortcut): x, `residual`, or the last layer where `downsample`."""
        columns = zip(conv_weights, weights, biases, running_means, running_vars, strict=True)
        layers = [
            (conv_weight.to(x.dtype), None, *(None if vector.numel() == 0 else vector for vector in vectors))
            for conv_weight, *vectors in columns
        ]
        convs = [_conv(geometry[at : at + 7]) for at in range(0, len(geometry), 7)]
        value, last = x, len(layers) - 1 - downsample
        for number in range(last):
            value = conv_bn_act(value, *layers[number], None, *convs[number], eps[number], True)
        shortcut = x if residual is None else residual
        if downsample:
            stride, padding, _, groups = convs[-1]
            if tuple(conv_weights[-1].shape[2:]) == (1, 1) and padding == [0, 0] and groups == 1:
                main = (value, *layers[last], *convs[last], eps[last])
                return conv_bn_shortcut_act(*main, x, *layers[-1], stride, eps[-1], True)
            shortcut = conv_bn_act(x, *layers[-1], None, *convs[-1], eps[-1], False)
        return conv_bn_act(value, *layers[last], shortcut, *convs[last], eps[last], True)

    def stem(x, conv_weight, weight, bias, running_mean, running_var, geometry, eps):
        """The max-pool of the activated layer, in conv_weight's dtype."""
        layer = (conv_weight, None, weight, bias, running_mean, running_var)
        return max_pool(conv_bn_act(x.to(conv_weight.dtype), *layer, None, *_conv(geometry), eps, True))

    return residual_block, stem


def _conv(numbers) -> tuple:
    """stride, padding, dilation and groups of a layer's seven numbers."""
    return list(numbers[:2]), list(numbers[2:4]), list(numbers[4:6]), numbers[6]
