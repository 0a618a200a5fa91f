"""The tests of the kernels must bite: each mutant is one plausible mistake in a kernel's text, and has to be noticed.

`notices` is a case of the other files. It passes with a faithful copy of the kernels, and must not with the mutant: it
finds a mismatch, or the kernel leaves its tensors' memory and dies.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import bn_tensors, draw
from interpreted import drive, huge, mutated
from interpreted.kernel_cases import POINTER_CASES, POOL_SHAPES, STEM_CASES, TAIL_CASES, TMA_CASES
from interpreted.mutated import Mutant

POINTER, TMA, STEM, TAIL = (
    {case.name: case for case in cases} for cases in (POINTER_CASES, TMA_CASES, STEM_CASES, TAIL_CASES)
)


def pointer(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    return partial(drive.check, POINTER[name], dtype)


def tma(name: str) -> Callable[[], None]:
    return partial(drive.check, TMA[name], torch.float32)


def tail(name: str) -> Callable[[], None]:
    return partial(drive.check, TAIL[name], torch.float16)


def bn_act(layout: str = "channels_last") -> None:
    residual = draw((2, 5, 4, 3), torch.float32, layout)
    drive.check_bn_act(draw((2, 5, 4, 3), torch.float32, layout), bn_tensors(5, torch.float32), residual)


def bn_act_of_nan() -> None:
    x = torch.full((1, 4, 1, 1), float("nan"))
    drive.check_bn_act(x, {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}, None)


def pack(name: str) -> Callable[[], None]:
    case = STEM[name]
    return lambda: drive.check_pack(draw(case.conv.x_shape, torch.float32), case.problem(torch.float32), torch.float32)


def max_pool(name: str) -> Callable[[], None]:
    """Of negative numbers, which padding with zeros would hide."""
    return lambda: drive.check_max_pool(-draw(POOL_SHAPES[name], torch.float32, "channels_last").abs())


EPILOGUE = {
    "dropped_eps": ("AXIS) + eps)", "AXIS))", pointer("three_by_three_bn")),
    "dropped_eps_in_bfloat16": ("AXIS) + eps)", "AXIS))", pointer("three_by_three_bn", torch.bfloat16)),
    "eps_outside_the_root": (
        "tl.rsqrt(_vector(var_ptr, channel, in_range, AXIS) + eps)",
        "1 / (tl.sqrt(_vector(var_ptr, channel, in_range, AXIS)) + eps)",
        pointer("no_affine"),
    ),
    "dropped_bias": ("if bias_ptr is not None", "if False", bn_act),
    "dropped_weight": ("if weight_ptr is not None", "if False", pointer("conv_bias_and_bn")),
    "dropped_conv_bias": ("if conv_bias_ptr is not None", "if False", tma("pointwise_residual")),
    "relu_drops_nan": (
        "tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)",
        "tl.where(value > 0.0, value, 0.0)",
        bn_act_of_nan,
    ),
    "vectors_not_masked": (
        "pointer + channel, mask=in_range, other=0.0",
        "pointer + channel",
        pointer("five_to_65_channels"),
    ),
}
POINTER_MUTANTS = {
    "no_output_channel_mask": ("pixel_ok[:, None] & out_ok", "pixel_ok[:, None] & (out_ok | True)",
                               pointer("five_to_65_channels")),
    "no_pixel_mask": ("ok = pixel_ok[:, None] & out_ok", "ok = (pixel_ok | True)[:, None] & out_ok",
                      pointer("pointwise_residual")),
    "no_padding_mask": ("if PADDED:", "if False:", pointer("three_by_three_bn_residual")),
    "padding_masked_above_only": ("(top + down >= 0) & (top + down < height) &", "(top + down >= 0) &",
                                  pointer("three_by_three_bn_residual")),
    "padding_masked_left_only": (" & (left + right < width)", "", pointer("three_by_three_bn_residual")),
    "no_input_channel_mask": ("x_mask &= (channel < CHANNELS)[None, :]", "pass", pointer("65_to_five_channels")),
    "weights_not_masked": ("        if MASK_IN and MASK_OUT:", "        if False:", pointer("five_to_65_channels")),
    "dropped_dilation": ("tap // S * DILATION_H", "tap // S", pointer("dilated")),
    "swapped_dilations": ("R, S, DILATION_H, DILATION_W", "R, S, DILATION_W, DILATION_H",
                          pointer("rows_unlike_columns")),
    "taps_in_the_wrong_order": ("tap % S * DILATION_W", "(S - 1 - tap % S) * DILATION_W", pointer("three_by_three_bn")),
    "dropped_stride": ("column * STRIDE_W - PAD_W", "column - PAD_W", pointer("stride2_three_by_three")),
    "group_reads_the_first_ones_inputs": ("x_ptr + group * GROUP_IN", "x_ptr", pointer("grouped_wide")),
    "dropped_shortcut_stride": ("row * STRIDE_H, column * STRIDE_W", "row, column", pointer("shortcut")),
    "dropped_second_norm": ("acc += batch_norm(other, out, out_ok, shortcut_norm, 1)", "acc += other",
                            pointer("shortcut_two_norms")),
    "dropped_shortcut_bias": ("acc = batch_norm(acc, out, out_ok, shortcut_norm, 1)", "pass", pointer("shortcut")),
    "dropped_residual": ("if residual_ptr is not None", "if False", pointer("pointwise_residual")),
    "residual_behind_relu": ("    if RELU:\n        acc = relu(acc)\n    value = acc",
                             "    value = relu(acc)", pointer("no_relu_residual")),
    "32_bit_pixels": ("tile.to(tl.int64) * BLOCK_PIXELS", "tile * BLOCK_PIXELS",
                      partial(huge.check_conv, huge.CONVS[0])),
    "32_bit_images": ("pixel // out_width // out_height", "(pixel // out_width // out_height).to(tl.int32)",
                      partial(huge.check_conv, huge.CONVS[1])),
}  # fmt: skip
TMA_MUTANTS = {
    "dropped_dilation": ("tap // S * DILATION_H", "tap // S", tma("dilated")),
    "taps_in_the_wrong_order": ("tap % S * DILATION_W", "(S - 1 - tap % S) * DILATION_W", tma("rows_unlike_columns")),
    "dropped_padding": ("DILATION_W - PAD_W", "DILATION_W", tma("one_image")),
    "rows_rounded_to_zero": ("h + (down >> HALVE)", "h + (down + (down < 0)) // (1 + HALVE)",
                             tma("stride2_five_by_five")),
    "parity_dropped": ("(right & HALVE) * CHANNELS + channel", "channel", tma("stride2_three_by_three")),
    "group_reads_the_first_ones_inputs": ("first_out // GROUP_OUT * GROUP_IN", "0", tma("grouped_packed_in_two")),
    "dropped_residual": ("if residual is not None", "if False", tma("pointwise_residual")),
    "dropped_second_norm": ("acc += batch_norm(other, out, out_ok, shortcut_norm, 0)", "acc += other",
                            tma("shortcut_two_norms")),
    "last_channels_dropped": ("(CHANNELS + BLOCK_IN - 1) // BLOCK_IN", "CHANNELS // BLOCK_IN",
                              tma("shortcut_two_norms")),
    "boxes_transposed": ("w = box % boxes_w * BOX_W", "w = box % boxes_h * BOX_W", tma("one_image")),
}  # fmt: skip
PACK_MUTANTS = {
    "channels_swapped": ("tl.join(first, third), tl.join(second", "tl.join(first, second), tl.join(third",
                         pack("four_channels")),
    "padding_of_rows_for_columns": ("% TILE_W - pad_width", "% TILE_W - pad_height", pack("rows_unlike_columns")),
    "no_row_mask": ("(row >= 0) & (row < height) &", "(row < height) &", pack("resnet")),
    "no_column_mask": ("& (column >= 0) & (column < width)", "& (column >= 0)", pack("odd_size")),
    "poison_in_channels_that_are_not_there": ("tl.zeros(at.shape, DTYPE)", "tl.full(at.shape, 1, DTYPE)",
                                              pack("two_channels")),
    "border_left_out": ("mask=to_ok[:, None]", "mask=(to_ok & ok)[:, None]", pack("resnet")),
    "32_bit_images": ("image = (program // (tiles_w * tiles_h)).to(tl.int64)", "image = program // (tiles_w * tiles_h)",
                      huge.check_pack),
}  # fmt: skip
POOL_MUTANTS = {
    "narrow_window": ("tl.static_range(9)", "tl.static_range(8)", max_pool("several_tiles")),
    "window_off_by_one": ("row * 2 - 1, column * 2 - 1, channel", "row * 2 - 1, column * 2, channel",
                          max_pool("several_tiles")),
    "padded_with_zeros": ('other=float("-inf")', "other=0.0", max_pool("odd_size")),
    "rows_of_the_next_image": ("row_ok & (column", "(row > -2) & (column", max_pool("odd_size")),
    "channels_of_other_blocks": ("program % tiles * BLOCK_CHANNELS", "0", max_pool("two_blocks_of_channels")),
    "32_bit_images": ("(tile // (tiles_w * tiles_h)).to(tl.int64)", "tile // (tiles_w * tiles_h)",
                      huge.check_max_pool),
}  # fmt: skip
TAIL_MUTANTS = {
    "dropped_dilation": ("(tap // 3 - 1) * DILATION", "(tap // 3 - 1)", tail("dilated")),
    "no_relu_between": ("mid = relu(acc +", "mid = (acc +", tail("identity")),
    "dropped_shortcut_bias": ("out += tl.load(shortcut_bias_ptr + channel).to(tl.float32)[:, None]", "pass",
                              tail("shortcut")),
    "residual_of_the_first_channels": ("residual.load([n, h, w, first])", "residual.load([n, h, w, 0])",
                                       tail("identity")),
    "next_from_the_first_channels": ("next_weight.load([0, first])", "next_weight.load([0, 0])", tail("identity")),
    "no_relu_at_the_end": ("next_acc = relu(next_acc +", "next_acc = (next_acc +", tail("wider_next")),
}  # fmt: skip
BN_ACT_MUTANTS = {
    "no_mask": ("ok = index < elements", "ok = index < elements + 1", bn_act),
    "plane_forgotten": ("(index // PLANE % CHANNELS)", "(index % CHANNELS)", partial(bn_act, "nchw")),
    "dropped_residual": ("if residual_ptr is not None", "if False", bn_act),
    "32_bit_index": (".to(tl.int64) * BLOCK", " * BLOCK", huge.check_bn_act),
}
MUTANTS = {
    f"{file.removesuffix('.py')}-{name}": Mutant(file, *mutant)
    for file, mutants in (
        ("epilogue.py", EPILOGUE),
        ("conv_pointer.py", POINTER_MUTANTS),
        ("conv_tma.py", TMA_MUTANTS),
        ("stem.py", PACK_MUTANTS),
        ("max_pool.py", POOL_MUTANTS),
        ("tail.py", TAIL_MUTANTS),
        ("bn_act.py", BN_ACT_MUTANTS),
    )
    for name, mutant in mutants.items()
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name, tmp_path):
    mutated.check_noticed(MUTANTS[name], tmp_path / "mutated_kernels")


@pytest.mark.parametrize("notices", [
    pytest.param(pointer("three_by_three_bn_residual"), id="pointer"),
    pytest.param(tma("shortcut_two_norms"), id="tma"),
    pytest.param(tail("wider_next"), id="tail"),
    pytest.param(bn_act, id="bn_act"),
    pytest.param(bn_act_of_nan, id="bn_act_of_nan"),
    pytest.param(pack("resnet"), id="pack"),
    pytest.param(max_pool("several_tiles"), id="max_pool"),
])  # fmt: skip
def test_an_unmutated_copy_passes(notices, tmp_path):
    mutated.check_copy_passes(tmp_path / "copied_kernels", notices)
