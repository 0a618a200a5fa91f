"""A stem's max-pool behind batch norm and ReLU in training: each pass beside the reference, and mutants of it."""

from collections.abc import Callable

import pytest
import requires_triton  # noqa: F401
import torch
import torch.nn.functional as F
from cases import draw
from interpreted import huge, mutated
from interpreted.forked import PASSED, outcome
from interpreted.guarded import SIDES, Fence
from interpreted.kernel_cases import DTYPES, POOL_SHAPES
from interpreted.mutated import Mutant
from interpreted.test_training_batch_norm import check, fenced, norm_of

from resnet_fast.backends import triton_pool
from resnet_fast.backends.primitives import Norm, reference

NAN, INF = float("nan"), float("inf")
SHAPES = pytest.mark.parametrize("name", POOL_SHAPES)
TIES = POOL_SHAPES["several_tiles"]


def exact_norm(channels: int) -> Norm:
    """Of powers of two, so that no result depends on how it is computed. Some scales are negative."""
    number = torch.arange(channels)
    weight = torch.where(number % 3 == 0, -1.0, 0.5)
    return Norm((number % 4).float(), torch.full((channels,), 4.0), weight, (number % 2).float(), 0.0)


def integers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Few of them, so that most windows have their maximum more than once."""
    return (draw(shape, torch.float32, "channels_last") * 2).round().to(dtype)


def check_pool(x: torch.Tensor) -> None:
    """The maxima and their places are the very ones that PyTorch picks."""
    norm = exact_norm(x.shape[1])
    y, index = reference.pool(x, norm)
    for side in SIDES:
        fence = Fence(side)
        ours, places = triton_pool.pool(fence.put(x), fenced(norm, fence))
        fence.check()
        assert ours.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(ours, y, rtol=0, atol=0, equal_nan=True, check_stride=False)
        assert torch.equal(places, index)


def check_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> None:
    """Both passes; dy is of any format."""
    x, norm = draw(shape, dtype, "channels_last"), norm_of(shape[1])
    y, index = reference.pool(x, norm)
    dy, sums = draw(y.shape, dtype, "channels_last"), torch.randn(2, shape[1]) * 0.1
    size = (dy.numel() / shape[1]) ** 0.5  # of a sum of so many values of order one
    check("backward_reduce", dy, x, norm, True, index, dtype=dtype, terms=(size, size), module=triton_pool)
    check("backward_apply", dy, x, norm, True, *sums, index, module=triton_pool)
    check("backward_apply", dy, x, norm, True, None, None, index, module=triton_pool)


@pytest.fixture(autouse=True)
def _few_slabs(monkeypatch):
    """So that a slab has several tiles, and a tensor several slabs."""
    monkeypatch.setattr(triton_pool, "_SLABS", 4)


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pool(name, dtype):
    check_pool(integers(POOL_SHAPES[name], dtype))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_pool_of_what_is_not_finite(value):
    """Of several NaNs in a window PyTorch names the last."""
    x = integers((2, 64, 9, 8), torch.float32)
    x[0, 3, 0, 0] = x[0, 63, 8, 7] = x[1, 5, 4, 3] = x[1, 5, 4, 4] = x[1, 5, 5, 4] = value
    x[1, 7] = value
    check_pool(x)


@SHAPES
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient(name, dtype):
    check_gradient(POOL_SHAPES[name], dtype)


@pytest.mark.parametrize("value", [NAN, INF])
def test_gradient_of_what_is_not_finite(value):
    """A NaN has the gradient of every window that it lies in, and passes it."""
    x, norm = draw((1, 8, 7, 6), torch.float32, "channels_last"), norm_of(8)
    x[0, 3, 3, 3] = x[0, 4, 6, 5] = value
    dy = draw((1, 8, 4, 3), torch.float32, "channels_last")
    _, index = triton_pool.pool(x, norm)
    dx = triton_pool.backward_apply(dy, x, norm, True, None, None, index)
    leaf = x.double().requires_grad_()
    vectors = (vector.double() for vector in norm[:4])
    F.max_pool2d(F.batch_norm(leaf, *vectors, eps=norm.eps).relu(), 3, 2, 1).backward(dy.double())
    torch.testing.assert_close(dx.double(), leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 5, 6, 7), (3, 64, 1, 1)], ids=str)
def test_foreign_tensors_are_the_references(shape):
    x, norm = draw(shape, torch.float64, "channels_last"), norm_of(shape[1])
    y, index = triton_pool.pool(x, norm)
    expected = reference.pool(x, norm)
    assert torch.equal(y, expected[0])
    assert torch.equal(index, expected[1])
    whole = F.max_pool2d(reference.apply(x, norm), 3, 2, 1)
    assert torch.equal(y, whole)


def test_dy_in_other_layouts():
    x, norm = draw((2, 6, 5, 7), torch.float32, "channels_last"), norm_of(6)
    y, index = triton_pool.pool(x, norm)
    for dy in (draw(y.shape, torch.float32), torch.randn(1, 6, 1, 1).expand(y.shape)):
        arguments = (dy, x, norm, True, *torch.randn(2, 6), index)
        ours, theirs = (module.backward_apply(*arguments) for module in (triton_pool, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("notices", [huge.check_training_pool, huge.check_training_pool_gradient])
def test_more_than_two_to_the_31_elements(notices):
    assert outcome(notices) == PASSED


def test_equals_when_rounded():
    equal_when_rounded()


def ties() -> None:
    check_pool(integers(TIES, torch.float32))


def equal_when_rounded() -> None:
    """1 + 2^-12 is 1 in bfloat16, and then the first of the two is the maximum."""
    x = torch.zeros(1, 8, 3, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x[0, :, 1, 1] = 1.0
    x[0, :, 0, 1] = 1.0 - 2**-8
    norm = Norm(torch.zeros(8), torch.ones(8), torch.ones(8), torch.full((8,), 256.0), 0.0)
    _, index = reference.pool(x, norm)
    assert index.unique().tolist() != [4]
    assert torch.equal(triton_pool.pool(x, norm)[1], index)


def nan_twice() -> None:
    x = integers((1, 8, 5, 5), torch.float32)
    x[0, 3, 1, 1] = x[0, 3, 2, 2] = NAN
    check_pool(x)


def gradient(name: str) -> Callable[[], None]:
    return lambda: check_gradient(POOL_SHAPES[name])


MUTANTS = {
    "not_rounded": (".to(y_ptr.dtype.element_ty).to(tl.float32)", "", equal_when_rounded),
    "32_bit_pixels": ("offsets(image, row, column, channel, pool_h",
                      "offsets(image.to(tl.int32), row, column, channel, pool_h", huge.check_training_pool),
    "last_of_equals": ("(value > best)", "(value >= best)", ties),
    "nan_is_no_maximum": (" | (value != value)", "", nan_twice),
    "first_nan": ("(value != value)", "((value != value) & (best == best))", nan_twice),
    "no_relu": ("relu(batch_norm(value, channel, channel_ok, norm, 1)).to(",
                "batch_norm(value, channel, channel_ok, norm, 1).to(", ties),
    "padding_is_pooled": ("better = ok & (", "better = channel_ok[None, :] & (", ties),
    "window_off_by_one": ("row * 2 - 1, column * 2 - 1, channel", "row * 2 - 1, column * 2, channel", ties),
    "index_by_columns": ("tl.where(better, tap, index)", "tl.where(better, tap % 3 * 3 + tap // 3, index)", ties),
    "right_neighbour_forgotten": ("if RIGHT == 1:", "if False:", gradient("odd_size")),
    "neighbour_below_forgotten": ("if DOWN == 1:", "if False:", gradient("odd_size")),
    "neighbour_across_forgotten": ("if DOWN + RIGHT == 2:", "if False:", gradient("odd_size")),
    "rows_and_columns_exchanged": ("4 + 3 * DOWN + RIGHT", "4 + DOWN + 3 * RIGHT", gradient("odd_size")),
    "same_tile_again": ("slab * steps + step", "slab * steps", gradient("several_tiles")),
    "tiles_past_the_last": ("tl.where(tile < tiles, row, pool_height)", "row", gradient("several_tiles")),
    "sums_of_other_slabs": ("slab.to(tl.int64) * (2 * CHANNELS)", "0 * slab.to(tl.int64)", gradient("several_tiles")),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name, tmp_path):
    mutated.check_noticed(Mutant("pool_train.py", *MUTANTS[name]), tmp_path / "mutated_kernels")


def test_an_unmutated_copy_passes(tmp_path):
    notices = ties, nan_twice, equal_when_rounded, gradient("odd_size"), gradient("several_tiles")
    mutated.check_copy_passes(tmp_path / "copied_kernels", *notices)
