"""The tensor-core convolution, emulated on the host instruction by instruction, against float64: no GPU takes part."""

import ctypes
from dataclasses import dataclass

import cuda_host
import pytest
import torch
import torch.nn.functional as F
from cases import ConvCase, bn_tensors, conv_case, draw, named
from numerics import assert_all_match

pytestmark = pytest.mark.usefixtures("poison")

DTYPES = (torch.bfloat16, torch.float16)
FAULTS = ("none", "out of bounds", "misaligned", "out of shared memory", "written twice")
CASES = (  # tails in pixels (not a multiple of 128), channels (of 128, 64 and 32) and the sum (of 32)
    ConvCase("pointwise_residual", (1, 32, 9, 9), 64, (1, 1), padding=(0, 0), residual=True),
    ConvCase("exact_tiles", (2, 64, 8, 8), 128, (1, 1), padding=(0, 0)),
    ConvCase("tails_everywhere", (1, 40, 5, 7), 72, residual=True),
    ConvCase("eight_channels", (3, 8, 6, 5), 8),
    ConvCase("stride2", (2, 16, 11, 9), 24, stride=(2, 2)),
    ConvCase("stride2_pointwise_no_relu", (2, 24, 9, 8), 136, (1, 1), stride=(2, 2), padding=(0, 0), relu=False),
    ConvCase("dilated", (1, 16, 9, 9), 16, padding=(2, 2), dilation=(2, 2), residual=True),
    ConvCase("no_padding", (1, 16, 7, 6), 16, padding=(0, 0)),
    ConvCase("rows_unlike_columns", (2, 8, 11, 12), 16, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 2)),
    ConvCase("conv_bias_no_affine", (1, 16, 6, 6), 16, affine=False, conv_bias=True),
    ConvCase("padding_beyond_the_image", (1, 8, 2, 2), 8, padding=(3, 3), dilation=(2, 2)),
    ConvCase("one_pixel", (1, 16, 1, 1), 8, (1, 1), padding=(0, 0)),
)


class Tensors(ctypes.Structure):
    """`Tensors` of tests/csrc/conv.cpp."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "weight", "residual", "y")] + [
        ("vectors", ctypes.c_void_p * 5),
        ("x_size", ctypes.c_int64),
        ("weight_size", ctypes.c_int64),
        ("y_size", ctypes.c_int64),
    ]


def sizes(shape, out_shape, kernel, stride, padding, dilation):
    batch, channels, height, width = shape
    _, out_channels, out_height, out_width = out_shape
    values = (
        batch,
        height,
        width,
        channels,
        out_height,
        out_width,
        out_channels,
        *kernel,
        *stride,
        *padding,
        *dilation,
    )
    return (ctypes.c_int64 * len(values))(*values)


def geometry(case: ConvCase):
    return sizes(case.shape, case.out_shape, case.kernel, case.stride, case.padding, case.dilation)


def emulated(case: ConvCase, tensors: dict[str, torch.Tensor], wide: bool, eps: float = 1e-3) -> torch.Tensor:
    dense = {
        name: tensor.contiguous(memory_format=torch.channels_last)
        for name, tensor in tensors.items()
        if name in ("x", "conv_weight", "residual")
    }
    x, weight, residual = dense["x"], dense["conv_weight"], dense.get("residual")
    y = torch.empty(case.out_shape, dtype=x.dtype, memory_format=torch.channels_last)
    names = ("conv_bias", "running_mean", "running_var", "weight", "bias")
    vectors = [tensors[name].float().contiguous() if name in tensors else None for name in names]
    pointers = (ctypes.c_void_p * 5)(*(None if v is None else v.data_ptr() for v in vectors))
    places = (x.data_ptr(), weight.data_ptr(), None if residual is None else residual.data_ptr(), y.data_ptr())
    given = Tensors(*places, pointers, x.numel(), weight.numel(), y.numel())
    half, wide, relu = (ctypes.c_bool(flag) for flag in (x.dtype == torch.float16, wide, case.relu))
    fault = cuda_host.library("conv").convolve(
        geometry(case), ctypes.byref(given), half, wide, ctypes.c_double(eps), relu
    )
    assert fault == 0, FAULTS[fault]
    return y


def stock(case: ConvCase, tensors: dict[str, torch.Tensor], eps: float = 1e-3) -> torch.Tensor:
    """PyTorch's, in the tensors' dtype."""
    x, conv_bias = tensors["x"], tensors.get("conv_bias")
    y = F.conv2d(x, tensors["conv_weight"], None if conv_bias is None else conv_bias.to(x.dtype), **case.geometry)
    norm = [tensors.get(name) for name in ("running_mean", "running_var", "weight", "bias")]
    y = F.batch_norm(y, *norm, False, 0.0, eps)
    y = y + tensors["residual"] if case.residual else y
    return y.relu() if case.relu else y


@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", **named(CASES))
def test_emulation_is_as_near_to_float64_as_pytorch(case, dtype, wide):
    tensors = conv_case(case, dtype, "channels_last")
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    ours = emulated(case, tensors, wide)
    assert_all_match({"y": ours}, {"y": stock(case, tensors)}, {"y": stock(case, exact)})


def test_a_folded_norm_is_none():
    """What freeze leaves: a bias, and nothing else."""
    case = ConvCase("frozen", (1, 16, 6, 6), 24, residual=True)
    tensors = {name: t for name, t in conv_case(case, torch.float16, "channels_last").items() if name[:3] != "run"}
    tensors = {name: tensors[name] for name in ("x", "conv_weight", "residual")}
    tensors["conv_bias"] = draw((24,), torch.float16)

    def expected(x, conv_weight, residual, conv_bias):
        return (F.conv2d(x, conv_weight, conv_bias, padding=1) + residual).relu()

    exact = expected(**{name: tensor.double() for name, tensor in tensors.items()})
    assert_all_match({"y": emulated(case, tensors, True)}, {"y": expected(**tensors)}, {"y": exact})


def test_nan_stays_where_it_is():
    case = ConvCase("nan", (1, 16, 6, 6), 24)
    tensors = conv_case(case, torch.bfloat16, "channels_last")
    tensors["x"][0, 3, 2, 2] = float("nan")
    assert torch.equal(emulated(case, tensors, True).isnan(), stock(case, tensors).isnan())


@dataclass(frozen=True)
class Extreme:
    """Sizes that nobody has memory for, and what their last places must be."""

    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: int = 1
    stride: int = 1


EXTREMES = (
    Extreme("more_than_int32_elements", (32769, 64, 32, 32), 64, 3),
    Extreme("large_image", (1, 8, 65536, 65536), 8),
    Extreme("stride2_many_images", (2**20, 256, 56, 56), 512, 1, 2),
    Extreme("more_than_int32_weights", (1, 65536, 4, 4), 65536, 3),
)


@pytest.mark.parametrize("case", **named(EXTREMES))
def test_offsets_of_the_last_element_are_int64(case):
    batch, channels, height, width = case.shape
    padding = case.kernel // 2
    out_height, out_width = ((size + 2 * padding - case.kernel) // case.stride + 1 for size in (height, width))
    out_shape = (batch, case.out_channels, out_height, out_width)
    pairs = ((value, value) for value in (case.kernel, case.stride, padding, 1))
    out = (ctypes.c_int64 * 10)()
    cuda_host.library("conv").places(sizes(case.shape, out_shape, *pairs), out)
    wide, narrow, steps, _, first, top, left, x_last, weight_last, y_last = out
    pixels = batch * out_height * out_width
    assert wide == -(-pixels // 128) * -(-case.out_channels // 128)
    assert narrow == -(-pixels // 128) * -(-case.out_channels // 64)
    assert steps == -(-(case.kernel**2) * channels // 32)
    image = (batch - 1) * height * width * channels
    assert first == image + (top * width + left) * channels
    assert (top, left) == ((out_height - 1) * case.stride - padding, (out_width - 1) * case.stride - padding)
    bottom, right = top + case.kernel - 1, left + case.kernel - 1
    inside = bottom < height and right < width
    assert x_last == (image + (bottom * width + right) * channels + channels - 8 if inside else -1)
    assert weight_last == case.out_channels * case.kernel**2 * channels - 8
    assert y_last == pixels * case.out_channels - 8


def test_an_empty_batch_has_no_blocks():
    out = (ctypes.c_int64 * 10)()
    cuda_host.library("conv").places(sizes((0, 8, 4, 4), (0, 8, 4, 4), (1, 1), (1, 1), (0, 0), (1, 1)), out)
    assert list(out[:2]) == [0, 0]


def test_shared_memory_is_read_and_written_without_bank_conflicts():
    assert cuda_host.library("conv").worst_bank_conflict() == 1


MUTANTS = {
    "eps": lambda case, tensors: emulated(case, tensors, True, eps=0.5),
    "no_relu": lambda case, tensors: emulated(ConvCase(**{**vars(case), "relu": False}), tensors, True),
    "residual": lambda case, tensors: emulated(case, {k: v for k, v in tensors.items() if k != "residual"}, True),
    "bias": lambda case, tensors: emulated(case, {**tensors, "bias": bn_tensors(72, torch.float32)["bias"]}, True),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name):
    case = CASES[2]
    tensors = conv_case(case, torch.bfloat16, "channels_last")
    exact = stock(case, {key: tensor.double() for key, tensor in tensors.items()})
    with pytest.raises(AssertionError):
        assert_all_match({"y": MUTANTS[name](case, tensors)}, {"y": stock(case, tensors)}, {"y": exact})
