"""The last program of a launch whose tensors have more than 2**31 elements: is its arithmetic 64-bit?

The tensors are address space; only their last two images are memory, so an offset that wrapped lands where nothing is.
"""

import contextlib
import math
from dataclasses import replace

import numpy as np
import requires_triton  # noqa: F401
import torch
import torch.nn.functional as F
import triton.language as tl
from cases import bn_tensors, draw
from interpreted.drive import double, pytorch, tensors_of
from interpreted.guarded import reserve
from interpreted.kernel_cases import ConvCase, three_by_three
from numerics import assert_match, compare
from stock import bn_act
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from resnet_fast.backends import triton_launch, triton_pool
from resnet_fast.backends.primitives import Norm as PendingNorm
from resnet_fast.backends.primitives import reference
from resnet_fast.kernels.configs import PointerConfig
from resnet_fast.problems import ConvProblem, StemProblem
from resnet_fast.shapes import Conv

DTYPE = torch.bfloat16
IMAGES = 2
"""How many images are there."""

_POINTER = PointerConfig(64, 64, 64, 4, 2)
CONVS = (
    ConvCase("three_by_three_residual", three_by_three(IMAGES, 64, 56, 56, 64), _POINTER, residual=True),
    ConvCase("shortcut", Conv(IMAGES, 64, 28, 28, 64), _POINTER, shortcut=Conv(IMAGES, 64, 56, 56, 64, stride=(2, 2))),
)
STEM = Conv(IMAGES, 4, 224, 224, 64, (8, 8), (2, 2))  # packed without zeros, so that the last pixel is a pixel


def check_conv(case: ConvCase) -> None:
    """conv_pointer, every tensor past 2**31 elements."""
    batch = _batch(case.conv.y_shape)
    problem = replace(case, conv=replace(case.conv, batch=batch))
    if case.shortcut:
        problem = replace(problem, shortcut=replace(case.shortcut, batch=batch))
    problem, tensors = problem.problem(DTYPE), tensors_of(case, DTYPE)
    y = reserve(problem.conv.y_shape, DTYPE, IMAGES)
    branch = {}
    if case.shortcut:
        packed = triton_launch.pack_conv(tensors["shortcut_conv_weight"], ConvProblem(case.shortcut, problem.dtype))
        norm = triton_launch.Norm(conv_bias=tensors["shortcut_conv_bias"])
        branch = {"shortcut": _huge(tensors["shortcut"], batch), "shortcut_weight": packed, "shortcut_norm": norm}
    residual = _huge(tensors["residual"], batch) if case.residual else None
    weight, norm = triton_launch.pack_conv(tensors["conv_weight"], problem), triton_launch.Norm(tensors["conv_bias"])
    with _last_program_only():
        triton_launch.conv(_huge(tensors["x"], batch), weight, y, problem, case.config, norm, residual, **branch)
    _compare(y, pytorch(case, tensors)["y"], pytorch(case, double(tensors))["y"])


def check_pack() -> None:
    batch = _batch(STEM.x_shape)
    problem = StemProblem(replace(STEM, batch=batch), "bfloat16")
    x, packed = draw(STEM.x_shape, DTYPE, "channels_last"), reserve(problem.packed_shape, DTYPE, IMAGES)
    with _last_program_only():
        triton_launch.stem_pack(_huge(x, batch), packed, problem)
    _compare(packed, x, x.double())


def check_max_pool() -> None:
    x = draw((IMAGES, 64, 56, 56), DTYPE, "channels_last")
    pooled = F.max_pool2d(x, 3, 2, 1)
    batch = _batch(pooled.shape)
    y = reserve((batch, *pooled.shape[1:]), DTYPE, IMAGES)
    with _last_program_only():
        triton_launch.max_pool(_huge(x, batch), y)
    _compare(y, pooled, pooled.double())


def check_training_pool() -> None:
    x, norm = draw((IMAGES, 64, 56, 56), DTYPE, "channels_last"), _plain_norm(64)
    expected, places = reference.pool(x, norm)
    batch = _batch(expected.shape)
    whole = (batch, *expected.shape[1:])
    y, index = reserve(whole, DTYPE, IMAGES), reserve(whole, torch.uint8, IMAGES)
    with _last_program_only(), _outputs(y, index):
        triton_pool.pool(_huge(x, batch), norm)
    _compare(y, expected, expected.double())
    written = y[-IMAGES:] != 0
    assert torch.equal(index[-IMAGES:][written], places[written])


def check_training_pool_gradient() -> None:
    """Its writing pass, which reads what the other reads."""
    x, norm = draw((IMAGES, 64, 56, 56), DTYPE, "channels_last"), _plain_norm(64)
    y, index = reference.pool(x, norm)
    dy, batch = draw(y.shape, DTYPE, "channels_last"), _batch(y.shape)
    dx = reserve((batch, *x.shape[1:]), DTYPE, IMAGES)
    with _last_program_only(), _outputs(dx):
        triton_pool.backward_apply(_huge(dy, batch), _huge(x, batch), norm, True, None, None, _huge(index, batch))
    expected = reference.backward_apply(dy, x, norm, True, None, None, index)
    written = dx[-IMAGES:] != 0
    assert written[-1, :, -4:, -4:].any()
    torch.testing.assert_close(dx[-IMAGES:][written], expected[written], rtol=1e-2, atol=1e-2)


def _plain_norm(channels: int) -> PendingNorm:
    return PendingNorm(torch.zeros(channels), torch.ones(channels), None, None, 0.0)


@contextlib.contextmanager
def _outputs(*tensors: Tensor):
    """Inside, what the pooling passes allocate is these, in their order."""
    left, pooled_like, empty_like = list(tensors), triton_launch.pooled_like, torch.empty_like
    triton_launch.pooled_like = torch.empty_like = lambda *args, **keywords: left.pop(0)
    try:
        yield
    finally:
        triton_launch.pooled_like, torch.empty_like = pooled_like, empty_like


def check_bn_act() -> None:
    shape = (IMAGES, 64, 56, 56)
    x, residual, vectors = (
        draw(shape, DTYPE, "channels_last"),
        draw(shape, DTYPE, "channels_last"),
        bn_tensors(64, DTYPE),
    )
    batch = _batch(shape)
    y = reserve((batch, *shape[1:]), DTYPE, IMAGES)
    norm = triton_launch.Norm(**{name.removeprefix("running_"): vector for name, vector in vectors.items()}, eps=1e-5)
    with _last_program_only():
        triton_launch.bn_act(_huge(x, batch), y, norm, _huge(residual, batch), True)
    exact = bn_act(x.double(), **double(vectors), residual=residual.double())
    _compare(y, bn_act(x, **vectors, residual=residual), exact)


def _batch(shape: tuple[int, ...]) -> int:
    """How many images of `shape`, (N, C, H, W), have 2**31 elements and more."""
    return 2**31 // math.prod(shape[1:]) + 2


def _huge(values: Tensor, batch: int) -> Tensor:
    tensor = reserve((batch, *values.shape[1:]), values.dtype, IMAGES)
    tensor[-IMAGES:] = values
    return tensor


def _compare(y: Tensor, stock: Tensor, exact: Tensor) -> None:
    """What the program wrote, as far as it is not zero in the reference, and that it wrote something."""
    assert y.numel() > 2**31
    written = y[-IMAGES:] != 0
    assert written[-1, :, -1, -1].any(), "the last pixel was not written"
    assert_match(compare("y", y[-IMAGES:][written], stock[written], exact[written]))


@contextlib.contextmanager
def _last_program_only():
    """A launch in which program_id is always the last one's."""
    launch, program_id = triton_launch.launch, InterpreterBuilder.create_get_program_id

    def launch_last(kernel, x, grid, args, constants, config):
        last = TensorHandle(np.array([grid - 1], dtype=np.int32), tl.int32)
        InterpreterBuilder.create_get_program_id = lambda builder, axis: last
        launch(kernel, x, 1, args, constants, config)

    triton_launch.launch = launch_last
    try:
        yield
    finally:
        triton_launch.launch, InterpreterBuilder.create_get_program_id = launch, program_id
