"""The direct convolution in float32, where optimized blocks take it for weights that may change, and frozen ones."""

import copy
from dataclasses import replace

import pytest
import torch
from cases import CPU, draw, tuned_table
from models import lively
from numerics import assert_matches
from torch import nn
from torch.nn import functional as F
from torchvision.models.resnet import Bottleneck

from resnet_fast import cpu_network, cpus, freeze, optimize
from resnet_fast.backends import direct, units
from resnet_fast.backends import native as native_backend
from resnet_fast.kernels import selection
from resnet_fast.kernels.configs import DirectConfig, WinogradConfig
from resnet_fast.planner import Section
from resnet_fast.problems import ConvProblem
from resnet_fast.shapes import Conv

pytestmark = pytest.mark.usefixtures("native", "unmeasured_cpu")

CONVS = {  # x, weight, stride, padding, dilation
    "1x1": ((2, 64, 14, 14), (256, 64, 1, 1), (1, 1), (0, 0), (1, 1)),
    "parts_of_the_weight": ((1, 1024, 7, 7), (512, 1024, 1, 1), (1, 1), (0, 0), (1, 1)),
    "uneven_parts_of_the_weight": ((1, 512, 7, 7), (320, 512, 1, 1), (1, 1), (0, 0), (1, 1)),
    "wide_3x3": ((5, 512, 7, 7), (70, 512, 3, 3), (1, 1), (1, 1), (1, 1)),
    "2x2_of_many_channels": ((1, 1600, 3, 3), (64, 1600, 2, 2), (1, 1), (0, 0), (1, 1)),
    "one_pixel_of_many_channels": ((1, 2048, 1, 1), (64, 2048, 1, 1), (1, 1), (0, 0), (1, 1)),
    "long_sums": ((1, 512, 14, 14), (64, 512, 3, 3), (2, 2), (1, 1), (1, 1)),
    "downsample": ((3, 64, 13, 9), (128, 64, 1, 1), (2, 2), (0, 0), (1, 1)),
    "strided_3x3": ((2, 64, 15, 12), (64, 64, 3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3": ((2, 33, 9, 11), (64, 33, 3, 3), (1, 1), (1, 1), (1, 1)),
    "dilated": ((2, 32, 15, 16), (64, 32, 3, 3), (1, 1), (2, 2), (2, 2)),
    "no_square": ((2, 32, 16, 9), (65, 32, 5, 3), (3, 1), (2, 0), (1, 2)),
    "few_of_everything": ((1, 5, 5, 4), (7, 5, 3, 3), (1, 1), (1, 1), (1, 1)),
    "an_image": ((2, 3, 37, 45), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1)),
    "a_gray_image": ((1, 1, 20, 17), (80, 1, 5, 5), (1, 1), (2, 2), (1, 1)),
    "no_square_image": ((2, 4, 19, 26), (65, 4, 5, 3), (3, 1), (1, 2), (1, 1)),
    "steps_over_an_image": ((2, 3, 15, 14), (64, 3, 2, 2), (4, 5), (0, 1), (1, 1)),
    "a_dilated_image": ((1, 3, 15, 16), (64, 3, 3, 3), (1, 1), (2, 2), (2, 2)),
    "more_padding_than_a_gray_image": ((2, 1, 1, 2), (64, 1, 3, 2), (1, 3), (4, 5), (1, 1)),
    "one_pixel": ((1, 64, 3, 3), (64, 64, 3, 3), (1, 1), (0, 0), (1, 1)),
    "more_padding_than_image": ((2, 16, 2, 1), (80, 16, 7, 7), (1, 1), (3, 3), (1, 1)),
    "most_taps": ((1, 32, 9, 9), (64, 32, 8, 8), (1, 1), (4, 4), (1, 1)),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def op(x, weight, scale=None, bias=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), relu=False):
    geometry = (list(stride), list(padding), list(dilation))
    return torch.ops.resnet_fast_native.direct_conv(x, weight, scale, bias, residual, *geometry, relu)


def packed_op(x, weight, bias=None, residual=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), relu=False):
    geometry = (stride, padding, dilation)
    return direct.conv_packed(x, direct.pack(weight), bias, len(weight), residual, geometry, relu)


def operands(name: str, layout: str = "channels_last"):
    """x, a weight in this layout, and the convolution's stride, padding and dilation."""
    shape, weight_shape, *geometry = CONVS[name]
    if layout == "strided":
        weight = draw((*weight_shape[:3], 2 * weight_shape[3]), torch.float32)[..., ::2]
    else:
        weight = draw(weight_shape, torch.float32, layout)
    return draw(shape, torch.float32, "channels_last"), weight, tuple(geometry)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
@pytest.mark.parametrize("name", CONVS)
def test_as_near_to_float64_as_pytorch(name, layout):
    x, weight, geometry = operands(name, layout)
    scale, bias = (draw((len(weight),), torch.float32) for _ in range(2))
    residual = draw(F.conv2d(x, weight, None, *geometry).shape, torch.float32, layout if layout in LAYOUTS else "nchw")

    def plain(dtype):
        y = F.conv2d(x.to(dtype), weight.to(dtype), None, *geometry).contiguous(memory_format=torch.channels_last)
        y = y * scale.to(dtype)[:, None, None] + bias.to(dtype)[:, None, None]
        return y, (y + residual.to(dtype)).relu()

    (stock, stock_sum), (exact, exact_sum) = plain(torch.float32), plain(torch.float64)
    y = op(x, weight, scale, bias, None, *geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_matches("y", y, stock, exact)
    assert_matches("sum", op(x, weight, scale, bias, residual, *geometry, True), stock_sum, exact_sum)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("layout", [*LAYOUTS, "strided"])
@pytest.mark.parametrize("name", CONVS)
def test_a_weight_packed_once(name, layout):
    x, weight, geometry = operands(name, layout)
    bias = draw((len(weight),), torch.float32)
    tensors = x, weight, bias
    stock, exact = (
        F.conv2d(*(each.to(dtype) for each in tensors), *geometry).contiguous(memory_format=torch.channels_last)
        for dtype in (torch.float32, torch.float64)
    )
    residual = draw(stock.shape, torch.float32, layout if layout in LAYOUTS else "nchw")
    y = packed_op(x, weight, bias, None, *geometry)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_matches("y", y, stock, exact)
    kept = residual.clone()
    y = packed_op(x, weight, bias, residual, *geometry, True)
    assert_matches("sum", y, (stock + residual).relu(), (exact + residual).relu())
    assert torch.equal(residual, kept)


@pytest.mark.parametrize("name", CONVS)
def test_neither_threads_nor_layouts_change_a_bit(name):
    x, weight, geometry = operands(name)
    first, packed_first = op(x, weight, None, None, None, *geometry), packed_op(x, weight, None, None, *geometry)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(op(x.contiguous(), weight.contiguous(), None, None, None, *geometry), first)
        assert torch.equal(packed_op(x.contiguous(), weight.contiguous(), None, None, *geometry), packed_first)


def test_an_image_is_the_same_in_any_batch():
    x, weight, geometry = operands("strided_3x3")
    assert torch.equal(op(x, weight, None, None, None, *geometry)[1:], op(x[1:], weight, None, None, None, *geometry))
    x, weight, geometry = operands("wide_3x3")
    whole = packed_op(x, weight, None, None, *geometry)
    assert torch.equal(whole[1:], packed_op(x[1:], weight, None, None, *geometry))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_goes_where_pytorch_lets_it_go(value):
    x, weight, geometry = operands("3x3")
    x[1, 2, 3, 4] = value
    y, expected = op(x, weight, None, None, None, *geometry, True), F.conv2d(x, weight, None, *geometry).relu()
    assert expected.isnan().any() or expected.isinf().any()
    for each in (y, packed_op(x, weight, None, None, *geometry, True)):
        assert torch.equal(each.isnan(), expected.isnan())
        assert torch.equal(each.isinf(), expected.isinf())


def test_no_images():
    x, weight, geometry = operands("3x3")
    assert op(x[:0], weight, None, None, None, *geometry).shape == (0, 64, 9, 11)
    assert packed_op(x[:0], weight, None, None, *geometry).shape == (0, 64, 9, 11)


def test_bad_input_is_an_error_that_says_so():
    x, weight, vector = torch.zeros(2, 32, 4, 4), torch.zeros(64, 32, 3, 3), torch.zeros(64)
    bad = {
        "x must be 4-D and float32": (x[0], weight),
        r"weight must be float32 and \(K, 32, R, S\)": (x, weight[:, :16]),
        "not Double": (x, weight.double()),
        "R \\* S of at most 64, not .* 9, 9": (x, torch.zeros(64, 32, 9, 9)),
        "the kernel is larger than x": (x, torch.zeros(64, 32, 5, 5)),
        r"scale must be float32 and \[64\]": (x, weight, vector[:3]),
        "bias must be float32": (x, weight, None, vector.double()),
        "residual must be float32 and": (x, weight, None, None, torch.zeros(2, 64, 4, 4)),
        "stride and dilation must be pairs of 1 or more": (x, weight, None, None, None, (0, 1)),
        "padding one of 0 or more, not .1, 1., .1, 1. and .-1, 0.": (x, weight, None, None, None, (1, 1), (-1, 0)),
    }
    for message, arguments in bad.items():
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    with pytest.raises(RuntimeError, match=r"direct_pack: weight must be float32 .* not Double"):
        direct.pack(weight.double())
    geometry = ((1, 1), (0, 0), (1, 1))
    for outputs, packed in ((65, direct.pack(weight)), (64, direct.pack(weight[:, :16])), (64, weight)):
        with pytest.raises(RuntimeError, match=rf"what direct_pack made of a weight \({outputs}, 32, R, S\), not"):
            direct.conv_packed(x, packed, None, outputs, None, geometry, False)


def bottleneck(stride: int) -> Bottleneck:
    branch = nn.Sequential(nn.Conv2d(256, 512, 1, stride, bias=False), nn.BatchNorm2d(512))
    return lively(Bottleneck(256, 128, stride, branch)).to(memory_format=torch.channels_last).eval()


@pytest.fixture
def ran(monkeypatch) -> list:
    """The layers of each block in eval mode that the direct convolution computed."""
    if units.has_tiles():
        pytest.skip("AMX computes blocks here")
    block, calls = native_backend.cpu_residual_block, []
    monkeypatch.setattr(native_backend, "cpu_residual_block", lambda *call: calls.append(call[-2]) or block(*call))
    return calls


@pytest.mark.parametrize(("images", "stride", "layers"), [(1, 2, (0, 1, 2, 3)), (1, 1, (0, 2, 3)), (9, 2, ())])
def test_an_optimized_block_in_eval_mode(ran, images, stride, layers):
    """A 3x3 with stride 1 has enough tiles for Winograd; with nine images all layers have more than 1,024 pixels."""
    stock, x = bottleneck(stride), draw((images, 256, 28, 28), torch.float32, "channels_last")
    fast = optimize(copy.deepcopy(stock))
    with torch.no_grad():
        assert_matches("y", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
        fast.conv3.weight.mul_(2)
        stock.conv3.weight.mul_(2)
        assert_matches("changed", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
    assert ran == [layers] * 2


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_last_takes_it_unless_reference_is_asked_for(ran, layout, backend):
    stock = bottleneck(2).to(memory_format=LAYOUTS[layout])
    x = draw((1, 256, 14, 14), torch.float32, layout)
    fast = optimize(copy.deepcopy(stock), backend=backend)
    with torch.no_grad():
        assert_matches("y", fast(x), stock(x), copy.deepcopy(stock).double()(x.double()))
    assert len(ran) == (backend == "native")


def live(conv: Conv) -> ConvProblem:
    return ConvProblem(conv, "float32", relu=False, folded=False)


IMAGE = Conv(16, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3))


def test_what_is_not_measured_follows_a_rule():
    few, many = live(Conv(1, 64, 32, 32, 64)), live(Conv(2, 64, 32, 32, 64))
    assert selection.choose(few, CPU) == selection.Choice(DirectConfig(), "predicted")
    assert "9 cores; unmeasured" in selection.choose(few, replace(CPU, cores=9)).reason
    assert (
        "16384 values; up to 20480 PyTorch convolves without oneDNN"
        in selection.choose(live(Conv(1, 64, 16, 16, 64)), CPU).reason
    )
    assert "2048 pixels; unmeasured, direct is taken up to 1024" in selection.choose(many, CPU).reason
    square = {"kernel": (3, 3), "padding": (1, 1)}
    assert selection.choose(live(Conv(1, 64, 20, 20, 64, **square)), CPU).config == DirectConfig()  # of 25 tiles
    assert selection.choose(live(Conv(1, 64, 32, 32, 64, **square)), CPU).config == WinogradConfig()
    for conv, taken in (
        (few.conv, True),
        (many.conv, True),
        (Conv(1, 64, 16, 16, 64), True),
        (Conv(1, 64, 20, 20, 96), False),
        (IMAGE, True),
        (replace(IMAGE, in_channels=5), False),
        (replace(IMAGE, dilation=(2, 2)), False),
    ):
        packed_once = ConvProblem(conv, "float32")
        assert (selection.choose(packed_once, replace(CPU, isa="AVX2")).config == DirectConfig()) == taken
        assert selection.choose(packed_once, CPU).config is None
    for other in (
        Conv(4, 16, 16, 24, 64),
        Conv(1, 64, 20, 20, 96),
        Conv(1, 64, 20, 20, 64, groups=2),
        Conv(1, 32, 20, 20, 64, (9, 9)),
    ):
        assert selection.choose(live(other), CPU).config is None
    assert selection.choose(live(IMAGE), replace(CPU, isa="AVX2")).config == DirectConfig()  # of any size
    assert "unmeasured, images are oneDNN's but with AVX2" in selection.choose(live(IMAGE), CPU).reason
    for dtype in ("bfloat16", "float64"):
        assert selection.choose(ConvProblem(few.conv, dtype, folded=False), CPU).config is None


@pytest.mark.parametrize("is_direct", [True, False])
def test_a_tuned_table_decides(is_direct, unmeasured_cpu):
    x, weights = torch.empty(2, 64, 32, 32), [torch.empty(64, 64, 1, 1), torch.empty(64, 64, 1, 1)]
    geometry = [1, 1, 0, 0, 1, 1, 1] * 2
    assert direct.layers(x, weights, geometry, False) == ()
    row = {"config": {"kernel": "direct"} if is_direct else None, "us": 1.0, "library_us": 1.0, "variant": "onednn"}
    unmeasured_cpu.write_text(tuned_table({live(Conv(2, 64, 32, 32, 64)).key: row}, cpu=CPU.name))
    selection.forget()
    assert direct.layers(x, weights, geometry, False) == ((0, 1) if is_direct else ())


def test_a_row_older_than_the_kernel_does_not_decide_against_it(unmeasured_cpu):
    few, many = live(Conv(1, 64, 32, 32, 64)), live(Conv(2, 64, 32, 32, 64))
    times = {"PyTorch": 1.0, "winograd": 2.0, "library onednn": 1.0}
    row = {"config": None, "us": 1.0, "library_us": 1.0, "variant": "onednn"}

    def chosen(*problems, **more):
        unmeasured_cpu.write_text(tuned_table({problem.key: row | more for problem in problems}, cpu=CPU.name))
        selection.forget()
        return [selection.choose(problem, CPU).config for problem in problems]

    assert chosen(few, many, times=times) == [DirectConfig(), None]  # by the rule
    assert chosen(few, times=times | {"direct": 2.0}) == [None]
    assert chosen(few, times=times, rejected={"direct": "wrong: y"}) == [None]
    assert chosen(few) == [None]


def test_of_two_batches_as_near_the_larger_decides(unmeasured_cpu):
    """For oneDNN's packing matters less there."""
    rows = {batch: {"config": config, "us": 1.0, "library_us": 1.0, "variant": "onednn"}
            for batch, config in ((4, {"kernel": "direct"}), (16, None))}  # fmt: skip
    keys = {live(Conv(batch, 64, 32, 32, 64)).key: row for batch, row in rows.items()}
    unmeasured_cpu.write_text(tuned_table(keys, cpu=CPU.name))
    selection.forget()
    assert selection.choose(live(Conv(8, 64, 32, 32, 64)), CPU).source == "tuned at n16"
    assert selection.choose(live(Conv(7, 64, 32, 32, 64)), CPU).source == "tuned at n4"


@pytest.mark.parametrize("in_one_call", [True, False])
@pytest.mark.parametrize(("isa", "kernel"), [("AVX2", "direct"), ("AVX512", "oneDNN")])
def test_a_frozen_block(isa, kernel, in_one_call, monkeypatch):
    """As a network computes it and as a module; the second's residual is its input, which nobody may write to."""
    monkeypatch.setattr(cpus, "here", lambda: replace(CPU, isa=isa))
    selection.forget()
    stock = nn.Sequential(bottleneck(2), lively(Bottleneck(512, 128))).to(memory_format=torch.channels_last).eval()
    blocks, value = freeze(copy.deepcopy(stock)), draw((1, 256, 28, 28), torch.float32, "channels_last")
    for number, (block, plain) in enumerate(zip(blocks, stock, strict=True)):
        with torch.no_grad():
            x, kept = value, value.clone()
            expected, exact = plain(x), copy.deepcopy(plain).double()(x.double())
            if in_one_call:
                value = cpu_network.build(Section(None, False, [("block", block)]), x.shape).run(x)
            else:
                value = block(x)
        assert torch.equal(x, kept)
        assert_matches(f"y{number}", value, expected, exact)
        *_, last = block.convs
        assert last.kernel == block.convs[0].kernel == kernel
    assert blocks[0].downsample.kernel == kernel
    assert blocks[1].convs[2].reason == ("predicted" if kernel == "direct" else "")


def test_a_cpu_without_vectors_does_not_take_it(monkeypatch):
    x, weight = torch.empty(1, 64, 20, 20), torch.empty(64, 64, 1, 1)
    arguments = (x, [weight], [1, 1, 0, 0, 1, 1, 1], False)
    assert direct.layers(*arguments) == (0,)
    assert direct.layers(x.double(), *arguments[1:]) == ()
    monkeypatch.setattr(units, "why_no_vectors", lambda: "no vectors for the test")
    selection.forget()
    assert direct.layers(*arguments) == ()
