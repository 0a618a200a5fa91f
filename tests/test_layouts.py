"""Gradients and inputs whose memory is not what a kernel would like. gradcheck and opcheck do not catch these."""

import pytest
import stock
import torch
from cases import LAYOUTS, bn_tensors, draw

from resnet_fast import functional

SHAPE = (2, 6, 5, 4)
CONSUMERS = {  # y -> a scalar, whose gradient reaches us in an unusual layout
    "sum": lambda y: y.sum(),  # expanded: all strides 0
    "mean_over_plane": lambda y: (y.mean((2, 3)) ** 2).sum(),  # strides 0 in two dimensions
    "cat": lambda y: (torch.cat([y, y * 2], 1)[:, 3:9] ** 2).sum(),  # a slice of a larger tensor
    "flip": lambda y: (y.flip(0, 3) * torch.arange(4, dtype=y.dtype)).sum(),
    "transpose": lambda y: (y.transpose(2, 3).contiguous() ** 2).sum(),
    "nchw_consumer": lambda y: (y.contiguous().view(2, -1) ** 3).sum(),
    "channels_last_consumer": lambda y: (y.permute(0, 2, 3, 1).contiguous() ** 3).sum(),
    "expand": lambda y: (y[:, :1].expand(-1, 6, -1, -1) * y).sum(),
    "strided_slice": lambda y: (y[:, :, ::2, ::2] ** 2).sum(),
}


def gradients(function, tensors, consumer, **keywords):
    inputs = {name: stock.clone(tensor) for name, tensor in tensors.items()}
    wants = [inputs[name].requires_grad_() for name in inputs if name not in stock.STATISTICS]
    return torch.autograd.grad(consumer(function(**inputs, **keywords)), wants)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_bn_act_grad_output_of_any_stride(consumer, layout, training, backend):
    tensors = {"x": draw(SHAPE, torch.float64, layout), "residual": draw(SHAPE, torch.float64, layout)}
    tensors |= bn_tensors(6, torch.float64)
    ours = gradients(functional.bn_act, tensors, CONSUMERS[consumer], training=training, backend=backend)
    theirs = gradients(stock.bn_act, tensors, CONSUMERS[consumer], training=training)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_conv_bn_act_grad_output_of_any_stride(consumer, layout, training, backend):
    tensors = {"x": draw((2, 3, 5, 4), torch.float64, layout), "conv_weight": draw((6, 3, 3, 3), torch.float64)}
    tensors |= bn_tensors(6, torch.float64)
    keywords = {"training": training, "padding": 1}
    ours = gradients(functional.conv_bn_act, tensors, CONSUMERS[consumer], backend=backend, **keywords)
    theirs = gradients(stock.conv_bn_act, tensors, CONSUMERS[consumer], **keywords)
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


VIEWS = {
    "every_second_row": lambda: draw((2, 6, 10, 4), torch.float64)[:, :, ::2],
    "transposed": lambda: draw((2, 6, 4, 5), torch.float64).transpose(2, 3),
    "some_channels": lambda: draw((2, 12, 5, 4), torch.float64, "channels_last")[:, 3:9],
    "expanded_batch": lambda: draw((1, 6, 5, 4), torch.float64).expand(2, -1, -1, -1),
    "second_image_on": lambda: draw((3, 6, 5, 4), torch.float64)[1:],
    "conjugate_bit_free_flip": lambda: draw(SHAPE, torch.float64).flip(3),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("view", VIEWS)
def test_x_and_residual_may_be_views(view, training, backend):
    x, residual = VIEWS[view](), VIEWS[view]()
    tensors = bn_tensors(6, torch.float64)
    results = []
    for function, extra in ((functional.bn_act, {"backend": backend}), (stock.bn_act, {})):
        leaf, added = x.detach().requires_grad_(), residual.detach().requires_grad_()
        running = {name: tensors[name].clone() for name in stock.STATISTICS}
        y = function(leaf, **running, weight=tensors["weight"], bias=tensors["bias"], residual=added, training=training,
                     **extra)  # fmt: skip
        results.append([y, *torch.autograd.grad((y * y).sum(), [leaf, added]), *running.values()])
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dy_layout", LAYOUTS)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mixed_memory_formats_follow_x(layout, residual_layout, dy_layout, backend):
    tensors = {"x": draw(SHAPE, torch.float64, layout), "residual": draw(SHAPE, torch.float64, residual_layout)}
    tensors |= bn_tensors(6, torch.float64) | {"dy": draw(SHAPE, torch.float64, dy_layout)}
    ours = stock.run(functional.bn_act, tensors, training=True, backend=backend)
    theirs = stock.run(stock.bn_act, tensors, training=True)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10)
    for name in ("y", "dx"):
        assert ours[name].is_contiguous(memory_format=LAYOUTS[layout]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(4, 8, 1, 1), (4, 1, 3, 3), (1, 1, 1, 5)], ids=["plane_1x1", "one_channel", "one_row"]
)
def test_ambiguous_strides(shape, layout, backend):
    """Where both formats describe the same memory, the result still must be dense and right."""
    tensors = {"x": draw(shape, torch.float64, layout)} | bn_tensors(shape[1], torch.float64)
    tensors["dy"] = draw(shape, torch.float64, layout)
    ours = stock.run(functional.bn_act, tensors, training=True, backend=backend)
    theirs = stock.run(stock.bn_act, tensors, training=True)
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["bn_act_backward", "conv_bn_act_backward"])
def test_every_output_mask(name, training, backend):
    """Each gradient is the same whichever others are computed with it; an unwanted one is empty."""
    count = 4 if name == "bn_act_backward" else 6
    x, conv_out = draw((2, 4, 5, 5), torch.float64), draw((2, 6, 5, 5), torch.float64)
    dy, y = draw((2, 6, 5, 5), torch.float64), draw((2, 6, 5, 5), torch.float64).relu()
    mean, var, weight, bias = bn_tensors(6, torch.float64).values()
    if training:
        var, mean = torch.var_mean(conv_out, (0, 2, 3), correction=0)
    call = [dy, conv_out, y, weight, bias, mean, var, 1e-5, True, training]
    if count == 6:
        conv = ([1, 1], [1, 1], [1, 1], 1)
        call = [
            dy,
            x,
            draw((6, 4, 3, 3), torch.float64),
            conv_out,
            y,
            weight,
            bias,
            mean,
            var,
            *conv,
            1e-5,
            True,
            training,
        ]
    op = getattr(torch.ops.resnet_fast, name)
    everything = op(*call, [True] * count, "reference")
    for bits in range(1, 2**count):
        mask = [bool(bits >> index & 1) for index in range(count)]
        for index, grad in enumerate(op(*call, mask, backend)):
            if mask[index]:
                torch.testing.assert_close(grad, everything[index], rtol=1e-10, atol=1e-10)
            else:
                assert grad.numel() == 0
                assert grad.dtype == x.dtype
