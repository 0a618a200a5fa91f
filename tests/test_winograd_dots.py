"""bfloat16 3x3s of programs by Winograd in dot products: beside PyTorch, and which convolutions take it."""

import copy
import json

import pytest
import torch
from cases import CPU, tuned_table
from models import lively, network_of
from numerics import assert_all_match
from test_residual_block import step
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from resnet_fast import cli, freeze, optimize, twin
from resnet_fast.amx.network import AmxNetwork
from resnet_fast.backends import native as native_backend
from resnet_fast.backends import units
from resnet_fast.backends import winograd as backend
from resnet_fast.cli import layer_timings
from resnet_fast.kernels import selection, winograd
from resnet_fast.kernels.config_types import WinogradConfig
from resnet_fast.problems import ConvProblem, WeightGradientProblem
from resnet_fast.shapes import Conv

HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def dots(native, monkeypatch):
    """This CPU multiplies by dot products, which are as fast as can be expected."""
    if not units.has_dots():
        pytest.skip("this CPU has no bfloat16 in AVX-512")
    monkeypatch.setattr(units, "has_tiles", lambda: False)
    monkeypatch.setattr(twin, "bfloat16_is_slow", lambda: False)


@pytest.fixture
def wherever_it_can(monkeypatch):
    """Winograd takes whatever it can compute, and no table is asked."""
    monkeypatch.setattr(backend, "_chosen", lambda problem: winograd.why_not(problem) is None)
    selection.forget()
    yield
    monkeypatch.undo()
    selection.forget()


BLOCKS = {  # name -> (a block, the size of its input)
    "even": (lambda: BasicBlock(32, 32), (32, 12, 8)),
    "odd": (lambda: BasicBlock(64, 64), (64, 9, 11)),
    "large": (lambda: BasicBlock(32, 32), (32, 30, 41)),
    "seven": (lambda: BasicBlock(96, 96), (96, 7, 7)),
    "fourteen": (lambda: Bottleneck(256, 64, 1), (256, 14, 14)),
    "no_residual": (lambda: Bottleneck(256, 64, 1), (256, 18, 16)),
    "one_row": (lambda: BasicBlock(32, 32), (32, 1, 9)),
    "one_column": (lambda: BasicBlock(32, 32), (32, 6, 1)),
    "stride_before": (lambda: strided(64, 96), (64, 17, 20)),
}


def strided(channels: int, out_channels: int) -> nn.Module:
    branch = nn.Sequential(nn.Conv2d(channels, out_channels, 1, 2, bias=False), nn.BatchNorm2d(out_channels))
    return BasicBlock(channels, out_channels, 2, branch)


def block_of(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(11)
    make, size = BLOCKS[name]
    return lively(make()).eval(), size


def frozen_network(block: nn.Module) -> AmxNetwork:
    return network_of(freeze(nn.Sequential(block).eval(), dtype=HALF))


def by_pytorch(block: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    y = copy.deepcopy(block).to(dtype)(x.to(dtype))
    return {"y": y.contiguous(memory_format=torch.channels_last)}


def rows_of(images: int, size: tuple[int, int, int]) -> torch.Tensor:
    return torch.randn(images, *size).to(HALF).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [1, 3, 16, 19])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_frozen_blocks(name, batch, wherever_it_can, poison):
    block, size = block_of(name)
    x, network = rows_of(batch, size), frozen_network(block)
    ours = {"y": network(x)}
    assert_all_match(ours, by_pytorch(block, x, HALF), by_pytorch(block, x, torch.float64))
    convs = [step.winograd for step in network.timings(x[:1]) if ".conv" in step.name]
    assert sum(convs) == {"stride_before": 1}.get(name, 1 if isinstance(block, Bottleneck) else 2)


@pytest.mark.parametrize("weights", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("batch", [1, 5, 16, 19])
@pytest.mark.parametrize("name", BLOCKS)
@torch.no_grad()
def test_live_blocks(name, batch, weights, wherever_it_can, poison, monkeypatch):
    """As under autocast, whose weights and norms are float32, and all in bfloat16; in either layout of weights."""
    block, size = block_of(name)
    if batch % 2:
        block = block.to(memory_format=torch.channels_last)
    x, taken = rows_of(batch, size), []
    op = native_backend.cpu_residual_block

    def recorded(*call):
        taken.append((call[-3], call[-1]))
        return op(*call)

    monkeypatch.setattr(native_backend, "cpu_residual_block", recorded)
    fast = optimize(nn.Sequential(copy.deepcopy(block)).to(weights).eval(), backend="native")
    with torch.autocast("cpu", HALF, enabled=weights == torch.float32):
        ours = {"y": fast(x)}
        stock = {"y": copy.deepcopy(block).to(weights)(x).contiguous(memory_format=torch.channels_last).to(HALF)}
    assert_all_match({"y": ours["y"].to(HALF)}, stock, by_pytorch(block, x, torch.float64))
    assert taken == [({"stride_before": (1,)}.get(name, (1,) if isinstance(block, Bottleneck) else (0, 1)), "dots")]


@torch.no_grad()
def test_no_value_depends_on_threads_or_other_images(wherever_it_can, two_threads):
    for name in ("odd", "large", "fourteen", "seven"):
        block, size = block_of(name)
        x, network = rows_of(19, size), frozen_network(block)
        y = network(x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(network(x), y), (name, threads)
            assert torch.equal(network(x[3:4]), y[3:4]), (name, threads)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["odd", "large", "fourteen"])
@torch.no_grad()
def test_what_is_not_finite_is_computed_without(name, value, wherever_it_can, monkeypatch):
    """That image of a frozen block alone; of a live one all of them, by PyTorch's convolutions."""
    block, size = block_of(name)
    network, x = frozen_network(block), rows_of(19, size)
    clean = network(x)
    x[17, 5, size[1] - 1, size[2] - 2] = value
    y = network(x)
    others = torch.arange(19) != 17
    assert torch.equal(y[others], clean[others])
    monkeypatch.setattr(backend, "takes_folded", lambda conv: False)
    assert torch.equal(y[17:18], frozen_network(block)(x[17:18]).nan_to_num(7.0)) or y[17].isnan().any()
    torch.testing.assert_close(y[17:18], frozen_network(block)(x[17:18]), equal_nan=True, rtol=0, atol=0)

    fast = optimize(nn.Sequential(copy.deepcopy(block)).to(HALF).eval(), backend="native")
    with monkeypatch.context() as without:
        without.setattr(units, "unit", lambda dtype: "")
        expected = fast(x)
    torch.testing.assert_close(fast(x), expected, equal_nan=True, rtol=0, atol=0)


CONVS = [(1, 64, 32, 56, 40), (3, 32, 96, 9, 7), (17, 64, 64, 7, 7), (16, 128, 64, 14, 14), (2, 32, 32, 1, 1)]


def gradient_of(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of a 3x3's input."""
    return F.conv2d(dy, weight.flip(2, 3).transpose(0, 1), padding=1)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(("images", "channels", "outputs", "height", "width"), CONVS)
def test_one_convolution(images, channels, outputs, height, width, weights, layout, turned, poison, two_threads):
    """And the gradient of its input, added to another; whatever the threads."""
    torch.manual_seed(images + channels)
    weight = (torch.randn(outputs, channels, 3, 3) * (9 * channels) ** -0.5).to(weights).to(memory_format=layout)
    x = rows_of(images, (outputs if turned else channels, height, width))
    add = rows_of(images, (channels, height, width)) if turned else None
    op = torch.ops.resnet_fast_native.winograd_dots_conv
    y, finite = op(x, weight, add, turned)
    assert finite
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(op(x, weight, add, turned)[0], y)
    function = gradient_of if turned else lambda x, weight: F.conv2d(x, weight, padding=1)
    exact = function(x.double(), weight.double()) + (0 if add is None else add.double())
    exact = exact.contiguous(memory_format=torch.channels_last)
    assert_all_match({"y": y}, {"y": exact.to(HALF)}, {"y": exact})


def test_what_one_convolution_refuses():
    op, x = torch.ops.resnet_fast_native.winograd_dots_conv, rows_of(2, (32, 6, 6))
    weight = torch.randn(64, 32, 3, 3)
    for wrong in (x.float(), x.contiguous(), x[:0]):
        with pytest.raises(RuntimeError, match="x must be bfloat16 in channels_last"):
            op(wrong, weight, None, False)
    with pytest.raises(RuntimeError, match="of a 3x3 of x's channels"):
        op(x, weight, None, True)
    with pytest.raises(RuntimeError, match="multiples of 32 channels"):
        op(x, weight[:40].contiguous(), None, False)
    with pytest.raises(RuntimeError, match="add must be"):
        op(x, weight, x, False)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize(("images", "channels", "outputs", "height", "width"), [*CONVS, (16, 96, 32, 30, 31)])
def test_the_gradient_of_a_weight(images, channels, outputs, height, width, layout, poison, two_threads):
    """In the weight's layout, whatever the threads, over one slab of tiles and several."""
    torch.manual_seed(images + channels)
    weight = torch.randn(outputs, channels, 3, 3).to(HALF).to(memory_format=layout)
    x, dy = rows_of(images, (channels, height, width)), rows_of(images, (outputs, height, width))
    op = torch.ops.resnet_fast_native.winograd_dots_weight_gradient
    dweight, finite = op(dy, x, weight)
    assert finite
    assert dweight.stride() == weight.stride()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(op(dy, x, weight)[0], dweight)
    exact = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), padding=1)
    exact = exact.to(memory_format=layout)
    assert_all_match({"dweight": dweight}, {"dweight": exact.to(HALF)}, {"dweight": exact})
    dy[images - 1, outputs - 1, height - 1, 0] = float("inf")
    assert not op(dy, x, weight)[1]


def test_what_the_gradient_of_a_weight_refuses():
    op, x, dy = (
        torch.ops.resnet_fast_native.winograd_dots_weight_gradient,
        rows_of(2, (32, 6, 6)),
        rows_of(2, (64, 6, 6)),
    )
    weight = torch.randn(64, 32, 3, 3).to(HALF)
    for wrong in (
        (dy.float(), x, weight),
        (dy, x.contiguous(), weight),
        (dy, x, weight.float()),
        (dy[:0], x[:0], weight),
    ):
        with pytest.raises(RuntimeError, match="all must be bfloat16, dy and x in channels_last"):
            op(*wrong)
    for wrong in ((dy, x[:1], weight), (x, dy, weight), (dy, x, weight[:, :, :1])):
        with pytest.raises(RuntimeError, match="are not of one 3x3"):
            op(*wrong)
    with pytest.raises(RuntimeError, match="multiples of 32 channels"):
        op(rows_of(2, (40, 6, 6)), x, torch.randn(40, 32, 3, 3).to(HALF))


def off_the_kink(block: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dy, zero where rounding decides whether the last ReLU passes it."""
    exact = copy.deepcopy(block).double().train()
    exact.relu = nn.ReLU(inplace=False)
    before = []
    exact.relu.register_forward_pre_hook(lambda _, inputs: before.append(inputs[0].detach()))
    exact(x.double())
    return dy.masked_fill(before[-1].abs() < 32 * torch.finfo(HALF).eps, 0.0)


@pytest.mark.parametrize("dtype", [HALF, None], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["odd", "seven", "fourteen", "stride_before"])
def test_training_steps(name, dtype, wherever_it_can, poison, monkeypatch):
    """Inside, ReLUs pass whole channels or none: of few values, one that rounding puts on the other side of zero would
    be most of the error, ours and PyTorch's."""
    block, size = block_of(name)
    block = block.train().to(memory_format=torch.channels_last)
    for norm in (block.bn1, *([block.bn2] if isinstance(block, Bottleneck) else [])):
        nn.init.constant_(norm.bias[::2], 6.0)
        nn.init.constant_(norm.bias[1::2], -6.0)
        nn.init.constant_(norm.weight, 1.0)
    x, calls = rows_of(8, size), []
    dy = off_the_kink(block, x, torch.randn_like(copy.deepcopy(block)(x.float())))
    for function in ("conv", "data_gradient", "weight_gradient"):
        before = getattr(backend, function)
        monkeypatch.setattr(backend, function, lambda *a, f=function, op=before: [calls.append(f), op(*a)][1])
    stock = copy.deepcopy(block) if dtype else copy.deepcopy(block).to(HALF)
    fast = optimize(nn.Sequential(copy.deepcopy(stock)), backend="native")[0]
    ours = step(fast, x, dy, dtype)
    taken = {"stride_before": 1, "fourteen": 1}.get(name, 2)
    assert calls == ["conv"] * taken + ["data_gradient", "weight_gradient"] * taken
    exact = step(copy.deepcopy(block).double(), x.double(), dy.double())
    assert_all_match(ours, step(stock, x, dy, dtype), exact, compute_dtype=HALF)


def test_a_training_step_that_is_not_finite_is_the_librarys(wherever_it_can, monkeypatch):
    """Forward and backward, bit for bit."""
    block, size = block_of("odd")
    fast = optimize(nn.Sequential(block.train().to(memory_format=torch.channels_last)), backend="native")[0]
    x, dy = rows_of(4, size), rows_of(4, size)
    x[1, 2, 3, 4] = float("inf")
    ours = step(copy.deepcopy(fast), x, dy, HALF)
    monkeypatch.setattr(backend, "computes", lambda dtype: False)
    for name, expected in step(fast, x, dy, HALF).items():
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=0, equal_nan=True, msg=name)


def test_what_it_takes_unmeasured(unmeasured_cpu):
    """Where a convolution has 1.4 times as many products; live also for enough tiles to make up for the weights."""

    def chosen(size: int, batch: int = 16, channels: int = 64, folded: bool = True) -> WinogradConfig | None:
        conv = Conv(batch, channels, size, size, channels, (3, 3), padding=(1, 1))
        problem = ConvProblem(conv, "bfloat16", relu=folded, folded=folded)
        return selection.choose(problem, CPU).config

    assert [chosen(size) is not None for size in (56, 14, 7, 4, 3)] == [True, True, True, True, False]
    assert chosen(14, batch=1) is not None
    assert [chosen(14, batch, folded=False) is not None for batch in (1, 16)] == [False, True]
    assert chosen(56, channels=48) is None
    gradient = WeightGradientProblem(Conv(1, 32, 40, 40, 32, (3, 3), padding=(1, 1)), "bfloat16")
    assert selection.choose(gradient, CPU).config == WinogradConfig()
    strided = ConvProblem(Conv(16, 64, 56, 56, 64, (3, 3), (2, 2), (1, 1)), "bfloat16")
    assert "stride" in selection.choose(strided, CPU).reason


@pytest.mark.parametrize("is_winograd", [True, False])
@torch.no_grad()
def test_a_tuned_table_decides(is_winograd, unmeasured_cpu):
    block, size = block_of("large")
    conv = Conv(4, *size, 32, (3, 3), padding=(1, 1))
    row = {"config": {"kernel": "winograd"} if is_winograd else None, "us": 1.0, "library_us": 1.0, "variant": "dots"}
    unmeasured_cpu.write_text(tuned_table({ConvProblem(conv, "bfloat16").key: row}))
    selection.forget()
    steps = [step for step in frozen_network(block).timings(rows_of(4, size)) if ".conv" in step.name]
    assert [step.winograd for step in steps] == [is_winograd] * 2


def test_tune_measures_both_ways(unmeasured_cpu):
    """Frozen, live and the weight's gradient, each right before it is timed."""
    table = unmeasured_cpu.parent / "written.json"
    keys, conv = "* n2 64x16x16 k64 f3 p1 bfloat16*", "n2 64x16x16 k64 f3 p1 bfloat16"
    asked = ["--device", "cpu", "--model", "resnet18", "-b", "2", "--img-size", "64", "--dtype", "bfloat16"]
    assert cli.main(["tune", *asked, "--only", keys, "--output", str(table)]) == 0
    rows = json.loads(table.read_text())["rows"]
    libraries = {f"conv {conv}": "dots", f"conv {conv} no-relu bn": "dots", f"weight_gradient {conv}": "onednn"}
    assert rows.keys() == libraries.keys()
    for key, library in libraries.items():
        assert set(rows[key]["times"]) == {"PyTorch", f"library {library}", "winograd"}
        assert not rows[key]["rejected"]


@torch.no_grad()
def test_the_profile_counts_its_products(wherever_it_can):
    torch.manual_seed(2)
    frozen = freeze(lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7)).eval(), dtype=HALF)
    timings = {each.name: each for each in layer_timings.layer_timings(frozen, torch.randn(2, 3, 64, 64), repeats=2)}
    step = timings["layer1.0.conv1"]
    assert step.kernel == winograd.NAME_OF_DOTS
    assert step.flops == 2 * 16 * 64 * 64 * 2 * 8 * 8
    assert timings["layer2.0.conv1"].kernel == units.unit_name()
