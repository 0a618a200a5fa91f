"""Every kernel and epilogue against a float64 reference, beside PyTorch in the same dtype, fenced by guard pages."""

import pytest
import torch
from cases import BN_CASES, LAYOUTS, bn_tensors, draw, named
from interpreted.drive import check, check_bn_act, check_max_pool, check_pack
from interpreted.guarded import SIDES, Fence
from interpreted.kernel_cases import DTYPES, POINTER_CASES, POOL_SHAPES, STEM_CASES, TAIL_CASES, TMA_CASES

from resnet_fast.backends import triton_launch
from resnet_fast.problems import StemProblem
from resnet_fast.shapes import Conv


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(POINTER_CASES))
def test_conv_pointer(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(TMA_CASES))
def test_conv_tma(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(STEM_CASES))
def test_stem(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named(STEM_CASES))
def test_stem_pack(case, layout):
    """Of any layout and dtype."""
    half, single = (draw(case.conv.x_shape, dtype, layout) for dtype in (torch.float16, torch.float32))
    check_pack(half, case.problem(torch.float16), torch.float16)
    check_pack(single, case.problem(torch.float16), torch.float16)
    check_pack(half, case.problem(torch.float32), torch.float32)


def test_stem_pack_of_views():
    x = draw((2, 6, 14, 12), torch.float32)
    problem = StemProblem(Conv(2, 3, 14, 6, 16, (7, 7), (2, 2), (3, 3)), "float32")
    packed = torch.empty(problem.packed_shape).contiguous(memory_format=torch.channels_last)
    triton_launch.stem_pack(x[:, ::2, :, ::2], packed, problem)
    assert torch.equal(packed[:, :3, 3:17, 3:9], x[:, ::2, :, ::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", POOL_SHAPES)
def test_max_pool(name, dtype):
    check_max_pool(draw(POOL_SHAPES[name], dtype, "channels_last"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", **named(TAIL_CASES))
def test_tail(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", **named([case for case in BN_CASES if not case.unaligned]))
def test_bn_act(case, layout, dtype):
    x, vectors = draw(case.shape, dtype, layout), bn_tensors(case.shape[1], torch.float32, case.affine)
    check_bn_act(x, vectors, draw(case.shape, dtype, layout) if case.residual else None, case.relu)


@pytest.mark.parametrize("side", SIDES)
def test_bn_act_in_place_with_a_bias_alone(side):
    """What follows a folded convolution of the library's."""
    x, residual = (draw((2, 65, 5, 3), torch.float32, "channels_last") for _ in range(2))
    bias, fence = draw((65,), torch.float32), Fence(side)
    y = fence.blank(x.shape, x.dtype).copy_(x)
    triton_launch.bn_act(y, y, triton_launch.Norm(conv_bias=fence.put(bias)), fence.put(residual), True)
    fence.check()
    assert torch.equal(y, (x + bias.view(1, -1, 1, 1) + residual).relu())
