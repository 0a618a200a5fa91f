"""The planner: traffic and work of the plans, data flow, the memory plan, and what is left to the library and why."""

import functools
import json
import math
import time
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from models import lively
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import freeze
from resnet_fast.frozen import FrozenBlock, FrozenConv2d
from resnet_fast.gpus import named
from resnet_fast.kernels import selection, tables
from resnet_fast.kernels.configs import to_dict
from resnet_fast.planner import FUSIONS, Section, build, why_not_plannable
from resnet_fast.problems import ConvProblem, PoolProblem, StemProblem, TailProblem

H200, A100 = named("h200"), named("a100")
V100 = replace(A100, name="Tesla V100", capability=(7, 0))

NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnet50": lambda: torchvision.models.resnet50(),
    "resnext50": lambda: torchvision.models.resnext50_32x4d(),
    "dilated": lambda: ResNet(Bottleneck, [1, 2, 2, 1], replace_stride_with_dilation=[False, True, True]),
}


@pytest.fixture(autouse=True)
def _no_tuned_tables(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("RESNET_FAST_CACHE", str(tmp_path))
    selection.forget()
    yield
    selection.forget()


@functools.cache
def section(name, dtype=torch.bfloat16):
    with torch.device("meta"):
        model = NETWORKS[name]().eval()
    return Section.of_resnet(freeze(model, dtype=dtype))


def plan_of(name, size=224, batch=256, dtype=torch.bfloat16, gpu=H200, fusion="auto"):
    return build(section(name, dtype), (batch, 3, size, size), dtype, gpu, fusion=fusion)


def kinds(plan):
    return [type(step.problem) for step in plan.steps]


def tails(plan):
    return [step for step in plan.steps if isinstance(step.problem, TailProblem)]


@pytest.mark.parametrize(("fusion", "megabytes"), [("conv", 46), ("tail", 32)])
def test_resnet50_moves_no_more_than_the_targets(fusion, megabytes):
    plan = plan_of("resnet50", fusion=fusion)
    assert plan.bytes_per_image / 1e6 <= megabytes
    assert plan.flops / plan.batch == pytest.approx(8.178e9, rel=0.01)


def test_resnet50_by_conv_is_the_roofline_model():
    """KERNELS.md, section 1, scheme I2d: counted independently of this planner."""
    plan = plan_of("resnet50", fusion="conv")
    assert plan.bytes_per_image / 1e6 == pytest.approx(45.67, abs=0.01)
    assert plan.batch / plan.limit_seconds() == pytest.approx(67_336, rel=1e-3)


def test_auto_is_expected_no_slower_than_either():
    auto, *others = (plan_of("resnet50", fusion=fusion) for fusion in FUSIONS)
    assert auto.predicted_seconds() <= min(other.predicted_seconds() for other in others) * (1 + 1e-9)
    assert 0 < len(tails(auto)) <= len(tails(others[1]))


def test_predictions_are_no_faster_than_limits():
    for fusion in FUSIONS:
        for step in plan_of("resnext50", fusion=fusion).steps:
            assert step.predicted_seconds(H200) >= step.limit_seconds(H200), step.name


def test_planning_is_fast():
    fresh = section("resnet50")
    start = time.perf_counter()
    build(fresh, (256, 3, 224, 224), "bfloat16", H200)
    assert time.perf_counter() - start < 2


def test_steps_of_a_bottleneck_net():
    by_conv = {step.name: step for step in plan_of("resnet50", fusion="conv").steps}
    assert isinstance(by_conv["conv1+maxpool"].problem, StemProblem)
    first = by_conv["layer1.0.conv3+downsample"]
    assert first.reads == ("layer1.0.conv2", "maxpool")
    assert first.writes == ("layer1.0",)
    assert [module.weight.shape[1] for module in first.modules] == [64, 64]
    assert by_conv["layer1.1.conv3"].reads == ("layer1.1.conv2", "layer1.0")
    assert by_conv["layer1.1.conv3"].problem.residual
    by_tail = {step.name: step for step in plan_of("resnet50", fusion="tail").steps}
    across = by_tail["layer1.2.conv2+conv3, layer2.0.conv1"]
    assert across.reads == ("layer1.2.conv1", "layer1.1")
    assert across.writes == ("layer1.2", "layer2.0.conv1")
    assert [tuple(module.weight.shape[:2]) for module in across.modules] == [(64, 64), (256, 64), (128, 256)]
    with_shortcut = by_tail["layer1.0.conv2+conv3+downsample, layer1.1.conv1"]
    assert len(with_shortcut.modules) == 4
    assert "layer2.0.conv1" not in by_tail
    # 512 channels do not fit on chip, so the last tail of layer3 goes without the next convolution
    assert by_tail["layer3.5.conv2+conv3"].writes == ("layer3.5",)
    assert "layer4.0.conv1" in by_tail


SETTINGS = {
    "resnet18": ("resnet18", 224, H200, torch.bfloat16),
    "resnet50_sm80": ("resnet50", 224, A100, torch.float16),
    "resnet50_odd": ("resnet50", 97, H200, torch.bfloat16),
    "resnet50_tiny": ("resnet50", 1, H200, torch.bfloat16),
    "resnet50_sm70": ("resnet50", 64, V100, torch.float32),
    "resnet50_float64": ("resnet50", 64, H200, torch.float64),
    "resnext50": ("resnext50", 160, H200, torch.bfloat16),
    "dilated": ("dilated", 193, H200, torch.bfloat16),
}


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_plan_is_consistent(name, fusion):
    network, size, gpu, dtype = SETTINGS[name]
    plan = plan_of(network, size, 3, dtype, gpu, fusion)
    check(plan, section(network, dtype))


def check(plan, planned):
    """Every tensor is written once and before it is read, every module runs once, nothing that lives shares memory."""
    written = {plan.input}
    for step in plan.steps:
        assert set(step.reads) <= written, step.name
        assert not set(step.writes) & (written | set(step.reads)), step.name
        assert not set(step.scratch) & (written | set(step.reads) | set(step.writes)), step.name
        written |= {*step.writes, *step.scratch}
        check_shapes(step, plan.tensors)
    assert written == plan.tensors.keys()
    assert plan.output in plan.steps[-1].writes
    modules = [module for step in plan.steps for module in step.modules]
    assert sorted(map(id, modules)) == sorted(id(module) for _, module in planned.convs())
    check_memory(plan)


def check_shapes(step, tensors):
    problem, x, y = step.problem, tensors[step.reads[0]], tensors[step.writes[0]]
    others = [tensors[name] for name in (*step.reads[1:], *step.writes[1:])]
    if isinstance(problem, PoolProblem):
        assert (x, y, others) == ((problem.batch, problem.channels, problem.height, problem.width), problem.y_shape, [])
        return
    if isinstance(problem, StemProblem):
        convs, expected = [problem.conv], [problem.conv.x_shape, problem.y_shape]
    elif isinstance(problem, ConvProblem):
        convs = [conv for conv in (problem.conv, problem.shortcut) if conv]
        expected = [problem.conv.x_shape, problem.conv.y_shape]
        expected += [problem.conv.y_shape] if problem.residual else []
        expected += [problem.shortcut.x_shape] if problem.shortcut else []
    else:
        convs = problem.convs
        expected = [problem.conv2.x_shape, problem.conv3.y_shape]
        expected.append(problem.shortcut.x_shape if problem.shortcut else problem.conv3.y_shape)
        expected += [problem.next_conv.y_shape] if problem.next_conv else []
    assert [x, y, *others] == expected, step.name
    assert [tuple(module.weight.shape) for module in step.modules] == [conv.weight_shape for conv in convs], step.name
    for conv, module in zip(convs, step.modules, strict=True):
        shortcut = conv is getattr(problem, "shortcut", None)
        if shortcut or (isinstance(problem, TailProblem) and conv is not problem.conv2):
            assert (conv.kernel, conv.padding, conv.groups) == ((1, 1), (0, 0), 1), step.name
            assert shortcut or conv.stride == (1, 1), step.name
        if shortcut or isinstance(problem, TailProblem):
            assert module.relu is not shortcut, step.name


def check_memory(plan):
    offsets, total = plan.offsets()
    assert offsets.keys() == plan.tensors.keys() - {plan.input, plan.output}
    itemsize = getattr(torch, plan.dtype).itemsize
    sizes = {name: math.prod(plan.tensors[name]) * itemsize for name in offsets}
    lives = {}
    for place, step in enumerate(plan.steps):
        for name in (*step.writes, *step.reads, *step.scratch):
            lives.setdefault(name, set()).add(place)
    for name, offset in offsets.items():
        assert offset % 256 == 0
        assert 0 <= offset <= total - sizes[name]
    for one, other in combinations(offsets, 2):
        if min(lives[one]) <= max(lives[other]) and min(lives[other]) <= max(lives[one]):
            apart = offsets[one] + sizes[one] <= offsets[other] or offsets[other] + sizes[other] <= offsets[one]
            assert apart, f"{one} and {other} live at the same time in the same bytes"


def test_the_arena_of_resnet50_is_what_lives_at_once():
    plan = plan_of("resnet50", fusion="conv")
    block = plan.tensors["layer1.0"]  # the largest tensor; conv3 needs two of them and its input, a quarter
    assert plan.offsets()[1] == math.prod(block) * 2 * 9 // 4


class Net:
    """A random small section; `shape` is its input's."""

    def __init__(self, draw):
        self.shape = (draw(st.integers(1, 3)), draw(st.sampled_from([3, 8, 64])), draw(sizes), draw(sizes))
        self.dtype = draw(st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
        channels, stem = self.shape[1], None
        if draw(st.booleans()):
            stem, channels = ("conv1", self.conv(channels, 64, kernel=7, stride=2)), 64
        blocks = []
        for index in range(draw(st.integers(1, 4))):
            width, out = draw(widths), draw(widths)
            stride, groups = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 4]))
            kernels = {1: (3,), 2: (3, 3), 3: (1, 3, 1)}[draw(st.integers(1, 3))]
            ends = [channels, *[width] * (len(kernels) - 1), out]
            strided = len(kernels) // 2
            stages = [
                (self.plain(ends[place], ends[place + 1], kernel, stride if place == strided else 1,
                            groups if kernel == 3 and ends[place] % 4 == 0 else 1), None)
                for place, kernel in enumerate(kernels)
            ]  # fmt: skip
            downsample = None
            if stride > 1 or out != channels or draw(st.booleans()):
                kernel, grouped = draw(st.sampled_from([1, 1, 3])), draw(st.booleans()) and channels % 4 == 0
                relu = draw(st.booleans())
                downsample = self.conv(channels, out, kernel, stride, relu, 4 if grouped else 1)
            blocks.append((f"layer1.{index}", FrozenBlock(stages, downsample, self.dtype)))
            channels = out
        self.section = Section(stem, draw(st.booleans()), blocks)

    def plain(self, channels, out, kernel, stride, groups=1):
        return nn.Conv2d(channels, out, kernel, stride, kernel // 2, groups=groups, device="meta")

    def conv(self, channels, out, kernel, stride, relu=True, groups=1):
        return FrozenConv2d(self.plain(channels, out, kernel, stride, groups), None, relu, self.dtype)


sizes, widths = st.integers(1, 40), st.sampled_from([8, 12, 64, 128])


@settings(max_examples=60, deadline=None)
@given(st.composite(Net)(), st.sampled_from([H200, A100, V100]), st.sampled_from(FUSIONS))
def test_random_nets_are_planned_consistently(net, gpu, fusion):
    check(build(net.section, net.shape, net.dtype, gpu, fusion=fusion), net.section)


def execute(plan, x):
    """Run `plan` in float64 with PyTorch, every tensor where the memory plan has it, in an arena full of NaN."""
    offsets, total = plan.offsets()
    itemsize = getattr(torch, plan.dtype).itemsize
    arena = torch.full((total // itemsize,), torch.nan, dtype=torch.float64)
    places = {plan.input: x, plan.output: torch.full(plan.tensors[plan.output], torch.nan, dtype=torch.float64)}
    for name, offset in offsets.items():
        n, c, h, w = plan.tensors[name]
        memory = arena[offset // itemsize :][: n * c * h * w]
        places[name] = memory.view(n, h, w, c).permute(0, 3, 1, 2)
    for step in plan.steps:
        for name in step.scratch:
            places[name].fill_(torch.nan)
        values = compute(step, *(places[name] for name in step.reads))
        for name, value in zip(step.writes, values, strict=True):
            places[name].copy_(value)
    return places[plan.output]


def compute(step, x, other=None):
    problem, modules = step.problem, step.modules
    if isinstance(problem, PoolProblem):
        return [F.max_pool2d(x, 3, 2, 1)]
    if isinstance(problem, StemProblem):
        return [F.max_pool2d(conv(modules[0], x).relu(), 3, 2, 1)]
    if isinstance(problem, ConvProblem):
        y = conv(modules[0], x)
        y = y + conv(modules[1], other) if problem.shortcut else y + other if problem.residual else y
        return [y.relu() if problem.relu else y]
    y = conv(modules[1], conv(modules[0], x).relu())
    y = (y + (conv(modules[2], other) if problem.shortcut else other)).relu()
    return [y, conv(modules[-1], y).relu()] if problem.next_conv else [y]


def conv(module, x):
    weight, bias = module.weight.double(), module.bias.double()
    return F.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("gpu", [H200, V100], ids=lambda gpu: gpu.slug)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_a_plan_computes_the_frozen_model(block, gpu, fusion):
    torch.manual_seed(1)
    frozen = freeze(lively(ResNet(block, [2, 1, 1, 1])).eval(), dtype=torch.bfloat16)
    plan = build(Section.of_resnet(frozen), (2, 3, 48, 64), torch.bfloat16, gpu, fusion=fusion)
    if block is Bottleneck and gpu is H200 and fusion == "tail":
        assert len(tails(plan)) > 1
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    with torch.no_grad():
        actual = execute(plan, x)
        exact = frozen.double()
        expected = exact.layer4(exact.layer3(exact.layer2(exact.layer1(exact.maxpool(exact.conv1(x))))))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_tails_only_where_their_kernel_is():
    assert tails(plan_of("resnet50", fusion="tail"))
    assert not tails(plan_of("resnet50", fusion="conv"))
    assert not tails(plan_of("resnet50", gpu=A100, fusion="tail"))  # needs descriptors
    assert not tails(plan_of("resnet50", dtype=torch.float32, fusion="tail"))
    assert not tails(plan_of("resnext50", fusion="tail"))  # conv2 is grouped
    assert not tails(plan_of("resnet18", fusion="tail"))
    names = [step.name for step in tails(plan_of("resnet50", size=97, fusion="tail"))]
    assert names  # stride 1, any size
    assert not any(name.startswith("layer2.0.") for name in names)  # 25x25 has no halves


def bottleneck(strides=(1, 1, 1), groups=(1, 1, 1), kernels=(1, 3, 1)):
    """64 channels throughout, on the meta device; a downsample where it has a stride."""
    layers = [
        nn.Conv2d(64, 64, kernel, stride, kernel // 2, groups=group, device="meta")
        for kernel, stride, group in zip(kernels, strides, groups, strict=True)
    ]
    downsample = None
    if math.prod(strides) > 1:
        conv = nn.Conv2d(64, 64, 1, math.prod(strides), device="meta")
        downsample = FrozenConv2d(conv, None, False, torch.bfloat16)
    return FrozenBlock([(conv, None) for conv in layers], downsample, torch.bfloat16)


SECOND_BLOCKS = {
    "plain": (bottleneck(), "a.conv2+conv3, b.conv1", ["b.conv2+conv3"]),
    "stride_in_conv1": (bottleneck(strides=(2, 1, 1)), "a.conv2+conv3", ["b.conv2+conv3+downsample"]),
    "stride_in_conv3": (bottleneck(strides=(1, 1, 2)), "a.conv2+conv3, b.conv1", []),
    "grouped_conv1": (bottleneck(groups=(4, 1, 1)), "a.conv2+conv3", ["b.conv2+conv3"]),
    "grouped_conv3": (bottleneck(groups=(1, 1, 4)), "a.conv2+conv3, b.conv1", []),
    "one_conv": (bottleneck((1,), (1,), (1,)), "a.conv2+conv3", []),
    "two_convs": (bottleneck((1, 1), (1, 1), (1, 3)), "a.conv2+conv3, b.conv1", []),
}


@pytest.mark.parametrize("name", SECOND_BLOCKS)
def test_what_a_tail_takes_in(name):
    block, first, others = SECOND_BLOCKS[name]
    blocks = Section(None, False, [("a", bottleneck()), ("b", block)])
    plan = build(blocks, (8, 64, 16, 16), "bfloat16", H200, fusion="tail")
    assert [step.name for step in tails(plan)] == [first, *others]
    check(plan, blocks)


def test_a_stem_without_relu_is_not_pooled_inside():
    stem = FrozenConv2d(nn.Conv2d(3, 64, 7, 2, 3, device="meta"), None, False, torch.bfloat16)
    plan = build(Section(("conv1", stem), True, ()), (8, 3, 64, 64), "bfloat16", H200)
    assert kinds(plan) == [ConvProblem, PoolProblem]
    assert not plan.steps[0].problem.relu


def test_a_stem_that_no_kernel_fits_is_a_convolution_and_a_pool():
    plan = plan_of("resnet50", gpu=replace(A100, capability=(7, 5)))
    assert kinds(plan)[:2] == [ConvProblem, PoolProblem]
    assert plan.steps[1].choice.kernel == "library"


def test_dilation_and_groups_reach_the_problems():
    dilated = {step.name: step.problem for step in plan_of("dilated", fusion="conv").steps}
    assert dilated["layer3.1.conv2"].conv.dilation == (2, 2)
    assert dilated["layer4.0.conv2"].conv.dilation == (2, 2)
    grouped = {step.name: step for step in plan_of("resnext50").steps}
    assert grouped["layer1.0.conv2"].problem.conv.groups == 32
    assert grouped["layer1.0.conv2"].choice.config is not None


@pytest.mark.parametrize(
    ("gpu", "dtype", "reason"),
    [(V100, torch.bfloat16, "sm_70; the kernels need sm_80"), (H200, torch.float64, "not float64")],
    ids=["sm70", "float64"],
)
def test_the_library_runs_what_no_kernel_can_and_says_why(gpu, dtype, reason):
    plan = plan_of("resnet50", dtype=dtype, gpu=gpu)
    assert all(step.choice.config is None for step in plan.steps)
    assert all(reason in step.choice.reason for step in plan.steps if step.modules)
    names = [step.name for step in plan.steps]
    assert names[:2] == ["conv1", "maxpool"]
    assert "layer1.0.downsample" in names  # by itself, then added as a residual
    closing = next(step for step in plan.steps if step.name == "layer1.0.conv3")
    assert closing.reads == ("layer1.0.conv2", "layer1.0.downsample")
    assert 0 < plan.limit_seconds() < plan.predicted_seconds() < math.inf


def test_float64_moves_twice_the_bytes_of_float32():
    single, double = (plan_of("resnet18", dtype=dtype, gpu=V100) for dtype in (torch.float32, torch.float64))
    assert double.bytes == 2 * single.bytes
    assert double.offsets()[1] == 2 * single.offsets()[1]


def table(tmp_path, rows):
    """Rows {problem: (config or None, microseconds)} as the H200's tuned table."""
    path = tmp_path / "tuned" / f"{H200.slug}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = {
        problem.key: {"config": None if config is None else to_dict(config), "us": us, "library_us": us}
        for problem, (config, us) in rows.items()
    }
    path.write_text(json.dumps({"schema": tables.SCHEMA, "gpu": H200.name, "environment": {}, "rows": plain}))
    selection.forget()


def test_tuned_times_decide_what_is_a_tail(tmp_path):
    before = plan_of("resnet50", fusion="tail")
    first = tails(before)[0]
    for us, is_tail in ((1.0, True), (1e6, False)):
        table(tmp_path, {first.problem: (first.choice.config, us)})
        after = plan_of("resnet50")
        assert (first.name in [step.name for step in after.steps]) is is_tail
    table(tmp_path, {first.problem: (first.choice.config, 1.0)})
    tuned = next(step for step in plan_of("resnet50").steps if step.name == first.name)
    assert tuned.tuned
    assert tuned.predicted_seconds(H200) == pytest.approx(2e-6)  # not less than a launch
    half = next(step for step in plan_of("resnet50", batch=128).steps if step.name == first.name)
    assert half.choice.source == "tuned at n256"


def test_a_shortcut_measured_faster_by_the_library_is_joined_or_apart_by_time(tmp_path):
    joint = next(step for step in plan_of("resnet50", fusion="conv").steps if "downsample" in step.name)
    for us, names in ((1.0, ["layer1.0.conv3+downsample"]), (1e6, ["layer1.0.downsample", "layer1.0.conv3"])):
        table(tmp_path, {joint.problem: (None, us)})
        steps = [step.name for step in plan_of("resnet50", fusion="conv").steps]
        assert [name for name in steps if name in (joint.name, "layer1.0.downsample", "layer1.0.conv3")] == names


def test_a_part_of_a_network_can_be_planned():
    whole = section("resnet50")
    part = Section(None, False, whole.blocks[:2])
    plan = build(part, (4, 64, 30, 31), torch.bfloat16, H200, fusion="tail")
    check(plan, part)
    assert plan.head == ()
    assert plan.tensors[plan.output] == (4, 256, 30, 31)
    stem = Section(whole.stem, True, ())
    assert build(stem, (4, 3, 30, 30), "bfloat16", H200).tensors["maxpool"] == (4, 64, 8, 8)


BAD_ARGUMENTS = {
    "fusion": ({"fusion": "block"}, "fusion='block' is not one of auto, conv, tail"),
    "dtype": ({"dtype": torch.int8}, "dtype='int8' cannot be planned; it must be one of float32, bfloat16"),
    "other_dtype": ({"dtype": "float16"}, "conv1 has weights of torch.bfloat16"),
    "shape": ({"input_shape": (3, 224, 224)}, r"\(N, C, H, W\)"),
    "empty": ({"input_shape": (0, 3, 224, 224)}, "four positive sizes"),
    "channels": ({"input_shape": (1, 4, 224, 224)}, "conv1 takes 3 channels; its input input has 4"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name):
    change, message = BAD_ARGUMENTS[name]
    arguments = {"input_shape": (2, 3, 64, 64), "dtype": "bfloat16", "fusion": "auto"} | change
    with pytest.raises(ValueError, match=message):
        build(section("resnet18"), arguments["input_shape"], arguments["dtype"], H200, fusion=arguments["fusion"])


def fresh(block=BasicBlock):
    with torch.device("meta"):
        return freeze(ResNet(block, [1, 1, 1, 1]).eval(), dtype=torch.bfloat16)


def set_downsample(model):
    model.layer2[0].downsample = nn.Identity()


def hook_conv(model):
    model.layer1[0].convs[0].register_forward_hook(lambda *call: None)


def hook_block(model):
    model.layer1[0].register_forward_pre_hook(lambda *call: None)


def stock_block(model):
    model.layer1[0] = BasicBlock(64, 64)


def other_forward(model):
    model.layer1[0].convs[1].forward = lambda x: x


def other_dtype(model):
    model.layer3[0].convs[0].float()


def no_relu(model):
    model.layer3[0].convs[0].relu = False


NOT_PLANNABLE = {
    set_downsample: "layer2.0.downsample is Identity, not FrozenConv2d",
    hook_conv: "layer1.0.conv1 has hooks, which a fused step would skip",
    hook_block: "layer1.0 has hooks, which a fused step would skip",
    stock_block: "layer1.0 is BasicBlock, not FrozenBlock",
    other_forward: "layer1.0.conv2 has a forward of its own",
    other_dtype: "weights differ in dtype",
    no_relu: "layer3.0 has a convolution without ReLU",
}


@pytest.mark.parametrize("change", NOT_PLANNABLE, ids=lambda change: change.__name__)
def test_what_a_step_cannot_express_is_not_planned(change):
    model = fresh()
    assert why_not_plannable(Section.of_resnet(model)) is None
    change(model)
    changed = Section.of_resnet(model)
    assert NOT_PLANNABLE[change] in why_not_plannable(changed)
    with pytest.raises(ValueError, match=NOT_PLANNABLE[change]):
        build(changed, (1, 3, 64, 64), "bfloat16", H200)


def test_a_resnet_that_freeze_left_partly_stock_is_no_section():
    model = fresh()
    model.maxpool.kernel_size = 2
    with pytest.raises(ValueError, match="not 3x3 with stride 2"):
        Section.of_resnet(model)
    model = fresh()
    model.layer1.register_forward_hook(lambda *call: None)
    with pytest.raises(ValueError, match="layer1 has hooks"):
        Section.of_resnet(model)
    model = fresh()
    model.relu = nn.ReLU()
    with pytest.raises(ValueError, match="relu is ReLU, not Identity"):
        Section.of_resnet(model)


def test_nothing_to_plan():
    assert why_not_plannable(Section(None, True, ())) == "there is no stem and no block"


def test_blocks_that_do_not_add_up_are_named():
    block = FrozenBlock([(nn.Conv2d(8, 8, 3, device="meta"), None)], None, torch.bfloat16)
    with pytest.raises(ValueError, match=r"layer1.0 adds \(1, 8, 9, 9\) \(input\) to \(1, 8, 7, 7\)"):
        build(Section(None, False, [("layer1.0", block)]), (1, 8, 9, 9), "bfloat16", H200)
    with pytest.raises(ValueError, match="does not fit into its input's 2x2 pixels"):
        build(Section(None, False, [("layer1.0", block)]), (1, 8, 2, 2), "bfloat16", H200)
