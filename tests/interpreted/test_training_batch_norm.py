"""Batch norm's training passes, Gram matrices and outer products: each primitive beside the reference in float64."""

from dataclasses import dataclass

import pytest
import requires_triton  # noqa: F401
import torch
from cases import bn_tensors, draw
from interpreted.guarded import SIDES, Fence
from numerics import assert_match, compare

from resnet_fast.backends import triton_batch_norm
from resnet_fast.backends.primitives import Geometry, Norm, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POINTWISE, STRIDED = Geometry([1, 1], [0, 0], [1, 1], 1), Geometry([2, 2], [0, 0], [1, 1], 1)


@dataclass(frozen=True)
class Case:
    name: str
    shape: tuple[int, int, int, int]
    affine: bool = True


CASES = (
    Case("odd_channels", (2, 5, 7, 9)),
    Case("one_channel", (3, 1, 4, 5)),
    Case("hundred_channels", (2, 100, 3, 4)),
    Case("several_slabs", (2, 64, 6, 7)),
    Case("two_tiles_of_channels", (1, 130, 3, 5), affine=False),
    Case("one_pixel", (1, 64, 1, 1)),
)


def norm_of(channels: int, affine: bool = True) -> Norm:
    tensors = bn_tensors(channels, torch.float32, affine)
    vectors = (tensors[name] for name in ("running_mean", "running_var"))
    return Norm(*vectors, tensors.get("weight"), tensors.get("bias"), 0.1)


def wide(value):
    """The same in float64."""
    if isinstance(value, Norm):
        return Norm(*(vector if vector is None else vector.double() for vector in value[:4]), value.eps)
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def fenced(value, fence: Fence):
    if isinstance(value, Norm):
        return Norm(*(vector if vector is None else fence.put(vector) for vector in value[:4]), value.eps)
    return fence.put(value) if isinstance(value, torch.Tensor) else value


def check(name: str, *arguments, dtype=None, terms=(), module=triton_batch_norm) -> None:
    """The primitive `name` of `module` on these arguments, from memory between unreadable pages, by the reference's.

    terms: of each result, the size of the sums that it is rounded from, where they may cancel.
    """
    as_list = lambda results: results if isinstance(results, tuple) else (results,)  # noqa: E731
    exact = as_list(getattr(reference, name)(*map(wide, arguments)))
    stock = as_list(getattr(reference, name)(*arguments))
    found = []
    for side in SIDES:
        fence = Fence(side)
        found.append(as_list(getattr(module, name)(*(fenced(value, fence) for value in arguments))))
        fence.check()
        results = [
            compare(f"{name} {number}", *tensors, compute_dtype=dtype, terms=terms[number] if terms else None)
            for number, tensors in enumerate(zip(found[-1], stock, exact, strict=True))
        ]
        assert_match(results)
    for first, second in zip(*found, strict=True):
        assert torch.equal(first.nan_to_num(), second.nan_to_num()), "it matters where in memory tensors lie"


def check_statistics(x: torch.Tensor, dtype: torch.dtype) -> None:
    """Both are float32 sums in two stages, each rounded at its own size; PyTorch's on a CPU are in float64."""
    var = x.double().nan_to_num(0, 0, 0).var(correction=0).item()
    check("batch_statistics", x, dtype=dtype, terms=(2 * var**0.5, 2 * var))


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """So that a small tensor has several slabs, splits and partials."""
    monkeypatch.setattr(triton_batch_norm, "_TILE", 256)
    monkeypatch.setattr(triton_batch_norm, "_BLOCK", 32)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_pass(case, dtype):
    x, dy, residual = (draw(case.shape, dtype, "channels_last") for _ in range(3))
    norm, other = norm_of(case.shape[1], case.affine), norm_of(case.shape[1])
    sums = torch.randn(2, case.shape[1]) * 0.1
    size = (x.numel() / case.shape[1]) ** 0.5  # of a sum of so many values of order one
    check_statistics(x, dtype)
    check("apply", x, norm)
    check("apply", x, norm, residual, None, True)
    check("apply", x, norm, residual, other, False)
    for relu in (True, False):
        check("backward_reduce", dy, x, norm, relu, dtype=dtype, terms=(size, size))
        check("backward_apply", dy, x, norm, relu, *sums)
        check("backward_apply", dy, x, norm, relu, None, None)
    check("backward_apply", dy, None, norm, False, None, None)
    check("mask", dy, residual, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", [POINTWISE, STRIDED], ids=["pointwise", "strided"])
@pytest.mark.parametrize(("channels", "rows"), [(16, 64), (5, 33), (40, 100)])
def test_products(channels, rows, geometry, dtype):
    """Channels of odd number, tiles that end early, several splits. Judged by what they are for: the statistics of a
    1x1 convolution and its weight's gradient, which PyTorch takes from a rounded output and rounds."""
    x = draw((3, channels, 9, 8), dtype, "channels_last")
    norm, mean = norm_of(channels), torch.randn(channels)
    dz = draw((3, rows, 9, 8) if geometry is POINTWISE else (3, rows, 5, 4), dtype, "channels_last")
    weight = draw((rows, channels, 1, 1), dtype, "channels_last")
    matrix = weight.flatten(1).double()
    for pending in (None, norm):
        fence = Fence("end")
        inputs = fenced(x, fence), fenced(pending, fence)
        input_mean, cov = triton_batch_norm.gram(*inputs, geometry)
        product, total = triton_batch_norm.outer(fence.put(dz), *inputs, geometry, fence.put(mean))
        fence.check()
        activated = x if pending is None else reference.apply(x, pending)
        stock = reference.batch_statistics(reference.conv(activated, None, weight, geometry, 1, False)[0])
        exact = reference.batch_statistics(
            reference.conv(wide(activated), None, weight.double(), geometry, 1, False)[0]
        )
        ours = (matrix @ input_mean.double()).float(), (matrix @ cov.double() * matrix).sum(1).float()
        spread = exact[1].mean().item()
        found = [
            compare(name, *each, compute_dtype=dtype, terms=terms)
            for name, terms, *each in zip(("mean", "var"), (spread**0.5, spread), ours, stock, exact, strict=True)
        ]
        exact_product, exact_total = reference.outer(wide(dz), wide(activated), None, geometry, wide(mean))
        rounded = exact_product.to(dtype).float()
        size = (dz.numel() / rows) ** 0.5
        found.append(compare("outer", product, rounded, exact_product, compute_dtype=dtype, terms=size))
        found.append(compare("sum", total, exact_total.float(), exact_total, compute_dtype=dtype, terms=size))
        assert_match(found)


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_large_means_and_small_variances(shift):
    """Shifted sums: mean 30 and standard deviation 0.01 leave three digits of float32's seven."""
    x = (
        (torch.randn(4, 8, 12, 10, dtype=torch.float64) * 0.01 + shift)
        .float()
        .contiguous(memory_format=torch.channels_last)
    )
    mean, var = triton_batch_norm.batch_statistics(x)
    exact_mean, exact_var = reference.batch_statistics(x.double())
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)
    _, cov = triton_batch_norm.gram(x, None, POINTWISE)
    _, exact_cov = reference.gram(x.double(), None, POINTWISE)
    torch.testing.assert_close(cov.double(), exact_cov, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 77])
def test_special_values(value, place):
    x = draw((2, 8, 9, 9), torch.float32, "channels_last")
    x.permute(0, 2, 3, 1).reshape(-1, 8)  # a view: rows are pixels
    x[place // 81, 3, place % 81 // 9, place % 9] = value
    dy = draw(x.shape, torch.float32, "channels_last")
    norm = norm_of(8)
    check_statistics(x, torch.float32)
    check("apply", x, norm)
    check("apply", dy, norm, x)
    check("backward_reduce", dy, x, norm, True)
    check("backward_apply", dy, x, norm, True, torch.randn(8), torch.randn(8))
    check("mask", dy, x, x)


@pytest.mark.parametrize("layout", ["nchw", "expanded", "sliced"])
def test_operands_in_other_layouts(layout):
    """x is channels_last and sets the format; what comes with it may be anything."""
    x, norm = draw((2, 6, 5, 7), torch.float32, "channels_last"), norm_of(6)
    other = {
        "nchw": draw((2, 6, 5, 7), torch.float32),
        "expanded": torch.randn(1, 6, 1, 1).expand(2, 6, 5, 7),
        "sliced": draw((2, 12, 5, 7), torch.float32)[:, ::2],
    }[layout]
    for ours, theirs in (
        (triton_batch_norm.apply(x, norm, other), reference.apply(x, norm, other)),
        (triton_batch_norm.backward_reduce(other, x, norm, True), reference.backward_reduce(other, x, norm, True)),
        (triton_batch_norm.outer(other, x, None, POINTWISE, torch.zeros(6)),
         reference.outer(other, x, None, POINTWISE, torch.zeros(6))),
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert triton_batch_norm.apply(x, norm, other).is_contiguous(memory_format=torch.channels_last)


def test_merging_partials_of_unequal_counts_and_of_none():
    parts = [torch.randn(count, 7, dtype=torch.float64) * 3 + number for number, count in enumerate((5, 1, 0, 9, 300))]
    means = torch.stack([part.mean(0) if len(part) else torch.full((7,), float("nan")) for part in parts])
    m2s = torch.stack([(part - part.mean(0)).square().sum(0) for part in parts]).nan_to_num(float("nan"))
    counts = torch.tensor([float(len(part)) for part in parts])
    mean, var = triton_batch_norm.merge_statistics(means.float(), m2s.float(), counts)
    whole = torch.cat(parts)
    torch.testing.assert_close(mean.double(), whole.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), whole.var(0, correction=0), rtol=1e-5, atol=1e-5)
