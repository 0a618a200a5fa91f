"""The convolutions of a training step as AMX tile products: beside PyTorch's, in every geometry."""

import os

import fresh
import pytest
import torch
import torch.nn.functional as F
from cases import ONEDNN, draw, named, tuned_table
from cases import ConvCase as Case
from numerics import assert_all_match
from test_primitives import draw_norm

from resnet_fast.backends import units
from resnet_fast.backends.primitives import Geometry, Norm, reference
from resnet_fast.backends.primitives import native as native_primitives
from resnet_fast.kernels import selection
from resnet_fast.problems import TrainingConvProblem
from resnet_fast.shapes import Conv
from resnet_fast.training import LIBRARY, PROLOGUE

pytestmark = pytest.mark.amx
DTYPES = pytest.mark.parametrize("dtype", units.TILE_DTYPES, ids=str)


@pytest.fixture
def tiles(native):
    if not units.has_tiles():
        pytest.skip("this CPU has no AMX with bfloat16")


CASES = (
    Case("basic", (2, 32, 9, 7), 64),
    Case("stride2_even", (2, 64, 8, 10), 32, stride=(2, 2)),
    Case("stride2_odd", (3, 32, 9, 7), 64, stride=(2, 2)),
    Case("strides_differ", (2, 32, 9, 8), 32, stride=(2, 1)),
    Case("stride3_leaves_pixels_out", (2, 32, 11, 8), 32, stride=(3, 3), padding=(0, 0)),
    Case("dilated", (2, 32, 12, 11), 32, padding=(2, 2), dilation=(2, 2)),
    Case("dilated_stride2", (2, 32, 12, 11), 32, stride=(2, 2), padding=(2, 3), dilation=(2, 3)),
    Case("more_padding_than_kernel", (2, 32, 4, 5), 32, padding=(3, 4)),
    Case("no_padding", (1, 32, 3, 3), 32, padding=(0, 0)),
    Case("five_by_two", (2, 32, 10, 9), 32, kernel=(5, 2), stride=(2, 2), padding=(2, 0)),
    Case("pointwise", (3, 64, 9, 9), 96, kernel=(1, 1), padding=(0, 0)),
    Case("pointwise_whole_tiles", (2, 32, 8, 8), 64, kernel=(1, 1), padding=(0, 0)),
    Case("pointwise_stride2", (3, 64, 9, 8), 32, kernel=(1, 1), stride=(2, 2), padding=(0, 0)),
    Case("pointwise_padded", (2, 32, 5, 5), 32, kernel=(1, 1)),
    Case("one_pixel", (1, 32, 1, 2), 32, kernel=(1, 1), padding=(0, 0)),
    Case("images_share_a_tile", (16, 32, 7, 7), 32),
    Case("images_left_over", (19, 32, 7, 7), 32),
    Case("strips_of_an_image", (2, 128, 61, 60), 32),
    Case("many_chunks_of_pixels", (2, 256, 45, 41), 64, kernel=(1, 1), padding=(0, 0)),
    Case("more_output_than_a_step", (2, 32, 6, 6), 1056, kernel=(1, 1), padding=(0, 0)),
    Case("more_input_than_a_step", (2, 288, 6, 6), 32),
)


def geometry_of(case: Case) -> Geometry:
    """As the primitives take it."""
    return Geometry(list(case.stride), list(case.padding), list(case.dilation), case.groups)


def run(primitives, x, norm, conv_weight, geometry, dy, add, stage=PROLOGUE) -> dict[str, torch.Tensor]:
    conv_out, mean, var = primitives.conv(x, norm, conv_weight, geometry, stage, True)
    dx, dweight = primitives.conv_backward(dy, x, norm, conv_weight, geometry, stage, True, True, add)
    results = {"conv_out": conv_out, "mean": mean, "running_var": 0.9 + 0.1 * var, "dx": dx, "dweight": dweight}
    return {name: value.clone() for name, value in results.items()}


def tensors(case: Case, dtype: torch.dtype, normed: bool):
    channels = case.shape[1]
    x = draw(case.shape, dtype, "channels_last").add_(0.5)
    norm = draw_norm(channels, dtype) if normed else None
    fan_in = channels * case.kernel[0] * case.kernel[1]
    weight = draw((case.out_channels, channels, *case.kernel), dtype, "channels_last", scale=fan_in**-0.5)
    dy = torch.randn_like(F.conv2d(x, weight, None, **case.geometry))
    return x, norm, weight, geometry_of(case), dy, draw(case.shape, dtype, "channels_last")


def widened(arguments):
    def wide(value):
        if isinstance(value, Norm):
            return Norm(*map(wide, value[:4]), value.eps)
        return value.double() if isinstance(value, torch.Tensor) else value

    return tuple(map(wide, arguments))


@pytest.mark.usefixtures("tiles", "poison")
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
@DTYPES
@pytest.mark.parametrize("case", **named(CASES))
def test_as_near_to_float64_as_pytorch(case, dtype, normed):
    arguments = tensors(case, dtype, normed)
    ours, stock = run(native_primitives, *arguments), run(reference, *arguments)
    exact = run(reference, *widened(arguments))
    assert_all_match(ours, stock, exact, compute_dtype=dtype)


@pytest.mark.usefixtures("tiles")
@DTYPES
def test_thread_count_changes_no_bit(dtype):
    for case in CASES:
        arguments = tensors(case, dtype, normed=True)
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(native_primitives, *arguments))
        for other in results[1:]:
            for name, value in other.items():
                assert torch.equal(value, results[0][name]), f"{case.name} {name}"


@pytest.mark.usefixtures("tiles")
@DTYPES
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38], ids=str)
def test_what_is_not_finite_stands_where_pytorchs_does(value, where, dtype):
    """3.4e38 is finite in float32, but not its first plane."""
    for case in (CASES[0], CASES[2], CASES[10], CASES[11]):
        x, norm, weight, geometry, dy, add = tensors(case, dtype, normed=False)
        {"x": x, "weight": weight, "dy": dy}[where][1, 2, -1, -1] = value
        ours, stock = (run(p, x, norm, weight, geometry, dy, add) for p in (native_primitives, reference))
        for name in ("conv_out", "dx", "dweight"):
            for special in (torch.isnan, torch.isposinf, torch.isneginf):
                assert torch.equal(special(ours[name]), special(stock[name])), f"{case.name} {name}"


@pytest.mark.usefixtures("tiles")
def test_gradients_of_any_format_and_wanted_one_by_one():
    x, norm, weight, geometry, dy, add = tensors(CASES[0], torch.float32, normed=True)
    both = native_primitives.conv_backward(dy, x, norm, weight, geometry, PROLOGUE, True, True, add)
    nchw = native_primitives.conv_backward(dy.contiguous(), x, norm, weight, geometry, PROLOGUE, True, True, add)
    dx, none = native_primitives.conv_backward(dy, x, norm, weight, geometry, PROLOGUE, True, False, add)
    nothing, dweight = native_primitives.conv_backward(dy, x, norm, weight, geometry, PROLOGUE, False, True)
    assert none is None
    assert nothing is None
    for found in (nchw, (dx, dweight)):
        for one, other in zip(found, both, strict=True):
            assert torch.equal(one, other)


@pytest.mark.usefixtures("tiles", "poison")
@DTYPES
@pytest.mark.parametrize("by_library", ["output", "data_gradient", "weight_gradient"])
def test_a_tuned_table_decides_one_by_one(by_library, dtype, unmeasured_cpu, monkeypatch):
    case = CASES[1]
    arguments = tensors(case, dtype, normed=True)
    x, _, weight, geometry, *_ = arguments
    conv = Conv.of(x.shape, weight.shape, *geometry)
    key = TrainingConvProblem(conv, str(dtype).removeprefix("torch."), by_library).key
    unmeasured_cpu.write_text(tuned_table({key: ONEDNN}))
    selection.forget()
    forward, backward, tiled = native_primitives._conv_train, native_primitives._conv_train_backward, []
    monkeypatch.setattr(native_primitives, "_conv_train", lambda *a: [tiled.append("output"), forward(*a)][1])
    monkeypatch.setattr(native_primitives, "_conv_train_backward", lambda *a: [tiled.append(a[-1]), backward(*a)][1])
    ours, stock = run(native_primitives, *arguments), run(reference, *arguments)
    assert_all_match(ours, stock, run(reference, *widened(arguments)), compute_dtype=dtype)
    gradients = [by_library != "data_gradient", by_library != "weight_gradient"]
    assert tiled == [*(["output"] if by_library != "output" else []), gradients]


@pytest.mark.usefixtures("tiles")
def test_what_does_not_fit_takes_the_library(monkeypatch):
    def fail(*_):
        raise AssertionError("tile product of what does not fit")

    monkeypatch.setattr(native_primitives, "_conv_train", fail)
    monkeypatch.setattr(native_primitives, "_conv_train_backward", fail)
    for shape, out_channels, groups, dtype, layout, stage in (
        ((2, 48, 6, 6), 32, 1, torch.float32, "channels_last", PROLOGUE),
        ((2, 32, 6, 6), 40, 1, torch.float32, "channels_last", PROLOGUE),
        ((2, 64, 6, 6), 64, 2, torch.float32, "channels_last", PROLOGUE),
        ((2, 32, 6, 6), 32, 1, torch.float64, "channels_last", PROLOGUE),
        ((2, 32, 6, 6), 32, 1, torch.float32, "nchw", PROLOGUE),
        ((0, 32, 6, 6), 32, 1, torch.float32, "channels_last", LIBRARY),
        ((2, 32, 6, 6), 32, 1, torch.float32, "channels_last", LIBRARY),
    ):
        x = draw(shape, dtype, layout)
        weight = draw((out_channels, shape[1] // groups, 3, 3), dtype, layout)
        geometry = Geometry([1, 1], [1, 1], [1, 1], groups)
        conv_out, _, _ = native_primitives.conv(x, None, weight, geometry, stage, False)
        native_primitives.conv_backward(conv_out, x, None, weight, geometry, stage, True, True)


def test_a_cpu_told_to_use_less_has_no_tiles(native):
    """ATEN_CPU_CAPABILITY=avx2: no illegal instruction can be reached, and training takes PyTorch's convolutions."""
    code = """
import torch
from resnet_fast.backends import units
assert not units.has_tiles()
x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last)
try:
    torch.ops.resnet_fast_native.conv_train(x, [], 0.0, torch.randn(32, 32, 1, 1), [1, 1], [0, 0], [1, 1], True)
except RuntimeError as error:
    assert "AMX" in str(error), error
else:
    raise AssertionError("ran")
"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    done = fresh.python(code, environment=environment)
    assert done.returncode == 0, done.stderr


MUTANTS = {
    "conv_out": lambda results: {**results, "conv_out": results["conv_out"].roll(1, 3)},
    "mean": lambda results: {**results, "mean": results["mean"] * 1.01},
    "dx": lambda results: {**results, "dx": results["dx"].flip(2)},
    "dweight": lambda results: {**results, "dweight": results["dweight"].flip(3)},
}


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name):
    arguments = tensors(CASES[0], torch.float32, normed=False)
    ours, stock = run(native_primitives, *arguments), run(reference, *arguments)
    exact = run(reference, *widened(arguments))
    assert_all_match(ours, stock, exact)
    with pytest.raises(AssertionError):
        assert_all_match(MUTANTS[name](ours), stock, exact)
