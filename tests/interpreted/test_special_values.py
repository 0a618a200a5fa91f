"""NaN and Inf stand exactly where PyTorch has them, and large means do not cost digits."""

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, draw, named
from interpreted.drive import check_bn_act, check_max_pool, check_tensors, double, kernel, pytorch, refused, tensors_of
from interpreted.guarded import Fence
from interpreted.kernel_cases import POINTER_CASES, STEM_CASES, TAIL_CASES, TMA_CASES, UNUSUAL, ConvCase

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
NAN, INF = float("nan"), float("inf")
POINTER, TMA, STEM, TAIL = (
    {case.name: case for case in cases} for cases in (POINTER_CASES, TMA_CASES, STEM_CASES, TAIL_CASES)
)
CONVS = [
    pytest.param(POINTER["three_by_three_bn_residual"], id="pointer"),
    pytest.param(TMA["three_by_three_bn_residual"], id="tma"),
]
STRIDED = [
    pytest.param(POINTER["stride2_three_by_three"], id="pointer"),
    pytest.param(TMA["stride2_three_by_three"], id="tma"),
]


def same_places(ours, expected) -> None:
    """NaN, Inf and -Inf where the float64 reference has them, and nowhere else."""
    for name, test in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        assert torch.equal(test(ours), test(expected)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (0, -1), (2, 2)], ids=str)
@pytest.mark.parametrize("case", [*CONVS, *STRIDED])
def test_a_nan_reaches_the_pixels_that_see_it(case, place, dtype):
    """At the border too: padding is no pixel, and what lies behind a row's end belongs to others."""
    tensors = tensors_of(case, dtype)
    tensors["x"][0, 3, place[0], place[1]] = NAN
    same_places(check_tensors(case, tensors)["y"], pytorch(case, double(tensors))["y"])


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("case", CONVS)
def test_residuals_and_relu_keep_what_is_not_finite(case, value):
    tensors = tensors_of(case, torch.bfloat16)
    tensors["residual"][0, 5, 1, 2] = tensors["residual"][-1, -1, -1, -1] = value
    tensors["x"][0, 0, 4, 3] = value
    same_places(check_tensors(case, tensors)["y"], pytorch(case, double(tensors))["y"])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("case", [
    pytest.param(POINTER["shortcut_two_norms"], id="pointer"),
    pytest.param(TMA["shortcut_two_norms"], id="tma"),
])  # fmt: skip
def test_shortcuts_pass_what_is_not_finite(case, value):
    """Of the pixels that the stride skips nothing is read."""
    tensors = tensors_of(case, torch.float32)
    tensors["shortcut"][0, 1, 4, 6] = tensors["shortcut"][1, 0, 3, 3] = value
    y = check_tensors(case, tensors)["y"]
    same_places(y, pytorch(case, double(tensors))["y"])
    assert not y.isfinite().all()


def test_a_nan_in_the_last_of_few_channels():
    """Channels are taken 16 at a time; those past the fifth belong to the next pixel."""
    case = POINTER["five_to_65_channels"]
    tensors = tensors_of(case, torch.float32)
    tensors["x"][0, 0, 3, 3] = tensors["x"][1, 4, 0, 0] = NAN
    same_places(check_tensors(case, tensors)["y"], pytorch(case, double(tensors))["y"])


@pytest.mark.parametrize("case", [
    pytest.param(POINTER["grouped_packed_in_two"], id="pointer"),
    pytest.param(TMA["grouped_packed_in_two"], id="tma"),
])  # fmt: skip
def test_a_nan_in_a_group_spreads_to_the_groups_packed_with_it(case):
    """And no further: as a convolution does whose groups are the packed ones."""
    tensors = tensors_of(case, torch.float32)
    tensors["x"][0, 7, 2, 2] = NAN
    y = kernel(case, tensors, Fence("end"))["y"]
    packed = torch.zeros(128, 64, 3, 3)
    expected = F.conv2d(tensors["x"], packed, padding=1, groups=2)
    same_places(y, expected)
    assert y[0, :64, 1:4, 1:4].isnan().all()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("place", [(0, 0), (9, 8), (9, 10), (-1, -1)], ids=str)
def test_pooling_keeps_what_is_not_finite(place, value):
    """As in a convolution with the packed weight's column of zeros, which sees one pixel more to the right."""
    case = STEM["odd_output"]
    tensors = tensors_of(case, torch.float32)
    tensors["x"][0, 1, place[0], place[1]] = value
    y = kernel(case, tensors, Fence("end"))["y"]
    weight = F.pad(tensors["conv_weight"].double(), (0, 1))
    x = F.pad(tensors["x"].double(), (3, 4, 3, 3))
    conv = F.conv2d(x, weight, tensors["conv_bias"].double(), stride=2)
    same_places(y, F.max_pool2d(conv.relu(), 3, 2, 1))
    assert not y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_max_pool_keeps_what_is_not_finite(value, dtype):
    x = draw((2, 64, 9, 8), dtype, "channels_last")
    x[0, 3, 0, 0] = x[0, 63, 8, 7] = x[1, 5, 4, 3] = value
    x[1, 7] = -INF
    check_max_pool(x)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["identity", "shortcut"])
def test_tails_keep_what_is_not_finite(name, value):
    case = TAIL[name]
    tensors = tensors_of(case, torch.bfloat16)
    tensors["x"][0, 3, 0, 0] = tensors["shortcut"][1, 5, 2, 3] = value
    ours, expected = check_tensors(case, tensors), pytorch(case, double(tensors))
    for name in expected:
        same_places(ours[name], expected[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bn_act_keeps_what_is_not_finite(dtype, layout):
    x, residual = (draw((2, 5, 4, 3), dtype, layout) for _ in range(2))
    x[0, 1, 2, 1] = NAN
    x[1, 4, 0, 0], x[1, 4, 3, 2] = INF, -INF
    residual[0, 0, 0, 0], residual[1, 1, 1, 1], residual[0, 2, 0, 0] = NAN, INF, -INF
    one, zero = torch.ones(5), torch.zeros(5)
    check_bn_act(x, {"running_mean": zero, "running_var": one, "weight": one, "bias": zero}, residual)


@pytest.mark.parametrize("case", [
    pytest.param(POINTER["no_affine"], id="pointer"),
    pytest.param(TMA["wide_blocks"], id="tma"),
])  # fmt: skip
def test_a_large_mean_costs_no_digits(case: ConvCase):
    """mean / std of 1e4, which leaves little of a float32: no less than PyTorch has left."""
    tensors = tensors_of(case, torch.float32)
    tensors["x"] = tensors["x"].mul(1e-3).add(1.0).contiguous(memory_format=torch.channels_last)
    tensors["conv_weight"] = tensors["conv_weight"].abs().contiguous(memory_format=torch.channels_last)
    geometry = case.conv.stride, case.conv.padding
    conv = F.conv2d(tensors["x"].double(), tensors["conv_weight"].double(), None, *geometry)
    inside = conv[:, :, 1:-1, 1:-1]
    tensors["mean"], tensors["var"] = inside.mean((0, 2, 3)).float(), inside.var((0, 2, 3)).float()
    check_tensors(case, tensors)


@pytest.mark.parametrize("case", **named(UNUSUAL))
def test_unusual_problems_are_refused_or_right(case):
    """With a NaN beside what is read."""
    if refused(case, torch.bfloat16) is None:
        tensors = tensors_of(case, torch.bfloat16)
        tensors["x"][:, 0, 1, 1] = NAN
        ours, expected = check_tensors(case, tensors), pytorch(case, double(tensors))
        same_places(ours["y"], expected["y"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bn_act_with_a_large_mean(layout):
    x = (draw((2, 5, 6, 7), torch.float64, layout) * 1e-2 + 1e3).float()
    vectors = {"running_mean": torch.full((5,), 1e3), "running_var": torch.full((5,), 1e-4)}
    check_bn_act(x, vectors, None, eps=1e-5)
