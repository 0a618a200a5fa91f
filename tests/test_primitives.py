"""The native primitives of a residual block's training beside the reference ones, in every dtype and layout."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, draw, named, parameter_dtype
from numerics import assert_all_match
from torch.utils._pytree import tree_flatten, tree_map_only

from resnet_fast.backends.primitives import Geometry, Norm, Shortcut, reference
from resnet_fast.backends.primitives import native as native_primitives
from resnet_fast.numerics import rmse

pytestmark = pytest.mark.usefixtures("native", "poison")

THREE_BY_THREE = Geometry([1, 1], [1, 1], [1, 1], 1)


@dataclass(frozen=True)
class Case:
    """A 1x1 layer: x is (N, C, H, W), its output has `out_channels`."""

    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    stride: int = 1
    affine: bool = True
    unaligned: bool = False

    @property
    def geometry(self) -> Geometry:
        return Geometry([self.stride, self.stride], [0, 0], [1, 1], 1)

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        batch, _, height, width = self.shape
        return batch, self.out_channels, -(-height // self.stride), -(-width // self.stride)


CASES = (
    Case("many_slabs", (2, 24, 50, 43), 40),
    Case("stride2_many_slabs", (3, 16, 61, 60), 40, stride=2),
    Case("sixty_five_to_a_hundred", (2, 65, 9, 11), 100),
    Case("five_to_three", (3, 5, 7, 6), 3),
    Case("one_channel", (2, 1, 9, 8), 3),
    Case("to_one_channel", (2, 6, 9, 8), 1, affine=False),
    Case("spatial_1x1", (8, 64, 1, 1), 100),
    Case("one_pixel", (1, 8, 1, 1), 16),
    Case("wider_than_a_block", (2, 1100, 5, 5), 65),
    Case("unaligned_view", (2, 17, 6, 5), 33, unaligned=True),
    Case("stride2_unaligned_view", (2, 17, 7, 5), 33, stride=2, unaligned=True),
)


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw_norm(channels: int, dtype: torch.dtype, affine: bool = True) -> Norm:
    mean, bias = torch.randn(2, channels, dtype=accumulation(dtype)) * 0.5
    var, weight = torch.rand(2, channels, dtype=accumulation(dtype)) + 0.5
    weight[::3] *= -1
    learnt = (weight, bias) if affine else (None, None)
    return Norm(mean, var, *(None if vector is None else vector.to(parameter_dtype(dtype)) for vector in learnt), 1e-3)


def calls(case: Case, dtype: torch.dtype, layout: str) -> dict[str, tuple]:
    """name of a call: (function, arguments, names of what it returns)."""
    channels, out_channels, wide = case.shape[1], case.out_channels, accumulation(dtype)
    x = draw(case.shape, dtype, layout, case.unaligned).add_(0.5)  # means of zero would be nothing but rounding
    x_norm, norm, other = (draw_norm(c, dtype, case.affine) for c in (channels, out_channels, out_channels))
    conv_weight = draw((out_channels, channels, 1, 1), dtype, layout, scale=channels**-0.5)
    conv_out, residual = (draw(case.out_shape, dtype, layout, case.unaligned).add_(0.5) for _ in range(2))
    # away from the kink, where rounding decides
    near = reference._normalised(conv_out.double(), tree_map_only(torch.Tensor, torch.Tensor.double, norm)).abs() < 0.05
    dy, dz = (draw(case.out_shape, dtype, layout) for _ in range(2))
    dy[near] = 0
    mean, constant = torch.randn(2, channels, dtype=wide)
    dz_matrix = torch.randn(out_channels, channels, dtype=wide) * out_channels**-0.5
    x_matrix = torch.randn(channels, channels, dtype=wide) * 0.1 * channels**-0.5
    means = tuple(torch.randn(2, out_channels, dtype=wide) * 0.1)
    shortcut = Shortcut(draw(case.shape, dtype, layout), conv_weight.flip(0), case.geometry, other)
    add, geometry = draw(case.shape, dtype, layout), case.geometry
    gradient = (dz, x, x_norm, geometry)
    statistics = ("conv_out", "mean", "var")
    pooled, index = reference.pool(conv_out, norm)
    dpooled = draw(pooled.shape, dtype, layout).masked_fill(pooled < 0.05, 0.0)
    return {
        "backward_reduce_pooled": ("backward_reduce", (dpooled, conv_out, norm, True, index), ("sum_dz", "sum_dzx")),
        "backward_apply_pooled": ("backward_apply", (dpooled, conv_out, norm, True, *means, index), ("dconv_out",)),
        "conv": ("conv", (x, None, conv_weight, geometry, 2, True), statistics),
        "conv_prologue": ("conv", (x, x_norm, conv_weight, geometry, 3, True), statistics),
        "conv_no_statistics": ("conv", (x, x_norm, conv_weight, geometry, 4, False), statistics),
        "conv_library": ("conv", (x, x_norm, conv_weight, geometry, 1, True), statistics),
        "batch_statistics": ("batch_statistics", (conv_out,), ("mean", "var")),
        "apply": ("apply", (conv_out, norm), ("y",)),
        "apply_residual": ("apply", (conv_out, norm, residual), ("y",)),
        "apply_normed_residual": ("apply", (conv_out, norm, residual, other), ("y",)),
        "apply_no_relu": ("apply", (conv_out, norm, residual, other, False), ("y",)),
        "gram": ("gram", (x, x_norm, geometry), ("mean", "cov")),
        "gram_of_x": ("gram", (x, None, geometry), ("mean", "cov")),
        "join": ("conv_join", (x, x_norm, conv_weight, geometry, norm), ("y",)),
        "join_residual": ("conv_join", (x, None, conv_weight, geometry, norm, residual), ("y",)),
        "join_normed_residual": ("conv_join", (x, x_norm, conv_weight, geometry, norm, residual, other), ("y",)),
        "join_shortcut": ("conv_join", (x, x_norm, conv_weight, geometry, norm, None, None, shortcut), ("y",)),
        "mask": ("mask", (dy, residual.relu(), x), ("dz",)),
        "backward_reduce": ("backward_reduce", (dy, conv_out, norm, True), ("sum_dz", "sum_dzx")),
        "backward_reduce_no_relu": ("backward_reduce", (dz, conv_out, norm, False), ("sum_dz", "sum_dzx")),
        "backward_apply": ("backward_apply", (dy, conv_out, norm, True, *means), ("dconv_out",)),
        "backward_apply_no_relu": ("backward_apply", (dz, conv_out, norm, False, *means), ("dconv_out",)),
        "backward_apply_eval": ("backward_apply", (dy, conv_out, norm, True, None, None), ("dconv_out",)),
        "backward_apply_eval_no_relu": ("backward_apply", (dz, None, norm, False, None, None), ("dconv_out",)),
        "conv_backward": (
            "conv_backward", (dz, x, x_norm, conv_weight, geometry, 3, True, True, add), ("dx", "dconv_weight"),
        ),
        "outer": ("outer", (*gradient, mean), ("outer", "sum_dz")),
        "gram_dgrad": ("gram_dgrad", (*gradient, dz_matrix, x_matrix, mean, constant), ("dx",)),
        "gram_dgrad_add": ("gram_dgrad", (dz, x, None, geometry, dz_matrix, x_matrix, mean, constant, add), ("dx",)),
    }  # fmt: skip


LIBRARY = ("conv", "conv_backward")  # how these split is the library's affair
PRODUCTS = ("conv_join", "gram", "outer", "gram_dgrad")  # and these in NCHW


def run(primitives, function: str, arguments: tuple, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    results = getattr(primitives, function)(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    return {name: result for name, result in zip(names, results, strict=True) if result is not None}


def as_used(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The variance as it is judged everywhere: in a running one, after a step of momentum 0.1."""
    return {name: 0.9 + 0.1 * value if name == "var" else value for name, value in results.items()}


def check(call: tuple, dtype: torch.dtype, ours=native_primitives) -> None:
    function, arguments, names = call
    exact = (function, tree_map_only(torch.Tensor, torch.Tensor.double, arguments), names)
    # Sums too: their floor is their own rounding, and of few channels the reference's may by luck have none.
    terms = {"mean": 0.0, "cov": 0.0}
    if "sum_dz" in names:
        squares = arguments[0].double().square().sum((0, 2, 3))
        terms = dict.fromkeys(("sum_dz", "sum_dzx", "outer"), squares[squares.isfinite()].mean().sqrt().item())
    made = ((ours, *call), (reference, *call), (reference, *exact))
    assert_all_match(*(as_used(run(*each)) for each in made), compute_dtype=dtype, terms=terms)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_as_near_to_float64_as_the_reference(case, dtype, layout):
    if case.name == "one_pixel" and layout == "channels_last":
        pytest.skip("the same memory and strides as nchw")
    for call in calls(case, dtype, layout).values():
        check(call, dtype)


@pytest.mark.parametrize("geometry", [THREE_BY_THREE, Geometry([2, 1], [1, 1], [1, 1], 2)], ids=["plain", "grouped"])
def test_what_is_no_1x1_takes_the_library(geometry):
    x, x_norm = draw((2, 8, 9, 7), torch.float32, "channels_last"), draw_norm(8, torch.float32)
    conv_weight = draw((6, 8 // geometry.groups, 3, 3), torch.float32, "channels_last", scale=0.2)
    check(("conv", (x, x_norm, conv_weight, geometry, 3, True), ("conv_out", "mean", "var")), torch.float32)
    join = (x, x_norm, conv_weight, geometry, draw_norm(6, torch.float32))
    check(("conv_join", join, ("y",)), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thread_count_changes_no_bit(dtype, layout):
    for case in CASES[:4]:
        for name, call in calls(case, dtype, layout).items():
            if call[0] in LIBRARY or (layout == "nchw" and call[0] in PRODUCTS):
                continue
            results = []
            for threads in (1, 2, 8):
                torch.set_num_threads(threads)
                results.append(run(native_primitives, *call))
            for other in results[1:]:
                for key, value in other.items():
                    assert torch.equal(value, results[0][key]), f"{case.name} {name} {key}"


def test_inputs_are_never_written():
    for layout in LAYOUTS:
        for name, (function, arguments, names) in calls(CASES[1], torch.float32, layout).items():
            tensors = [t for t in tree_flatten(arguments)[0] if isinstance(t, torch.Tensor)]
            before = [tensor.clone() for tensor in tensors]
            results = run(native_primitives, function, arguments, names)
            for tensor, copy in zip(tensors, before, strict=True):
                assert torch.equal(tensor, copy), name
                assert all(result.data_ptr() != tensor.data_ptr() for result in results.values()), name


RESHAPED = {
    "nchw": lambda t: t.contiguous(),
    "a_part": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "flipped": lambda t: t.flip(3).contiguous().flip(3),
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("change", RESHAPED)
def test_gradients_and_residuals_of_any_format(change):
    """What comes with the main tensor follows its format: the same bits."""
    made = calls(CASES[2], torch.float32, "channels_last")
    others = {
        "apply_residual": 2, "apply_normed_residual": 2, "join_residual": 5, "mask": 0, "backward_reduce": 0,
        "backward_apply": 0, "outer": 0, "gram_dgrad": 0, "gram_dgrad_add": 8,
    }  # fmt: skip
    for name, position in others.items():
        function, arguments, names = made[name]
        changed = list(arguments)
        changed[position] = RESHAPED[change](arguments[position])
        expected, results = (run(native_primitives, function, tuple(a), names) for a in (arguments, changed))
        for key, value in expected.items():
            assert torch.equal(results[key], value), f"{name} {key}"
            assert results[key].stride() == value.stride(), f"{name} {key}"


def test_an_expanded_gradient():
    function, (dy, *rest), names = calls(CASES[2], torch.float32, "channels_last")["backward_apply"]
    expanded = torch.full((), 0.5).expand(dy.shape)
    ours, same = (run(native_primitives, function, (each, *rest), names) for each in (expanded, expanded.clone()))
    assert torch.equal(ours["dconv_out"], same["dconv_out"])
    assert ours["dconv_out"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_stand_where_the_references_do(value, layout):
    case = CASES[2]
    made = calls(case, torch.float32, layout)
    for call in made.values():
        call[1][0][0, 1, 2, 3] = value
        if call[0] in ("backward_reduce", "backward_apply") and call[1][1] is not None:
            call[1][1][1, 0, 1, 1] = value
    for name, call in made.items():
        # the next test: the reference's shift turns an infinite mean into NaN
        if name.startswith("gram") and len(call[2]) == 2 and value == value:
            continue
        check(call, torch.float32)


def test_the_mean_of_an_infinite_channel_is_infinite():
    x = draw((2, 4, 5, 5), torch.float32, "channels_last")
    x[0, 1, 0, 0] = float("inf")
    mean, cov = native_primitives.gram(x, None, CASES[0].geometry)
    torch.testing.assert_close(mean, x.mean((0, 2, 3)))
    assert cov[1].isnan().any()
    assert cov[0, 0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sigma", [1.0, 0.01])
def test_variance_beside_a_large_mean(sigma, dtype):
    """The Gram form's variance of W a is as good as that of the W a which the library makes."""
    x = draw((4, 64, 20, 20), torch.float32, "channels_last", scale=sigma).add_(30).to(dtype)
    conv_weight = draw((128, 64, 1, 1), dtype, scale=0.125)
    mean, cov = native_primitives.gram(x, None, CASES[0].geometry)
    matrix = conv_weight.flatten(1).float()
    ours = ((matrix @ cov) * matrix).sum(1)
    stock = F.conv2d(x, conv_weight).float().var((0, 2, 3), correction=0)
    exact = F.conv2d(x.double(), conv_weight.double()).var((0, 2, 3), correction=0)
    assert rmse(ours, exact) <= 2 * rmse(stock, exact) + 1e-6 * exact.abs().max().item()
    assert rmse(matrix @ mean, F.conv2d(x.double(), conv_weight.double()).mean((0, 2, 3))) < 1e-4
    _, _, var = native_primitives.conv(x, None, conv_weight, CASES[0].geometry, 2, True)
    as_stored = F.conv2d(x, conv_weight).double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), as_stored, rtol=0.05, atol=2 * rmse(stock, exact))


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_batch(layout):
    case = Case("empty", (0, 8, 6, 6), 12)
    for name, call in calls(case, torch.float32, layout).items():
        if call[0] == "gram_dgrad":
            assert run(native_primitives, *call)["dx"].shape == case.shape
            continue
        ours, expected = run(native_primitives, *call), run(reference, *call)
        for key, value in expected.items():
            assert ours[key].shape == value.shape, f"{name} {key}"
            torch.testing.assert_close(ours[key], value, equal_nan=True)


def scaled(position):
    """Result `position` is off by one part in a hundred."""

    def mutant(original, *arguments):
        results = original(*arguments)
        return tuple(r * 1.01 if at == position else r for at, r in enumerate(results))

    return mutant


MUTANTS = {
    "conv_prologue": ("conv", lambda original, x, x_norm, *rest: original(x, None, *rest)),
    "conv": ("conv", scaled(2)),
    "apply_normed_residual": ("apply", lambda original, a, n, r, rn, *rest: original(a, n, r, None, *rest)),
    "apply": ("apply", lambda original, a, n: original(a, n._replace(eps=0.0))),
    "gram": ("gram", scaled(1)),
    "join_normed_residual": ("conv_join", lambda original, *arguments: original(*arguments[:5])),
    "mask": ("mask", lambda original, dy, y, x: dy.masked_fill(y < 0, 0.0)),
    "backward_reduce": ("backward_reduce", lambda original, dy, x, norm, relu: original(dy, x, norm, False)),
    "backward_apply": ("backward_apply", lambda original, *arguments: original(*arguments[:4], None, None)),
    "outer": ("outer", lambda original, *arguments: original(*arguments[:4], torch.zeros_like(arguments[4]))),
    "gram_dgrad": ("gram_dgrad", lambda original, *a: original(*a[:7], torch.zeros_like(a[7]), *a[8:])),
    "gram_dgrad_add": ("gram_dgrad", lambda original, *arguments: original(*arguments[:8])),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch):
    call = calls(CASES[2], torch.float32, "channels_last")[name]
    check(call, torch.float32)
    function, mutant = MUTANTS[name]
    original = getattr(native_primitives, function)
    monkeypatch.setattr(native_primitives, function, lambda *arguments: mutant(original, *arguments))
    with pytest.raises(AssertionError):
        check(call, torch.float32)
