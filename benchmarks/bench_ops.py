"""bn_act and conv_bn_act, layer by layer: inference, and training forward and backward.

pytest benchmarks/bench_ops.py --benchmark-only --benchmark-group-by=param:layer,param:dtype,func
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import DTYPES, LAYERS
from resnet_fast import functional, numerics

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")),
    pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name),
]


def eager(x, running_mean, running_var, weight, bias, *, conv_weight=None, residual=None, training=False, **conv):
    if conv_weight is not None:
        x = F.conv2d(x, conv_weight, **conv)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training)
    if residual is not None:
        y += residual
    return F.relu_(y)


def fused(backend):
    def call(x, *bn, conv_weight=None, **keywords):
        if conv_weight is None:
            return functional.bn_act(x, *bn, backend=backend, **keywords)
        return functional.conv_bn_act(x, conv_weight, *bn, backend=backend, **keywords)

    return call


class Call:
    """One layer's tensors and a way to compute it."""

    def __init__(self, layer, dtype, function, *, conv: bool, training: bool):
        torch.manual_seed(0)
        self.function, self.training = function, training
        shape = layer.x_shape if conv else layer.y_shape
        channels = layer.out_channels
        self.x = self._draw(shape, dtype)
        self.bn = [
            torch.randn(channels) * 0.2,
            torch.rand(channels) + 0.5,
            torch.rand(channels) + 0.5,
            torch.randn(channels),
        ]
        if dtype == torch.float64:
            self.bn = [tensor.double() for tensor in self.bn]
        self.keywords = {"training": training}
        if layer.residual:
            self.keywords["residual"] = self._draw(layer.y_shape, dtype)
        if conv:
            weight_shape = (channels, layer.in_channels // layer.groups, layer.kernel, layer.kernel)
            weight = torch.randn(weight_shape) * (2 / (weight_shape[1] * layer.kernel**2)) ** 0.5
            self.keywords |= {"conv_weight": weight.to(torch.bfloat16).to(dtype), "stride": layer.stride,
                              "padding": layer.padding, "groups": layer.groups}  # fmt: skip
        self.dy = self._draw(layer.y_shape, dtype)
        self.wants = []
        if training:
            self.wants = [
                self.x,
                *self.bn[2:],
                *(self.keywords[n] for n in ("residual", "conv_weight") if n in self.keywords),
            ]
            for tensor in self.wants:
                tensor.requires_grad_()

    @staticmethod
    def _draw(shape, dtype):
        # rounded to bfloat16 first, so that every dtype is given the same numbers
        values = torch.randn(shape).to(torch.bfloat16).to(dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def __call__(self):
        if not self.training:
            with torch.no_grad():
                return [self.function(self.x, *self.bn, **self.keywords)]
        y = self.function(self.x, *self.bn, **self.keywords)
        return [y, *torch.autograd.grad(y, self.wants, self.dy)]


def gate(layer, dtype, function, **settings):
    """AssertionError unless the result is as near to float64 as eager PyTorch's."""
    results = [
        Call(layer, kind, what, **settings)()
        for kind, what in ((dtype, function), (dtype, eager), (torch.float64, eager))
    ]
    # Sums that cancel (weight's and bias's gradients): judged by the size of their terms.
    batch, _, rows, columns = layer.y_shape
    terms = (batch * rows * columns) ** 0.5
    for index, (ours, stock, exact) in enumerate(zip(*results, strict=True)):
        summed = terms if exact.dim() == 1 else None
        numerics.assert_match(
            numerics.compare(f"result {index}", ours, stock, exact, compute_dtype=dtype, terms=summed)
        )


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_bn_act(layer, dtype, training, contender, timed):
    function = eager if contender == "eager" else fused(contender)
    settings = {"conv": False, "training": training}
    gate(layer, dtype, function, **settings)
    timed(Call(layer, dtype, function, **settings), contender, dtype, bytes=layer.bn_bytes(dtype, training, training))


@pytest.mark.parametrize("training", [False, True], ids=["infer", "train"])
def test_conv_bn_act(layer, dtype, training, contender, timed):
    function = eager if contender == "eager" else fused(contender)
    settings = {"conv": True, "training": training}
    gate(layer, dtype, function, **settings)
    timed(Call(layer, dtype, function, **settings), contender, dtype, flop=layer.conv_flop * (3 if training else 1))
