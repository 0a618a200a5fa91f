"""The tests of training's convolutions must bite: one plausible mistake in a kernel's text each, as in
test_kernel_mutants."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interpreted import mutated, test_training_conv
from interpreted import training_drive as drive
from interpreted.mutated import Mutant
from interpreted.training_drive import CONV_CASES, GRAM_CASES, JOIN_CASES

CONV, JOIN, GRAM = ({case.name: case for case in cases} for cases in (CONV_CASES, JOIN_CASES, GRAM_CASES))


def conv(name: str, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    return partial(drive.check_conv, CONV[name], dtype)


def join(name: str) -> Callable[[], None]:
    return partial(drive.check_join, JOIN[name], torch.float32)


def gram(name: str, add: bool = False) -> Callable[[], None]:
    return partial(drive.check_gram_dgrad, GRAM[name], torch.float32, add)


LARGE_MEAN = partial(test_training_conv.test_variance_beside_a_large_mean, "three_by_three", 30.0)
NAN = partial(test_training_conv.test_what_is_not_finite_reaches_the_statistics, "three_by_three", float("nan"))

STATISTICS = {
    "tile_counts_invalid_pixels": (
        "tl.sum(pixel_ok.to(tl.float32), 0)",
        "tl.sum((pixel_ok | True).to(tl.float32), 0)",
        conv("pointwise_tail_tile"),
    ),
    "invalid_pixels_in_the_mean": ("tl.where(ok, wide, 0.0)", "wide", conv("tma_three_by_three")),
    "invalid_pixels_in_m2": (
        "tl.where(ok, wide - tl.expand_dims(mean, 1 - AXIS), 0.0)",
        "wide - tl.expand_dims(mean, 1 - AXIS)",
        conv("pointwise_tail_tile"),
    ),
    "difference_of_sums": (
        "tl.sum(deviation * deviation, 1 - AXIS)",
        "tl.sum(tl.where(ok, wide * wide, 0.0), 1 - AXIS) - count * mean * mean",
        LARGE_MEAN,
    ),
    "even_count_of_channels": ("count = value.shape[1 - AXIS]", "count = value.shape[AXIS]", conv("tma_even")),
    "even_m2_about_zero": (
        "deviation = wide - tl.expand_dims(mean, 1 - AXIS)\n    else",
        "deviation = wide\n    else",
        conv("prologue_even"),
    ),
    "nan_dropped": ("tl.where(ok, wide, 0.0)", "tl.where(ok & (wide == wide), wide, 0.0)", NAN),
    "rows_of_other_tiles": ("row.to(tl.int64) * CHANNELS", "0 * row.to(tl.int64)", conv("pointwise_tail_tile")),
    "no_channel_mask": ("mean, mask=channel_ok)", "mean)", conv("five_to_65_channels")),
    "count_of_the_first_tile": ("count_ptr + row + 0", "count_ptr + 0", conv("pointwise_tail_tile")),
}
BEFORE_ROUNDING = ("store_statistics(value, pixel_ok", "store_statistics(acc, pixel_ok")
POINTER_MUTANTS = {
    "statistics_before_rounding": (*BEFORE_ROUNDING, conv("three_by_three", torch.bfloat16)),
    "dropped_residual_norm": ("acc += batch_norm(residual, out, out_ok, residual_norm, 1)", "acc += residual",
                              join("residual_norm")),
    "every_channel_tile_a_row": ("statistics, tile,", "statistics, program,", conv("stride2_pointwise")),
}  # fmt: skip
TMA_MUTANTS = {
    "statistics_before_rounding": (*BEFORE_ROUNDING, conv("tma_three_by_three", torch.bfloat16)),
    "dropped_residual_norm": (
        "acc += batch_norm(added, out, out_ok, residual_norm, 0)",
        "acc += added",
        join("tma_residual_norm"),
    ),
    "images_past_the_batch": ("(n + pixel // (BOX_H * BOX_W) < batch) & ", "", conv("tma_three_by_three")),
    "rows_past_the_image": (" & (h + pixel // BOX_W % BOX_H < out_height)", "", conv("tma_three_by_three")),
    "columns_past_the_image": ("rows_ok & (w + pixel % BOX_W < out_width)", "rows_ok", conv("tma_three_by_three")),
}
PROLOGUE_MUTANTS = {
    "statistics_before_rounding": (*BEFORE_ROUNDING, conv("prologue", torch.bfloat16)),
    "dropped_residual_norm": ("acc += batch_norm(residual, out, out_ok, residual_norm, 0)", "acc += residual",
                              join("prologue_residual_norm")),
    "not_zeroed_again": ("            x = tl.where(ok, x, 0.0)", "            pass", conv("prologue_eps_0")),
    "dropped_relu": ("relu(batch_norm(x, channel, channel_ok, norm, 1)).to(",
                     "batch_norm(x, channel, channel_ok, norm, 1).to(", conv("prologue")),
    "dropped_norm": ("acc = batch_norm(acc, out, out_ok, norm, 0)", "pass", join("prologue_residual")),
    "relu_drops_nothing": ("        if RELU:", "        if False:", join("prologue_no_residual")),
    "first_channels_alone": ("first_tile = program % SPLITS * tiles_out", "first_tile = 0", conv("prologue_splits")),
    "first_block_alone": ("activations[block].T", "activations[0].T", conv("prologue_several_blocks")),
    "no_pixel_mask": ("ok = pixel_ok[None, :] & out_ok[:, None]", "ok = (pixel_ok | True)[None, :] & out_ok[:, None]",
                      conv("prologue")),
    "weights_not_masked": ("    elif OUT_CHANNELS % BLOCK_OUT != 0:", "    elif False:", conv("prologue_100_outputs")),
    "rows_of_programs": ("row = program // SPLITS", "row = program", conv("prologue_splits")),
}  # fmt: skip
GRAM_MUTANTS = {
    "dropped_mean": ("activated - mean[None, :]", "activated", gram("pending_norm")),
    "mean_not_masked": ("mask=channel < CHANNELS, other=0.0", "", gram("odd_channels_eps_0")),
    "dropped_constant": ("acc += tl.load(constant_ptr + out, mask=out_ok, other=0.0)[:, None]", "pass",
                         gram("plain_input")),
    "dropped_add": ("if add_ptr is not None", "if False", gram("plain_input", True)),
    "first_terms_alone": ("(CHANNELS + BLOCK_IN - 1) // BLOCK_IN):", "1):", gram("several_tiles")),
    "first_rows_alone": ("out = program % tiles_out * BLOCK_OUT", "out = 0 * program", gram("several_tiles")),
    "no_pixel_mask": ("ok = pixel_ok[None, :] & out_ok[:, None]", "ok = (pixel_ok | True)[None, :] & out_ok[:, None]",
                      gram("pending_norm")),
}  # fmt: skip
MUTANTS = {
    f"{file.removesuffix('.py')}-{name}": Mutant(file, *mutant)
    for file, mutants in (
        ("statistics.py", STATISTICS),
        ("conv_pointer.py", POINTER_MUTANTS),
        ("conv_tma.py", TMA_MUTANTS),
        ("conv_prologue.py", PROLOGUE_MUTANTS),
        ("gram_dgrad.py", GRAM_MUTANTS),
    )
    for name, mutant in mutants.items()
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name, tmp_path):
    mutated.check_noticed(MUTANTS[name], tmp_path / "mutated_kernels")


def test_an_unmutated_copy_passes(tmp_path):
    notices = conv("prologue_eps_0"), join("tma_residual_norm"), gram("several_tiles", True), LARGE_MEAN, NAN
    mutated.check_copy_passes(tmp_path / "copied_kernels", *notices)
