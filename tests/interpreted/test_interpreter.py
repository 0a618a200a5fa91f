"""The tools the other files trust: bfloat16 in the interpreter, guard pages, forked children."""

import numpy as np
import pytest
import requires_triton  # noqa: F401
import torch
import triton
import triton.language as tl
from interpreted import bf16
from interpreted.drive import kernel, tensors_of
from interpreted.forked import PASSED, outcome
from interpreted.guarded import SIDES, Fence, reserve
from interpreted.kernel_cases import POINTER_CASES
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from resnet_fast.kernels.conv_pointer import conv_bn_act_pointer


@triton.jit
def arithmetic(a_ptr, b_ptr, sum_ptr, max_ptr, dot_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(sum_ptr + at, (a.to(tl.float32) + b).to(tl.bfloat16))
    tl.store(max_ptr + at, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(dot_ptr + at, tl.dot(a, b))


@triton.jit
def copy(x_ptr, y_ptr, first, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def square(x_ptr, y_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    tl.store(y_ptr + tl.arange(0, SIZE), x * x)


def test_kernels_are_interpreted():
    assert isinstance(conv_bn_act_pointer, InterpretedFunction)


def test_rounding_to_bfloat16_is_pytorchs():
    """Every upper half of a float32, beside ties and their neighbours below."""
    lower = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = (np.arange(2**16, dtype=np.uint32)[:, None] << 16) | lower
    values = bits.view(np.float32)
    rounded = torch.from_numpy(bf16.narrow(values).view(np.int16)).view(torch.bfloat16)
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(), expected.nan_to_num())
    assert np.array_equal(bf16.widen(bf16.narrow(values)), expected.float().numpy(), equal_nan=True)


def test_an_integer_that_overflows_is_an_error():
    x = torch.tensor([3, -46340], dtype=torch.int32)
    y = torch.empty_like(x)
    square[(1,)](x, y, SIZE=2)
    assert torch.equal(y, x * x)
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        square[(1,)](x - 1, y, SIZE=2)


def test_bfloat16_arithmetic():
    a, b = torch.randn(2, 16, 16).to(torch.bfloat16)
    a[0, 0] = float("nan")
    total, largest, dot = torch.empty_like(a), torch.empty_like(a), torch.empty(16, 16)
    arithmetic[(1,)](a, b, total, largest, dot, SIZE=16)
    for ours, expected in ((total, a + b), (largest, torch.maximum(a, b)), (dot, a.float() @ b.float())):
        assert torch.equal(ours.isnan(), expected.isnan())
        torch.testing.assert_close(ours, expected, equal_nan=True)


@pytest.mark.parametrize("write", [False, True], ids=["read", "write"])
@pytest.mark.parametrize(("side", "first"), [("end", 1), ("start", -1)])
def test_one_element_past_a_tensor_is_fatal(side, first, write):
    fence, inside = Fence(side), torch.zeros(18)
    fenced, inside = fence.put(torch.ones(16, dtype=torch.float16)), inside.half()[1:]
    x, y = (inside, fenced) if write else (fenced, inside)
    copy[(1,)](x, y, 0, SIZE=16)
    assert outcome(lambda: copy[(1,)](x, y, first, SIZE=16)) == "SIGSEGV"


@pytest.mark.parametrize("side", SIDES)
def test_what_is_written_beside_a_tensor_or_over_an_input_is_seen(side):
    fence = Fence(side)
    y = fence.blank((1, 1, 1, 8), torch.bfloat16)
    assert y.isnan().all()
    y.zero_()
    fence.check()
    x = fence.put(torch.ones(8))
    x[3] = 2.0
    with pytest.raises(AssertionError, match="an input was written"):
        fence.check()
    away = -1 if side == "end" else 1
    fence = Fence(side)
    copy[(1,)](torch.ones(8)[1:], fence.blank((1, 1, 1, 4), torch.float32), away, SIZE=4)
    with pytest.raises(AssertionError, match="beside a tensor"):
        fence.check()


def test_reserved_memory_is_there_at_the_end_only():
    tensor = reserve((2**15, 64, 32, 32), torch.bfloat16, images=2)
    assert tensor.numel() == 2**31
    tensor[-1] = 1.0
    assert tensor[-2:].sum().item() == 64 * 32 * 32
    assert outcome(lambda: tensor[0, 0, 0, 0].item()) == "SIGSEGV"


def test_a_child_says_what_went_wrong():
    assert outcome(lambda: None) == PASSED
    assert outcome(lambda: 1 / 0) == "ZeroDivisionError: division by zero"


def test_an_output_that_is_not_written_is_nan(monkeypatch):
    monkeypatch.setattr("resnet_fast.backends.triton_launch.launch", lambda *call: None)
    case = POINTER_CASES[0]
    assert kernel(case, tensors_of(case, torch.float32), Fence("end"))["y"].isnan().all()
