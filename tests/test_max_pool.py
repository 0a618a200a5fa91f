"""The extension's max-pool, 3x3 with stride 2 and padding 1: alone, and with the batch norm and ReLU before it."""

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, draw
from models import lively
from numerics import assert_all_match
from test_primitives import accumulation, draw_norm
from torch import nn
from torch.utils._pytree import tree_map_only
from torchvision.models.resnet import BasicBlock, ResNet

from resnet_fast import freeze
from resnet_fast.backends import native
from resnet_fast.backends.primitives import native as native_primitives
from resnet_fast.backends.primitives import reference

pytestmark = pytest.mark.usefixtures("native", "poison")

SHAPES = {
    "bands": (2, 64, 41, 60),  # more rows than a band has
    "wide_rows": (1, 40, 5, 4100),  # a band of one row
    "odd": (3, 7, 9, 11),
    "even": (2, 33, 8, 6),
    "one_row": (2, 16, 1, 9),
    "one_column": (2, 16, 9, 1),
    "one_pixel": (2, 5, 1, 1),
    "two": (1, 3, 2, 2),
}
named_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@named_shapes
@dtypes
def test_the_maxima_are_pytorchs(shape, dtype):
    x = draw(shape, dtype, "channels_last")
    x[0, 0, -1, -1], x[-1, -1, 0, 0] = float("nan"), -float("inf")
    x[0, 1] = -float("inf")
    y = native.max_pool(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.max_pool2d(x, 3, 2, 1), rtol=0, atol=0, equal_nan=True)


def test_what_it_does_not_take():
    x = draw((2, 8, 9, 9), torch.float32)
    assert native.max_pool(x) is None  # NCHW
    assert native.max_pool(x[0]) is None
    assert native.max_pool(x.to(memory_format=torch.channels_last).int()) is None
    assert native.max_pool(x[:0].to(memory_format=torch.channels_last)) is None
    assert native.max_pool(x.to(memory_format=torch.channels_last)) is not None


@named_shapes
@dtypes
def test_the_normalised_ones_and_their_places(shape, dtype):
    """Bit for bit those of the passes one by one, equal maxima included: ReLU makes many of them."""
    conv_out, norm = draw(shape, dtype, "channels_last"), draw_norm(shape[1], dtype)
    conv_out[-1, -1, -1, -1] = float("nan")
    y, index = native_primitives.pool(conv_out, norm)
    expected, places = reference.pooled(native_primitives.apply(conv_out, norm))
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index, places)
    assert index.stride() == y.stride()


@named_shapes
@dtypes
def test_the_gradient(shape, dtype):
    conv_out, norm = draw(shape, dtype, "channels_last").add_(0.5), draw_norm(shape[1], dtype)
    y, index = reference.pool(conv_out, norm)
    dy = draw(y.shape, dtype, "channels_last").masked_fill(y < 0.05, 0.0)  # away from the kink, where rounding decides
    means = tuple(torch.randn(2, shape[1], dtype=accumulation(dtype)) * 0.1)

    def both(primitives, dy, conv_out, norm, means) -> dict[str, torch.Tensor]:
        sums = primitives.backward_reduce(dy, conv_out, norm, True, index)
        found = [*sums, primitives.backward_apply(dy, conv_out, norm, True, *means, index)]
        found.append(primitives.backward_apply(dy, conv_out, norm, True, None, None, index))
        return dict(zip(("sum_dz", "sum_dzx", "dconv_out", "dconv_out_eval"), found, strict=True))

    call = (dy, conv_out, norm, means)
    exact = both(reference, *tree_map_only(torch.Tensor, torch.Tensor.double, call))
    terms = dict.fromkeys(("sum_dz", "sum_dzx"), float(dy.double().norm()))
    assert_all_match(both(native_primitives, *call), both(reference, *call), exact, compute_dtype=dtype, terms=terms)


def test_threads_change_no_bit():
    conv_out, norm = draw(SHAPES["bands"], torch.float32, "channels_last"), draw_norm(64, torch.float32)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y, index = native_primitives.pool(conv_out, norm)
        sums = native_primitives.backward_reduce(y, conv_out, norm, True, index)
        dconv_out = native_primitives.backward_apply(y, conv_out, norm, True, *sums, index)
        results.append((y, index, *sums, dconv_out, native.max_pool(conv_out)))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["dy", "index", "dtype"])
def test_shapes_that_do_not_belong_together_raise(name):
    conv_out, norm = draw((2, 8, 9, 9), torch.float32, "channels_last"), draw_norm(8, torch.float32)
    y, index = native_primitives.pool(conv_out, norm)
    call = {"dy": (y[..., 1:], index), "index": (y, index[:1]), "dtype": (y, index.int())}[name]
    with pytest.raises(RuntimeError, match="expected the shape of the pooled"):
        native_primitives.backward_reduce(call[0], conv_out, norm, True, call[1])


@pytest.mark.parametrize(
    "settings", [{}, {"ceil_mode": True}, {"kernel_size": 2}, {"padding": 0}, {"stride": 1}], ids=str
)
def test_a_frozen_pool_is_what_it_was(settings):
    torch.manual_seed(0)
    model = lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)).eval()
    pool = nn.MaxPool2d(**({"kernel_size": 3, "stride": 2, "padding": 1} | settings))
    model.maxpool = pool
    frozen = freeze(model)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = draw((2, 4, 30, 31), torch.float32).to(memory_format=layout)
        assert torch.equal(frozen.maxpool(x), pool(x))
    image = draw((2, 3, 64, 60), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(frozen(image), model(image), rtol=1e-4, atol=1e-4)


def test_a_frozen_pool_has_a_gradient_where_one_is_wanted():
    model = lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3)).eval()
    x = draw((2, 4, 30, 31), torch.float32, "channels_last").requires_grad_()
    assert freeze(model).maxpool(x).requires_grad
