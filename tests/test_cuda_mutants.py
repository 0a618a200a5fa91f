"""Mutants of the CUDA sources, run on the host: every one must be noticed by what the originals are tested by."""

import ctypes
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import cuda_host
import pytest
import test_cuda_conv as conv
import test_cuda_core as core_tests
import torch
from numerics import assert_all_match
from test_primitives import check as check_beside_reference

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("poison")]


@dataclass(frozen=True)
class Mutant:
    """`before` becomes `after` in csrc/cuda/<file>; `notices` raises AssertionError for it alone."""

    name: str
    file: str
    before: str
    after: str
    notices: Callable[[], None]


def core(name: str, layout: str, nan: bool = False) -> Callable[[], None]:
    """One primitive beside the reference, on 65 channels; with a NaN in what is normalised."""

    def check() -> None:
        call = core_tests.made(core_tests.CASES[2], torch.float32, layout)[name]
        if nan:
            call[1][1][0, 1, 2, 3] = float("nan")
        check_beside_reference(call, torch.float32, cuda_host)

    return check


def covers(shape: tuple[int, int, int], channels_last: bool) -> Callable[[], None]:
    """Every element once, aligned and by its channel."""

    def check() -> None:
        counts = torch.zeros(shape[0] * shape[1] * shape[2], dtype=torch.int8)
        image = cuda_host.Image(*shape, channels_last)
        cuda_host.library("bn").cover(ctypes.byref(image), ctypes.c_int64(4), ctypes.c_void_p(counts.data_ptr()))
        assert torch.equal(counts, torch.ones_like(counts))

    return check


def convolves(name: str) -> Callable[[], None]:
    """The emulated convolution of one case against float64."""

    def check() -> None:
        case = next(case for case in conv.CASES if case.name == name)
        tensors = conv.conv_case(case, torch.bfloat16, "channels_last")
        exact = conv.stock(case, {key: tensor.double() for key, tensor in tensors.items()})
        assert_all_match({"y": conv.emulated(case, tensors, True)}, {"y": conv.stock(case, tensors)}, {"y": exact})

    return check


def last_offsets() -> None:
    conv.test_offsets_of_the_last_element_are_int64(conv.EXTREMES[0])


MUTANTS = (
    Mutant("unbiased", "bn_math.h", "m2 / count; }", "m2 / (count - 1); }", core("batch_statistics", "nchw")),
    Mutant("unshifted", "bn_math.h", "isfinite(x) ? x : Acc(0)", "isfinite(x) ? Acc(0) : Acc(0)",
           lambda: core_tests.test_variance_beside_a_large_mean("nchw", 8, 1e5)),
    Mutant("no_eps", "bn_math.h", "sqrt(var[c] + eps)", "sqrt(var[c])", core("apply", "channels_last")),
    Mutant("mask_drops_nan", "bn_math.h", "kept <= 0 ? Acc(0) : dy", "kept > 0 ? dy : Acc(0)",
           core("backward_reduce", "nchw", nan=True)),
    Mutant("rows_left_over", "launch.h", "{image.count() % group,", "{0,", covers((3, 65, 33), True)),
    Mutant("slots_not_aligned", "bn_threads.h", "(first & ~int64_t(V - 1)) + slot * V", "first + slot * V",
           covers((3, 5, 33), False)),
    Mutant("norm_of_the_residual", "bn_ops.h", "c.residual(added)", "c.main(added)",
           core("apply_normed_residual", "channels_last")),
    Mutant("rstd_once", "bn_ops.h", "inv_count * rstd * rstd", "inv_count * rstd", core("backward_apply", "nchw")),
    Mutant("sum_tail", "conv_tiles.h", "const bool exists = index < g.chunks();", "const bool exists = true;",
           convolves("tails_everywhere")),
    Mutant("channel_tail", "conv_tiles.h", "exists && i * Tile::kRowsApart < channels", "exists",
           convolves("tails_everywhere")),
    Mutant("pixel_tail", "conv_tiles.h", "return at < g.pixels() ?", "return at >= 0 ?", convolves("tails_everywhere")),
    Mutant("no_padding", "conv_tiles.h", "g.stride_width - g.padding_width", "g.stride_width",
           convolves("eight_channels")),
    Mutant("strides_swapped", "conv_tiles.h", "(row - n * g.out_height) * g.stride_height",
           "(row - n * g.out_height) * g.stride_width", convolves("rows_unlike_columns")),
    Mutant("accumulators", "conv_tiles.h", "lane / 4 + i / 2 * 8", "lane / 4 + i % 2 * 8", convolves("exact_tiles")),
    Mutant("fragments", "conv_tiles.h", "chunk + lane / 8 % 2", "chunk + lane / 16", convolves("exact_tiles")),
    Mutant("bank_conflicts", "conv_tiles.h", "(row >> 1)", "(row >> 2)",
           conv.test_shared_memory_is_read_and_written_without_bank_conflicts),
    Mutant("int32_offsets", "conv_tiles.h", "return {((n * g.height + top)", "return {(int32_t(n * g.height + top)",
           last_offsets),
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_it_is_noticed(mutant, tmp_path, monkeypatch):
    mutant.notices()
    sources = tmp_path / "csrc"
    shutil.copytree(cuda_host.ROOT / "csrc" / "cuda", sources / "cuda")
    path = sources / "cuda" / mutant.file
    text = path.read_text()
    assert text.count(mutant.before) == 1, "the mutant is out of date"
    path.write_text(text.replace(mutant.before, mutant.after))
    name = "conv" if mutant.file == "conv_tiles.h" else "bn"
    mutated = cuda_host.compiled(name, sources)
    monkeypatch.setattr(cuda_host, "library", lambda wanted: mutated)
    with pytest.raises(AssertionError):
        mutant.notices()
