"""Every kernel that can be started compiles well for sm_80, sm_90 and sm_100; no GPU takes part.

`flaws` says what well means: no spills, tensor cores in the form that is fast and right, no shared memory beyond what
`configs.shared_memory` promises, TMA where the kernel is made of it, and a maximum that keeps NaN.
"""

import re

import pytest
import requires_triton  # noqa: F401
import torch
import triton
import triton.language as tl
from ptx import Report, compiled, instructions, report, start
from shipped import GPUS, PROBLEMS, Job, jobs, problem_of, reference_problems, representatives, training_problems
from triton import knobs
from triton.runtime.driver import driver

from resnet_fast.backends import triton_launch
from resnet_fast.kernels.config_types import BoxConfig
from resnet_fast.kernels.configs import (
    GramDgradConfig,
    PointerConfig,
    PrologueConfig,
    StemConfig,
    TailConfig,
    TmaConfig,
    shared_memory,
)
from resnet_fast.problems import ConvProblem, GramDgradProblem, PrologueProblem, StemProblem, TailProblem
from resnet_fast.shapes import Conv

if knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is set: kernels are interpreted here, not compiled", allow_module_level=True)

THREE = {"kernel": (3, 3), "padding": (1, 1)}
PLAIN = ConvProblem(Conv(32, 256, 14, 14, 256, **THREE), "bfloat16")
RESIDUAL = ConvProblem(Conv(32, 256, 28, 28, 256), "bfloat16", residual=True, folded=False)
TAIL = TailProblem(Conv(32, 64, 56, 56, 64, **THREE), Conv(32, 64, 56, 56, 256), "bfloat16")
STEM = StemProblem(Conv(32, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)), "bfloat16")
PROLOGUE = PrologueProblem(Conv(32, 64, 56, 56, 256), "bfloat16", statistics=True)
GRAM = GramDgradProblem(Conv(32, 64, 56, 56, 256), "bfloat16", prologue=True)
SPECIMENS = (  # one of each kernel
    Job("sm_80", PLAIN, PointerConfig(64, 64, 64, 4, 3)),
    Job("sm_90", PLAIN, PointerConfig(64, 64, 64, 4, 3)),
    Job("sm_90", PLAIN, TmaConfig((2, 8, 8), 64, 64, 4, 3)),
    Job("sm_90", TAIL, TailConfig((1, 8, 8), 64, 64, 8, 2)),
    Job("sm_90", STEM, StemConfig((1, 8, 16), 64, 32, 4, 3)),
    Job("sm_80", STEM, PointerConfig(128, 64, 32, 4, 1)),
    Job("sm_90", STEM, PointerConfig(128, 64, 32, 4, 1)),
    Job("sm_90", STEM, PointerConfig(256, 64, 32, 8, 1)),
    Job("sm_80", PROLOGUE, PrologueConfig(64, 64, 64, 1, 4, 2)),
    Job("sm_90", PROLOGUE, PrologueConfig(128, 64, 64, 1, 4, 2)),
    Job("sm_100", PROLOGUE, PrologueConfig(128, 64, 64, 1, 4, 2)),
    Job("sm_80", GRAM, GramDgradConfig(64, 64, 64, 4, 3)),
    Job("sm_90", GRAM, GramDgradConfig(128, 64, 64, 4, 3)),
    Job("sm_100", GRAM, GramDgradConfig(128, 64, 64, 4, 3)),
    Job("sm_100", PLAIN, PointerConfig(64, 64, 64, 4, 3)),
    Job("sm_100", PLAIN, TmaConfig((2, 8, 8), 64, 64, 4, 3)),
    Job("sm_100", TAIL, TailConfig((1, 8, 8), 64, 64, 8, 2)),
    Job("sm_100", STEM, StemConfig((1, 8, 16), 64, 32, 4, 3)),
)
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}


@triton.jit
def bad_product(x_ptr, y_ptr, steps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """relu(2 a @ b) with everything wrong: a goes through registers on its way to wgmma, and the maximum drops NaN."""
    row = tl.arange(0, SIZE)
    acc = tl.zeros((SIZE, SIZE), tl.float32)
    for step in range(steps):
        at = row[:, None] * 4096 + step * BLOCK + tl.arange(0, BLOCK)[None, :]
        a = (tl.load(x_ptr + at).to(tl.float32) * 2.0).to(x_ptr.dtype.element_ty)
        acc = tl.dot(a, tl.load(x_ptr + at).T, acc)
    tl.store(y_ptr + row[:, None] * SIZE + row[None, :], tl.maximum(acc, 0.0))


def flaws(job: Job, found: Report) -> list[str]:
    """What is wrong with what `job` compiled to; nothing if it is as it should be."""
    promised = shared_memory(job.config, job.problem)
    uses_tma = isinstance(job.config, BoxConfig)
    relu = getattr(job.problem, "relu", getattr(job.problem, "prologue", True))
    checks = (
        (found.spilled, f"{found.spilled} bytes are spilled"),
        (found.shared > promised, f"{found.shared} bytes of shared memory where {promised} are promised"),
        (found.shared > job.gpu.shared_memory, f"{found.shared} bytes of shared memory do not fit {job.gpu.name}"),
        ("C7515" in found.warnings, "ptxas serialises wgmma (C7515)"),
        (found.wgmma_from_registers, "wgmma takes its first operand from registers"),
        (job.arch == "sm_90" and not found.wgmma, "no wgmma"),
        (job.arch != "sm_90" and not found.mma, "no tensor core instruction"),
        (uses_tma and not (found.tma_loads and found.tma_stores), "TMA is not used"),
        (relu and not found.max_keeping_nan, "no ReLU"),
        (found.max_dropping_nan, "a maximum drops NaN"),
    )
    return [text for flaw, text in checks if flaw]


def flaws_of(job: Job) -> list[str]:
    return flaws(job, report(compiled(job.capability, start(job.problem, job.config))))


@pytest.mark.parametrize("job", representatives(jobs()), ids=str)
def test_what_can_be_started(job):
    assert flaws_of(job) == []


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("plane", [1, 3136], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("channels", [64, 100])
def test_bn_act(channels, plane, arch):
    layout = torch.channels_last if plane == 1 else torch.contiguous_format
    x = torch.empty(32, channels, 56, 56, dtype=torch.bfloat16, device="meta", memory_format=layout)
    norm = triton_launch.Norm(None, *(torch.empty(channels, device="meta") for _ in range(4)), eps=1e-5)
    found = report(compiled(int(arch[3:]), lambda: triton_launch.bn_act(x, x, norm, x, True)))
    assert (found.spilled, found.shared, found.max_dropping_nan) == (0, 0, 0)
    assert found.max_keeping_nan


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "nchw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_stem_pack(dtype, layout, arch):
    """A pixel's channels are stored at once: 8 bytes, or 16."""
    x = torch.empty(STEM.conv.x_shape, device="meta").contiguous(memory_format=layout)
    packed = torch.empty(STEM.packed_shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    kernel = compiled(int(arch[3:]), lambda: triton_launch.stem_pack(x, packed, STEM))
    found = report(kernel)
    assert (found.spilled, found.shared) == (0, 0)
    assert set(re.findall(r"st\.global(\S*)", kernel.asm["ptx"])) == {".v2.b32" if dtype.itemsize == 2 else ".v4.b32"}


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_max_pool(dtype, arch):
    """Nothing but 16 bytes is loaded and stored."""
    x = torch.empty(STEM.conv.y_shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    y = torch.empty(STEM.y_shape, dtype=dtype, device="meta", memory_format=torch.channels_last)
    kernel = compiled(int(arch[3:]), lambda: triton_launch.max_pool(x, y))
    found = report(kernel)
    assert (found.spilled, found.shared, found.max_dropping_nan) == (0, 0, 0)
    assert found.max_keeping_nan
    assert set(re.findall(r"(?:ld|st)\.global(\S*)", kernel.asm["ptx"])) == {".v4.b32"}


@pytest.mark.parametrize("job", SPECIMENS, ids=str)
def test_machine_instructions(job):
    """The PTX asks for them; this is what the GPU is given."""
    kernel = compiled(job.capability, start(job.problem, job.config))
    assert flaws(job, report(kernel)) == []
    given = instructions(kernel)
    assert TENSOR_CORES[job.arch] in given
    tma = {"UTMALDG", "UTMASTG"}
    assert given & tma == (tma if isinstance(job.config, BoxConfig) else set())
    assert not given & {"LDL", "STL"}


ONE_PIXEL = ConvProblem(Conv(1, 64, 1, 1, 64, **THREE), "bfloat16", shortcut=Conv(1, 64, 1, 1, 64))
ONE_ROW = StemProblem(Conv(1, 3, 1, 2, 64, (7, 7), (2, 2), (3, 3)), "bfloat16")
ONE_PIXEL_TAIL = TailProblem(Conv(1, 64, 1, 1, 64, **THREE), Conv(1, 64, 1, 1, 256), "bfloat16")


@pytest.mark.parametrize("job", [
    Job("sm_80", ONE_PIXEL, PointerConfig(64, 64, 64, 4, 3)),
    Job("sm_90", ONE_ROW, StemConfig((1, 8, 8), 64, 32, 4, 2)),
    Job("sm_90", ONE_PIXEL, PointerConfig(64, 64, 64, 4, 3)),
    Job("sm_90", ONE_PIXEL, TmaConfig((1, 8, 8), 64, 64, 4, 3)),
    Job("sm_90", ONE_PIXEL_TAIL, TailConfig((1, 8, 8), 64, 64, 8, 2)),
], ids=str)  # fmt: skip
def test_sizes_of_one(job):
    """Triton makes constants of arguments that are 1, and a constant has no `to`."""
    assert flaws_of(job) == []


def test_every_tuned_row_can_be_named():
    for problem in (*reference_problems(), *training_problems(), *PROBLEMS):
        assert problem_of(problem.key) == problem


def test_all_kernels_take_part():
    found = {(job.arch, type(job.config)) for job in representatives(jobs())}
    portable, tma = {PointerConfig, PrologueConfig, GramDgradConfig}, {TmaConfig, TailConfig, StemConfig}
    assert {kind for arch, kind in found if arch == "sm_80"} == portable
    assert {kind for arch, kind in found if arch == "sm_90"} == portable | tma
    assert {kind for arch, kind in found if arch == "sm_100"} == portable | tma


def test_compiling_leaves_nothing_behind():
    before = driver._active, triton_launch.launch
    compiled(80, start(PLAIN, PointerConfig(64, 64, 64, 4, 3)))
    assert before == (driver._active, triton_launch.launch)


@pytest.mark.parametrize(("config", "flaw"), [
    pytest.param(PointerConfig(128, 128, 64, 4, 3), "bytes are spilled", id="too_many_accumulators"),
    pytest.param(PointerConfig(128, 128, 64, 8, 8), "do not fit NVIDIA H200", id="too_much_shared_memory"),
])  # fmt: skip
def test_a_bad_configuration_is_noticed(config, flaw):
    assert any(flaw in found for found in flaws_of(Job("sm_90", RESIDUAL, config)))


def test_a_broken_promise_is_noticed(monkeypatch):
    monkeypatch.setitem(globals(), "shared_memory", lambda config, problem: 4096)
    assert any("are promised" in found for found in flaws_of(SPECIMENS[0]))


def test_bad_code_is_noticed():
    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")
    config = PointerConfig(64, 64, 64, 4, 3)
    constants = {"SIZE": 64, "BLOCK": 64}
    kernel = compiled(90, lambda: triton_launch.launch(bad_product, x, 1, (x, x, 37), constants, config))
    assert flaws(Job("sm_90", PLAIN, config), report(kernel)) == [
        "ptxas serialises wgmma (C7515)",
        "wgmma takes its first operand from registers",
        "no wgmma",
        "no ReLU",
        "a maximum drops NaN",
    ]
    assert "TMA is not used" in flaws(Job("sm_90", PLAIN, TmaConfig((1, 8, 8), 64, 64, 4, 3)), report(kernel))
