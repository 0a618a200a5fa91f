"""The convolutions of training in Triton against the reference in float64, beside PyTorch in the same dtype."""

import math

import pytest
import torch
from cases import draw, named
from interpreted import training_drive as drive
from interpreted.kernel_cases import DTYPES
from interpreted.training_drive import BACKWARD_CASES, CONV_CASES, GRAM_CASES, JOIN_CASES, POINTER, Case

from resnet_fast.backends import triton_conv, triton_launch
from resnet_fast.backends.primitives import Geometry, Shortcut, reference
from resnet_fast.kernels import selection
from resnet_fast.shapes import Conv
from resnet_fast.training import EPILOGUE, LIBRARY, PROLOGUE

pytestmark = pytest.mark.usefixtures("poison")
POINTWISE = Geometry([1, 1], [0, 0], [1, 1], 1)
CONV = {case.name: case for case in CONV_CASES}
WITH_STATISTICS = ("three_by_three", "tma_three_by_three", "prologue")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CONV_CASES))
def test_conv(case, dtype):
    drive.check_conv(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(JOIN_CASES))
def test_conv_join(case, dtype):
    drive.check_join(case, dtype)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(BACKWARD_CASES))
def test_conv_backward(case, dtype, add):
    drive.check_backward(case, dtype, add)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(GRAM_CASES))
def test_gram_dgrad(case, dtype, add):
    drive.check_gram_dgrad(case, dtype, add)


def outputs_of(case: Case, x: torch.Tensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    norm = drive.norm_of(case.conv.in_channels, x.dtype) if case.norm else None
    with drive.kernels_of(case) as launched:
        outputs = triton_conv.conv(x, norm, weight, case.geometry, PROLOGUE, True)
    assert tuple(launched) == case.kernels
    return dict(zip(("conv_out", "mean", "var"), outputs, strict=True))


@pytest.mark.parametrize("offset", [3.0, 30.0])
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_variance_beside_a_large_mean(name, offset):
    """The standard deviation is 1e-3 of the mean: differences of sums of squares would be all rounding."""
    case = CONV[name]
    channels, out_channels = case.conv.in_channels, case.conv.out_channels
    x = offset * (1 + 1e-3 * draw(case.conv.x_shape, torch.float32, "channels_last"))
    weight = torch.zeros(case.conv.weight_shape).contiguous(memory_format=torch.channels_last)
    middle = case.conv.kernel[0] // 2
    weight[:, :, middle, middle] = torch.eye(out_channels, channels)
    drive.check_statistics(outputs_of(case, x, weight))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_what_is_not_finite_reaches_the_statistics(name, value):
    case = CONV[name]
    x = draw(case.conv.x_shape, torch.float32, "channels_last")
    x[-1, 3, -1, -1] = value
    weight = drive.weight_of(case.conv, torch.float32).abs()
    found = outputs_of(case, x, weight)
    _, mean, var = reference.conv(x, None, weight, case.geometry, LIBRARY, True)
    assert found["var"].isnan().all()
    assert var.isnan().all()
    assert torch.equal(found["mean"].isnan(), mean.isnan())
    assert not found["mean"].isfinite().any()


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_statistics_are_the_same_bits_every_time(name):
    case = CONV[name]
    x, weight = draw(case.conv.x_shape, torch.bfloat16, "channels_last"), drive.weight_of(case.conv, torch.bfloat16)
    torch.manual_seed(1)
    first = outputs_of(case, x, weight)
    for _ in range(3):
        torch.manual_seed(1)
        again = outputs_of(case, x, weight)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_one_tile_has_one_value():
    """Its M2 is exactly 0, and a channel's variance is that between tiles."""
    case = Case("five_by_thirteen", Conv(1, 16, 5, 13, 24), POINTER)
    x, weight = (draw(shape, torch.float32, "channels_last") for shape in (case.conv.x_shape, case.conv.weight_shape))
    drive.check_statistics(outputs_of(case, x, weight))


def test_statistics_that_are_not_wanted_are_not_made():
    case = CONV["prologue"]
    x, weight = draw(case.conv.x_shape, torch.float32, "channels_last"), drive.weight_of(case.conv, torch.float32)
    for norm in (None, drive.norm_of(64, torch.float32)):
        with drive.kernels_of(case):
            assert triton_conv.conv(x, norm, weight, case.geometry, PROLOGUE, False)[1:] == (None, None)


@pytest.mark.parametrize(("stage", "kernels"), [(LIBRARY, []), (EPILOGUE, ["conv_bn_act_pointer"])])
def test_a_stage_is_the_most_that_is_fused(stage, kernels):
    x, weight = draw((2, 64, 5, 5), torch.float32, "channels_last"), draw((64, 64, 1, 1), torch.float32)
    norm = drive.norm_of(64, torch.float32)
    with drive.kernels_of(CONV["prologue"]) as launched:
        triton_conv.conv(x, norm, weight, POINTWISE, stage, True)
        assert launched == kernels
        triton_conv.conv_backward(x, x, norm, weight, POINTWISE, stage, True, True)
        assert launched == 2 * kernels


@pytest.mark.parametrize(("dtype", "layout"), [(torch.float64, "channels_last"), (torch.float32, "nchw")])
def test_what_no_kernel_reads_is_the_references(dtype, layout):
    x, weight = draw((2, 16, 5, 4), dtype, layout), draw((24, 16, 1, 1), dtype)
    norm = drive.norm_of(16, torch.float32)
    with drive.kernels_of(CONV["prologue"]) as launched:
        ours = triton_conv.conv(x, norm, weight, POINTWISE, PROLOGUE, True)
        triton_conv.conv_join(x, norm, weight, POINTWISE, drive.norm_of(24, torch.float32))
        triton_conv.conv_backward(ours[0], x, norm, weight, POINTWISE, PROLOGUE, True, True)
    theirs = reference.conv(x, norm, weight, POINTWISE, PROLOGUE, True)
    assert launched == []
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_a_refused_launch_takes_the_library(monkeypatch, said):
    def refuse(kernel, *args):
        if kernel.__name__ in drive.CONVOLUTIONS:
            raise triton_launch.OutOfResources(300000, 232448, "shared memory")
        return launch(kernel, *args)

    launch = triton_launch.launch
    selection.forget()
    monkeypatch.setattr(triton_launch, "launch", refuse)
    x, weight = draw((2, 64, 5, 5), torch.bfloat16, "channels_last"), draw((64, 64, 1, 1), torch.bfloat16)
    norm = drive.norm_of(64, torch.bfloat16)
    shortcut = Shortcut(x, weight, POINTWISE, norm)
    matrix, mean = torch.randn(64, 64) / 8, torch.randn(64)
    calls = {
        "conv": (x, norm, weight, POINTWISE, PROLOGUE, True),
        "conv_join": (x, norm, weight, POINTWISE, norm, None, None, shortcut),
        "conv_backward": (x, x, norm, weight, POINTWISE, PROLOGUE, True, True, x),
        "gram_dgrad": (x, x, norm, POINTWISE, matrix, matrix, mean, mean, x),
    }
    for _ in range(2):
        for name, arguments in calls.items():
            ours, theirs = (getattr(module, name)(*arguments) for module in (triton_conv, reference))
            torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)
    selection.forget()
    kinds = [line.split()[1] for line in said() if "OutOfResources" in line]
    assert kinds == ["prologue", "conv", "conv", "prologue", "conv", "conv", "gram_dgrad"]
