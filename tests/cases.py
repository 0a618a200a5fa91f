"""Named cases: few shapes, each there for a reason, and the tensors that go with them."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from resnet_fast.cpus import Cpu
from resnet_fast.kernels import tables

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CPU = Cpu("some CPU", 2, "AVX512")
"""One that nothing is measured on."""
ONEDNN = {"config": None, "us": 1.0, "library_us": 1.0, "variant": "onednn"}
"""A row of a tuned table."""


def tuned_table(rows: dict[str, dict], **changes) -> str:
    """The text of a tuned table of CPU."""
    return json.dumps({"schema": tables.SCHEMA, "cpu": CPU.name, "environment": {}} | changes | {"rows": rows})


@dataclass(frozen=True)
class BnCase:
    """x is (N, C, H, W); the residual, if any, has its shape."""

    name: str
    shape: tuple[int, int, int, int]
    residual: bool = False
    relu: bool = True
    affine: bool = True
    unaligned: bool = False


@dataclass(frozen=True)
class ConvCase:
    """x is (N, Cin, H, W), conv_weight (Cout, Cin / groups, R, S)."""

    name: str
    shape: tuple[int, int, int, int]
    out_channels: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    relu: bool = True
    affine: bool = True
    conv_bias: bool = False
    unaligned: bool = False

    @property
    def geometry(self) -> dict:
        """What conv2d and conv_bn_act take as keywords."""
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        x = torch.empty(self.shape, device="meta")
        weight = torch.empty(self.out_channels, self.shape[1] // self.groups, *self.kernel, device="meta")
        return tuple(torch.nn.functional.conv2d(x, weight, **self.geometry).shape)


BN_CASES = (
    BnCase("odd_7x7_c2048", (2, 2048, 7, 7), residual=True),
    BnCase("channels_not_multiple_of_block", (3, 65, 9, 11), residual=True),
    BnCase("hundred_channels", (2, 100, 6, 6)),
    BnCase("one_channel", (4, 1, 6, 5), residual=True),
    BnCase("three_channels_large_plane", (2, 3, 64, 65)),
    BnCase("five_channels_one_image", (1, 5, 7, 3), residual=True),
    BnCase("spatial_1x1", (8, 64, 1, 1), residual=True),
    BnCase("no_affine", (2, 16, 5, 5), affine=False),
    BnCase("no_relu", (2, 16, 5, 5), relu=False),
    BnCase("no_relu_residual", (2, 33, 5, 5), relu=False, residual=True),
    BnCase("unaligned_view", (2, 17, 5, 7), residual=True, unaligned=True),
)

CONV_CASES = (
    ConvCase("pointwise_residual", (2, 32, 7, 7), 64, (1, 1), padding=(0, 0), residual=True),
    ConvCase("three_by_three", (2, 16, 9, 9), 24),
    ConvCase("three_by_three_residual", (2, 16, 8, 8), 16, residual=True),
    ConvCase("stride2_downsample", (2, 16, 9, 9), 32, (1, 1), stride=(2, 2), padding=(0, 0), relu=False),
    ConvCase("stride2_three_by_three", (2, 16, 11, 11), 16, stride=(2, 2)),
    ConvCase("stem_7x7", (1, 3, 20, 20), 16, (7, 7), stride=(2, 2), padding=(3, 3)),
    ConvCase("grouped", (2, 32, 6, 6), 32, groups=4, residual=True),
    ConvCase("dilated", (2, 16, 9, 9), 16, padding=(2, 2), dilation=(2, 2)),
    ConvCase("rows_unlike_columns", (2, 6, 11, 12), 10, (2, 3), stride=(2, 1), padding=(0, 2), dilation=(3, 2)),
    ConvCase("one_channel", (3, 1, 7, 7), 1, residual=True),
    ConvCase("channels_not_multiple_of_block", (2, 5, 7, 6), 65, residual=True),
    ConvCase("spatial_1x1", (8, 16, 1, 1), 32, (1, 1), padding=(0, 0), residual=True),
    ConvCase("conv_bias_no_affine", (2, 8, 6, 6), 12, affine=False, conv_bias=True),
    ConvCase("unaligned_view", (2, 7, 6, 5), 9, residual=True, unaligned=True),
)


def named(cases) -> dict:
    """Arguments for pytest.mark.parametrize over cases: readable ids."""
    return {"argvalues": cases, "ids": [case.name for case in cases]}


def draw(shape, dtype: torch.dtype, layout: str = "nchw", unaligned: bool = False, scale: float = 1.0) -> Tensor:
    """Normal values of `dtype`; 4-D ones in `layout`; `unaligned` starts one element into a larger buffer."""
    values = (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)
    if len(shape) != 4:
        return values
    values = values.contiguous(memory_format=LAYOUTS[layout])
    if not unaligned:
        return values
    buffer = torch.empty(values.numel() + 1, dtype=dtype)
    return buffer[1:].as_strided(values.shape, values.stride(), 1).copy_(values)


def bn_tensors(channels: int, dtype: torch.dtype, affine: bool = True) -> dict[str, Tensor]:
    """running_mean, running_var, weight, bias of `dtype`, none of them trivial; some weights negative."""
    tensors = {
        "running_mean": torch.randn(channels, dtype=torch.float64) * 0.5,
        "running_var": torch.rand(channels, dtype=torch.float64) + 0.5,
    }
    if affine:
        tensors["weight"] = torch.rand(channels, dtype=torch.float64) * 2 - 0.5
        tensors["bias"] = torch.randn(channels, dtype=torch.float64) * 0.5
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Batch norm's parameters are float32 beside bfloat16 and float16 activations, as under autocast."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bn_case(case: BnCase, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """The tensors of one bn_act call, and "dy", the gradient that comes back."""
    tensors = {"x": draw(case.shape, dtype, layout, case.unaligned)}
    tensors |= bn_tensors(case.shape[1], parameter_dtype(dtype), case.affine)
    if case.residual:
        tensors["residual"] = draw(case.shape, dtype, layout, case.unaligned)
    return tensors | {"dy": draw(case.shape, dtype, layout)}


def conv_case(case: ConvCase, dtype: torch.dtype, layout: str) -> dict[str, Tensor]:
    """The tensors of one conv_bn_act call, and "dy", the gradient that comes back."""
    fan_in = case.shape[1] // case.groups * case.kernel[0] * case.kernel[1]
    weight_shape = (case.out_channels, case.shape[1] // case.groups, *case.kernel)
    tensors = {
        "x": draw(case.shape, dtype, layout, case.unaligned),
        "conv_weight": draw(weight_shape, dtype, layout, scale=fan_in**-0.5),
    }
    if case.conv_bias:
        tensors["conv_bias"] = draw((case.out_channels,), dtype)
    tensors |= bn_tensors(case.out_channels, parameter_dtype(dtype), case.affine)
    if case.residual:
        tensors["residual"] = draw(case.out_shape, dtype, layout, case.unaligned)
    return tensors | {"dy": draw(case.out_shape, dtype, layout)}
