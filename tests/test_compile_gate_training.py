"""The passes and products of training compile well for sm_80, sm_90 and sm_100; convolutions: test_compile_gate.py."""

from collections.abc import Callable

import pytest
import requires_triton  # noqa: F401
import torch
from ptx import Report, compiled_all, report
from triton import knobs

from resnet_fast.backends import triton_batch_norm, triton_launch, triton_pool
from resnet_fast.backends.primitives import Geometry, Norm

if knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted here, not compiled", allow_module_level=True)

ARCHES = (80, 90, 100)


def image(channels: int, size: int, dtype=torch.bfloat16) -> torch.Tensor:
    empty = torch.empty(32, channels, size, size, dtype=dtype, device="meta")
    return empty.contiguous(memory_format=torch.channels_last)


def vectors(channels: int, count: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty(channels, device="meta") for _ in range(count))


def norm(channels: int) -> Norm:
    return Norm(*vectors(channels, 4), 1e-5)


def flaws(found: Report) -> list[str]:
    checks = (
        (found.spilled, f"{found.spilled} bytes are spilled"),
        (found.max_dropping_nan, "a maximum drops NaN"),
        (found.wgmma_from_registers, "wgmma takes its first operand from registers"),
        ("C7515" in found.warnings, "ptxas serialises wgmma (C7515)"),
    )
    return [text for flaw, text in checks if flaw]


def pooled(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dy and index of a stem's max-pool of x."""
    dy = triton_launch.pooled_like(x)
    return dy, torch.empty_like(dy, dtype=torch.uint8)


def pooled_reduce(x: torch.Tensor, n: Norm):
    dy, index = pooled(x)
    return triton_pool.backward_reduce(dy, x, n, True, index)


def pooled_apply(x: torch.Tensor, n: Norm):
    dy, index = pooled(x)
    return triton_pool.backward_apply(dy, x, n, True, *vectors(x.shape[1], 2), index)


PASSES: dict[str, Callable[[torch.Tensor, Norm], object]] = {
    "batch_statistics": lambda x, n: triton_batch_norm.batch_statistics(x),
    "apply": lambda x, n: triton_batch_norm.apply(x, n),
    "apply_join": lambda x, n: triton_batch_norm.apply(x, n, x, n),
    "backward_reduce": lambda x, n: triton_batch_norm.backward_reduce(x, x, n, True),
    "backward_apply": lambda x, n: triton_batch_norm.backward_apply(x, x, n, True, *vectors(x.shape[1], 2)),
    "backward_apply_fixed": lambda x, n: triton_batch_norm.backward_apply(x, None, n, False, None, None),
    "pool": triton_pool.pool,
    "backward_reduce_pooled": pooled_reduce,
    "backward_apply_pooled": pooled_apply,
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("channels", [64, 100, 2048])
@pytest.mark.parametrize("name", PASSES)
def test_passes(name, channels, arch):
    kernels = compiled_all(arch, lambda: PASSES[name](image(channels, 14), norm(channels)))
    assert len(kernels) == (2 if name == "batch_statistics" else 1)
    for kernel in kernels:
        assert flaws(report(kernel)) == []


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pending", [False, True], ids=["plain", "pending"])
@pytest.mark.parametrize(("channels", "rows", "stride"), [(64, 256, 1), (512, 2048, 1), (256, 512, 2)])
def test_products(channels, rows, stride, pending, dtype, arch):
    x, dz = image(channels, 14, dtype), image(rows, 14 // stride, dtype)
    geometry, waiting = Geometry([stride, stride], [0, 0], [1, 1], 1), norm(channels) if pending else None
    (mean,) = vectors(channels, 1)
    product, covariance = compiled_all(
        arch,
        lambda: (
            triton_batch_norm.outer(dz, x, waiting, geometry, mean),
            triton_batch_norm._outer(None, x, waiting, geometry, mean),
        ),
    )
    for kernel in (product, covariance):
        found = report(kernel)
        assert flaws(found) == []
        assert found.wgmma or found.mma, "no tensor core instruction"
    if arch == 90:
        assert report(product).wgmma
