"""`ops.residual_block` as a backend without a kernel of its own for it runs it: one op a convolution."""

from collections.abc import Callable

from torch import Tensor


def make(conv_bn_act: Callable[..., Tensor], conv_bn_shortcut_act: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """residual_block by the two ops, which are a backend's."""

    def residual_block(
        x, residual, conv_weights, weights, biases, running_means, running_vars, geometry, eps, downsample
    ):
        """relu(F(x) + shortcut): x, `residual`, or the last layer where `downsample`."""
        columns = zip(conv_weights, weights, biases, running_means, running_vars, strict=True)
        layers = [
            (conv_weight.to(x.dtype), None, *(None if vector.numel() == 0 else vector for vector in vectors))
            for conv_weight, *vectors in columns
        ]
        pairs = [geometry[at : at + 7] for at in range(0, len(geometry), 7)]
        convs = [([*g[:2]], [*g[2:4]], [*g[4:6]], g[6]) for g in pairs]
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

    return residual_block
