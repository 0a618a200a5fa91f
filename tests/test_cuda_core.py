"""The CUDA batch norm kernels' grids, threads and arithmetic on the host, beside the reference: no GPU takes part."""

import ctypes
from dataclasses import replace

import cuda_host
import pytest
import torch
from cases import DTYPES, LAYOUTS, draw, named
from numerics import assert_all_match
from test_primitives import Case, calls, draw_norm
from test_primitives import check as check_beside_reference

from resnet_fast.backends import reference

pytestmark = pytest.mark.usefixtures("poison")

FUNCTIONS = ("batch_statistics", "apply", "mask", "backward_reduce", "backward_apply")
CASES = (  # `out_channels`, the second number, are what is normalised
    Case("one_vector_a_row", (3, 8, 5, 4), 8),
    Case("rows_of_many_blocks", (2, 4, 90, 90), 16),
    Case("sixty_five", (3, 5, 9, 11), 65),
    Case("hundred", (2, 6, 7, 7), 100),
    Case("three_with_rows_left_over", (2, 4, 33, 31), 3),
    Case("one_channel", (2, 6, 9, 7), 1, affine=False),
    Case("fewer_rows_than_a_group", (1, 3, 1, 3), 5),
    Case("wider_than_a_block", (1, 2, 5, 5), 2100),
    Case("plane_of_many_blocks", (1, 3, 131, 130), 3),
    Case("unaligned_view", (2, 17, 6, 5), 33, unaligned=True),
    Case("aligned_channels_unaligned_view", (2, 4, 6, 5), 32, unaligned=True),
    Case("spatial_1x1", (8, 6, 1, 1), 100),
    Case("one_value", (1, 4, 1, 1), 1),
)


def made(case: Case, dtype: torch.dtype, layout: str) -> dict[str, tuple]:
    """The calls of functions that are here."""
    return {name: call for name, call in calls(case, dtype, layout).items() if call[0] in FUNCTIONS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_as_near_to_float64_as_the_reference(case, dtype, layout):
    for call in made(case, dtype, layout).values():
        check_beside_reference(call, dtype, cuda_host)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kept", [False, True], ids=["from_x", "from_y"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_bn_act(layout, dtype, kept, training):
    x, dy = draw((3, 20, 7, 5), dtype, layout).add_(1), draw((3, 20, 7, 5), dtype, layout)
    norm = draw_norm(20, dtype)
    forward = (norm.weight, norm.bias, norm.mean, norm.var)
    y = reference.bn_act(x, *forward, None, norm.eps, True)
    dy[reference.bn_act(x.double(), *(v.double() for v in forward), None, norm.eps, False).abs() < 0.05] = 0
    names = ("dx", "dweight", "dbias", "dresidual")

    def expected(x, dy, forward):
        rest = (norm.eps, True, training, [True] * 4)
        return dict(zip(names, reference.bn_act_backward(dy, x, y.to(x.dtype), *forward, *rest), strict=True))

    ours = dict(zip(names, cuda_host.bn_act_backward(dy, x, y if kept else None, norm, True, training), strict=True))
    exact = expected(x.double(), dy.double(), [vector.double() for vector in forward])
    terms = dict.fromkeys(("dweight", "dbias"), dy.double().square().sum((0, 2, 3)).mean().sqrt().item())
    assert_all_match(ours, expected(x, dy, forward), exact, dtype, terms)


@pytest.mark.parametrize("offset", [1e3, 1e5], ids=str)
@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_beside_a_large_mean(layout, channels, offset):
    """Each value carries the mean's rounding; the variance of these values must not lose more."""
    x = draw((4, channels, 40, 40), torch.float32, layout).add_(offset)
    mean, var = cuda_host.batch_statistics(x)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0)
    torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_stand_where_the_references_do(value, layout):
    for call in made(CASES[2], torch.float32, layout).values():
        call[1][0][0, 1, 2, 3] = value
        if call[0] in ("backward_reduce", "backward_apply") and call[1][1] is not None:
            call[1][1][1, 0, 1, 1] = value
        check_beside_reference(call, torch.float32, cuda_host)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_norm_in_place(layout):
    """What conv_bn_act does to a convolution's output: y is x."""
    x, norm = draw((2, 12, 9, 7), torch.bfloat16, layout), draw_norm(12, torch.bfloat16)
    expected = cuda_host.apply(x, norm)
    image, vectors = cuda_host.image_of(x), [vector.contiguous() for vector in norm[:4]]
    pointers = cuda_host._pointers(x, None, x, *vectors, *[None] * 4)
    eps = ctypes.c_double(norm.eps)
    cuda_host.library("bn").apply(ctypes.byref(image), 2, pointers, eps, eps, ctypes.c_bool(False), ctypes.c_bool(True))
    assert torch.equal(x, expected)


MUTANTS = {
    "apply_normed_residual": lambda ours, x, n, r, rn, *rest: ours.apply(x, n, r, None, *rest),
    "apply": lambda ours, x, n: ours.apply(x, n._replace(eps=0.0)),
    "backward_reduce": lambda ours, dy, x, n, relu: ours.backward_reduce(dy, x, n, False),
    "backward_apply": lambda ours, *arguments: ours.backward_apply(*arguments[:4], None, None),
    "mask": lambda ours, dy, y, x: dy.masked_fill(y < 0, 0.0),
    "batch_statistics": lambda ours, x: (ours.batch_statistics(x)[0], x.float().var((0, 2, 3))),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name):
    case = replace(CASES[2], shape=(1, 5, 5, 4))
    call = calls(case, torch.float32, "channels_last")[name]

    class Mutant:
        pass

    setattr(Mutant, call[0], staticmethod(lambda *arguments: MUTANTS[name](cuda_host, *arguments)))
    with pytest.raises(AssertionError):
        check_beside_reference(call, torch.float32, Mutant)


# ---- grids ----

PART = ("rows", "cols", "begin", "slots", "map_x", "map_y", "map_z", "block_x", "block_y", "sum_x", "sum_y", "sum_z")
GRID_X, GRID_YZ = 2**31 - 1, 65535


def geometry(image: tuple[int, int, int, bool], vector: int) -> tuple[dict, dict, int, int]:
    """The whole accesses' launch, the rest's, how many partial results a channel gets, and their bytes."""
    out = (ctypes.c_int64 * (2 * len(PART) + 2))()
    cuda_host.library("bn").geometry(ctypes.byref(cuda_host.Image(*image)), ctypes.c_int64(vector), out)
    whole, rest = dict(zip(PART, out, strict=False)), dict(zip(PART, out[len(PART) :], strict=False))
    return whole, rest, out[-2], out[-1]


SIZES = {
    "nothing": (0, 64, 49),
    "one": (1, 1, 1),
    "one_pixel": (1, 2048, 1),
    "resnet50": (256, 64, 112 * 112),
    "more_than_int32_in_one_plane": (1, 1, 2**31 + 1),
    "more_than_int32_images": (2**31 + 1, 1, 1),
    "more_than_int32_channels": (1, 2**31 + 1, 1),
    "more_than_int32_in_all": (2**15, 65, 1009),
    "far_more": (2**20, 2**12, 2**12),
}


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True], ids=list(LAYOUTS))
@pytest.mark.parametrize("size", SIZES)
def test_launches_are_valid_and_own_every_element(size, channels_last, vector):
    batch, channels, plane = SIZES[size]
    if channels > GRID_X and not channels_last:
        pytest.skip("refused at the launch: a grid's x is a channel of (N, C, H, W)")
    *parts, chunks, size_bytes = geometry((batch, channels, plane, channels_last), vector)
    assert sum(part["rows"] * part["cols"] for part in parts) == batch * channels * plane
    assert parts[1]["begin"] == parts[0]["rows"] * parts[0]["cols"] or parts[1]["rows"] == 0
    expected_chunks = 0
    for part, width in zip(parts, (vector, 1), strict=True):
        if part["rows"] == 0:
            continue
        assert part["block_x"] * part["block_y"] == 256
        for kernel in ("map", "sum"):
            assert 1 <= part[f"{kernel}_x"] <= GRID_X
            assert 1 <= part[f"{kernel}_y"] <= GRID_YZ
            assert 1 <= part[f"{kernel}_z"] <= GRID_YZ
        assert part["map_x"] * part["block_x"] * width >= part["cols"], "a column has no thread"
        if channels_last:
            assert part["cols"] % width == 0, "a row is not whole accesses"
            assert part["sum_x"] * part["block_x"] * width >= part["cols"]
        else:
            assert part["slots"] * width >= part["cols"]
            assert part["sum_x"] == channels
        group = part["cols"] // channels if channels_last else 1
        expected_chunks += part["sum_y"] * part["sum_z"] * group
    assert chunks == expected_chunks
    if vector > 1:
        assert size_bytes >= chunks * channels * 12
        assert size_bytes <= max(2**16 * channels, 2**27), "partial sums take as much memory as an activation"


@pytest.mark.parametrize("vector", [1, 2, 4, 8])
@pytest.mark.parametrize("channels_last", [False, True], ids=list(LAYOUTS))
@pytest.mark.parametrize(
    "shape", [(3, 65, 99), (2, 3, 4290), (1, 2100, 25), (2, 33, 1), (5, 1, 7), (1, 5, 3), (2, 8, 64)]
)
def test_every_element_is_visited_once_aligned_and_by_its_channel(shape, channels_last, vector):
    batch, channels, plane = shape
    counts = torch.zeros(batch * channels * plane, dtype=torch.int8)
    image = cuda_host.Image(*shape, channels_last)
    cuda_host.library("bn").cover(ctypes.byref(image), ctypes.c_int64(vector), ctypes.c_void_p(counts.data_ptr()))
    assert torch.equal(counts, torch.ones_like(counts))
