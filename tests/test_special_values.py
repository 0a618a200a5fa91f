"""Numbers that break careless statistics, and values that are not numbers."""

import pytest
import stock
import torch
from cases import LAYOUTS, bn_tensors, draw
from numerics import assert_all_match
from torch.nn import functional as F

from resnet_fast import functional


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e5])
def test_variance_survives_a_large_mean(ratio, layout, backend):
    """mean/std up to 1e5: the naive E[x^2] - E[x]^2 has no digit left in float32."""
    x = draw((4, 7, 16, 15), torch.float64, layout)
    x = (x + ratio * torch.tensor([1, -1, 0.5, 1, -0.25, 0, 1], dtype=torch.float64).view(1, -1, 1, 1)).float()
    _, mean, var = torch.ops.resnet_fast.bn_act_train(x, None, None, None, 1e-5, False, backend)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    assert (var >= 0).all()
    torch.testing.assert_close(mean.double(), exact_mean, rtol=2e-6, atol=1e-4)
    torch.testing.assert_close(var.double(), exact_var, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_constant_channels_have_no_variance(dtype, layout, backend):
    x = torch.full((3, 5, 9, 7), 1234.5).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    y, mean, var = torch.ops.resnet_fast.bn_act_train(x, None, torch.ones(5), None, 1e-5, True, backend)
    assert (var >= 0).all()
    assert (var <= 1e-6).all()
    torch.testing.assert_close(mean, x[0, :, 0, 0].to(mean.dtype))
    torch.testing.assert_close(y, torch.ones_like(y), rtol=0.0, atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_inputs_in_eval(value, residual, dtype, layout, backend):
    """relu(NaN) is NaN, and its gradient passes: as PyTorch, element by element."""
    tensors = {"x": draw((2, 33, 4, 3), dtype, layout)}
    tensors["x"][0, 1, 2, 1] = tensors["x"][1, 4, 0, 0] = value
    parameters = bn_tensors(33, torch.float64 if dtype == torch.float64 else torch.float32)
    parameters["weight"].abs_().add_(0.1)
    tensors |= parameters
    if residual:
        tensors["residual"] = draw((2, 33, 4, 3), dtype, layout)
        tensors["residual"][1, 0, 0, 0] = value
    tensors["dy"] = draw((2, 33, 4, 3), dtype, layout)
    finite = {name: tensor.nan_to_num(0.0, 0.0, 0.0) for name, tensor in tensors.items()}
    tensors["dy"] = stock.off_the_kink(stock.bn_act, finite)["dy"]
    ours = stock.run(functional.bn_act, tensors, backend=backend)
    theirs = stock.run(stock.bn_act, tensors)
    exact = stock.run(stock.bn_act, stock.double(tensors))
    names = [name for name in theirs if name not in ("dweight", "dbias")]
    assert_all_match(*({name: results[name] for name in names} for results in (ours, theirs, exact)), dtype)
    assert torch.equal(ours["y"].isnan(), theirs["y"].isnan())
    assert torch.equal(ours["dx"] != 0, theirs["dx"] != 0), "the gradient must pass where PyTorch's does"
    assert torch.equal(ours["dbias"].isnan(), theirs["dbias"].isnan())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_channel_in_training_spoils_itself_only(value, backend):
    x = draw((2, 5, 4, 3), torch.float32, "channels_last")
    x[0, 3, 1, 1] = value
    running, theirs = (bn_tensors(5, torch.float32, affine=False) for _ in range(2))
    y = functional.bn_act(x, **running, training=True, backend=backend)
    expected = F.batch_norm(x, **theirs, training=True).relu()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isnan().any(0).any(1).any(1), torch.arange(5) == 3)
    assert torch.equal(running["running_mean"].isfinite(), theirs["running_mean"].isfinite())


def test_nan_gradient_passes_relu(backend):
    """A mask of `y > 0` would stop it; PyTorch's `!(y <= 0)` does not."""
    x = torch.tensor([float("nan"), -1.0, 1.0, 0.0]).view(1, 1, 2, 2).requires_grad_()
    zero, one = torch.zeros(1), torch.ones(1)
    y = functional.bn_act(x, zero, one, eps=0.0, backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    (expected,) = torch.autograd.grad(F.relu(x), x, torch.ones_like(y))
    assert torch.equal(dx, expected)
    assert dx.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]


def test_half_precision_overflow_is_pytorchs(backend):
    x = torch.full((1, 2, 2, 2), 6e4, dtype=torch.float16)
    y = functional.bn_act(x, torch.zeros(2), torch.ones(2), torch.full((2,), 4.0), backend=backend)
    assert torch.equal(y, stock.bn_act(x, torch.zeros(2), torch.ones(2), torch.full((2,), 4.0)))
    assert y.isinf().all()


@pytest.mark.parametrize("var", [0.0, 1e-30, 1e30])
def test_extreme_running_variance(var, backend):
    x = draw((2, 3, 4, 4), torch.float32)
    mean, var = torch.zeros(3), torch.full((3,), var)
    torch.testing.assert_close(
        functional.bn_act(x, mean, var, backend=backend), F.batch_norm(x, mean, var).relu(), rtol=2e-6, atol=1e-30
    )
