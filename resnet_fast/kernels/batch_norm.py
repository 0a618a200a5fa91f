"""Batch norm in training, passes over (pixels, C): statistics, apply, and the two passes of the gradient.

Sums are taken in two stages: a program's own, in registers, then over programs in a fixed order, without atomics: the
same bits every time. Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, and equation set 3.4 there.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu


@triton.jit(do_not_specialize=("pixels",))
def bn_statistics(
    x_ptr,  # (pixels, C)
    statistics,  # pointers to means (slabs, C), M2 (slabs, C) and counts (slabs,)
    pixels,
    CHANNELS: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns a slab of SLAB pixels times BLOCK_CHANNELS channels. Its sums are of differences from the mean of
    # the slab's first block, which is near enough to the slab's for neither sum to cancel.
    mean_ptr, m2_ptr, count_ptr = statistics
    slab, channel, channel_ok, first = _slab(CHANNELS, SLAB, BLOCK_CHANNELS)
    offset, ok = _rows(first, 0, pixels, channel, channel_ok, CHANNELS, BLOCK_PIXELS)
    block = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    shift = tl.sum(block, 0) / tl.minimum(pixels - first, BLOCK_PIXELS).to(tl.float32)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)  # infinite values have an infinite mean, not NaN
    total = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for step in tl.range(SLAB // BLOCK_PIXELS, loop_unroll_factor=4):
        offset, ok = _rows(first, step, pixels, channel, channel_ok, CHANNELS, BLOCK_PIXELS)
        x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        difference = tl.where(ok, x - shift[None, :], 0.0)
        total += difference
        squares += difference * difference
    count = tl.minimum(pixels - first, SLAB).to(tl.float32)
    mean = tl.sum(total, 0) / count
    m2 = tl.maximum(tl.sum(squares, 0) - count * mean * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    at = slab * CHANNELS + channel
    tl.store(mean_ptr + at, shift + mean, mask=channel_ok)
    tl.store(m2_ptr + at, m2, mask=channel_ok)
    tl.store(count_ptr + slab + 0 * channel, tl.where(channel == 0, count, 0.0), mask=channel == 0)


@triton.jit(do_not_specialize=("partials",))
def merge_statistics(
    statistics,  # pointers to means (partials, C), M2 (partials, C) and counts (partials,)
    mean_ptr,  # (C,)
    var_ptr,  # (C,), biased
    partials,
    CHANNELS: tl.constexpr,
    BLOCK_PARTIALS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns BLOCK_CHANNELS channels of all partials, and takes them as differences from the mean of the first
    # block, which is near enough to the mean of all for neither sum to cancel (Chan, Golub and LeVeque 1983). A partial
    # of no values counts for nothing. Few programs wait for many loads: four blocks' are under way together.
    means_ptr, m2s_ptr, counts_ptr = statistics
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_ok = channel < CHANNELS
    count, at, ok = _partials(counts_ptr, 0, partials, channel, channel_ok, CHANNELS, BLOCK_PARTIALS)
    weighted = tl.where(ok, tl.load(means_ptr + at, mask=ok, other=0.0) * count[:, None], 0.0)
    shift = tl.sum(weighted, 0) / tl.sum(count, 0)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    total = tl.zeros((BLOCK_PARTIALS, BLOCK_CHANNELS), tl.float32)
    squares = tl.zeros((BLOCK_PARTIALS, BLOCK_CHANNELS), tl.float32)
    values = tl.zeros((BLOCK_PARTIALS,), tl.float32)
    for first in tl.range(0, partials, BLOCK_PARTIALS, loop_unroll_factor=4):
        count, at, ok = _partials(counts_ptr, first, partials, channel, channel_ok, CHANNELS, BLOCK_PARTIALS)
        off = tl.where(ok, tl.load(means_ptr + at, mask=ok, other=0.0) - shift[None, :], 0.0)
        total += off * count[:, None]
        squares += tl.load(m2s_ptr + at, mask=ok, other=0.0) + off * off * count[:, None]
        values += count
    values = tl.sum(values, 0)
    off = tl.sum(total, 0) / values
    m2 = tl.maximum(tl.sum(squares, 0) - values * off * off, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean_ptr + channel, shift + off, mask=channel_ok)
    tl.store(var_ptr + channel, m2 / values, mask=channel_ok)


@triton.jit(do_not_specialize=("pixels",))
def bn_apply(
    x_ptr,  # (pixels, C)
    norm,
    residual_ptr,  # (pixels, C) or None
    residual_norm,
    y_ptr,  # (pixels, C)
    pixels,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns BLOCK_PIXELS pixels times BLOCK_CHANNELS channels.
    _, channel, channel_ok, first = _slab(CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS)
    offset, ok = _rows(first, 0, pixels, channel, channel_ok, CHANNELS, BLOCK_PIXELS)
    value = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    value = batch_norm(value, channel, channel_ok, norm, 1)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        value += batch_norm(residual, channel, channel_ok, residual_norm, 1)
    if RELU:
        value = relu(value)
    tl.store(y_ptr + offset, value.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=("pixels",))
def bn_backward_reduce(
    dy_ptr,  # (pixels, C)
    x_ptr,  # (pixels, C), what the norm was applied to
    norm,
    sums_ptr,  # (slabs, 2, C): sum(dz), sum(dz * (x - mean))
    pixels,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns a slab of SLAB pixels times BLOCK_CHANNELS channels.
    slab, channel, channel_ok, first = _slab(CHANNELS, SLAB, BLOCK_CHANNELS)
    mean = tl.load(norm[1] + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    sum_dz = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    sum_dzx = tl.zeros((BLOCK_PIXELS, BLOCK_CHANNELS), tl.float32)
    for step in tl.range(SLAB // BLOCK_PIXELS, loop_unroll_factor=4):
        offset, ok = _rows(first, step, pixels, channel, channel_ok, CHANNELS, BLOCK_PIXELS)
        x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        dz = behind_relu(tl.load(dy_ptr + offset, mask=ok, other=0.0), x, channel, channel_ok, norm, RELU)
        sum_dz += dz
        sum_dzx += tl.where(ok, dz * (x - mean), 0.0)
    at = slab * (2 * CHANNELS) + channel
    tl.store(sums_ptr + at, tl.sum(sum_dz, 0), mask=channel_ok)
    tl.store(sums_ptr + at + CHANNELS, tl.sum(sum_dzx, 0), mask=channel_ok)


@triton.jit(do_not_specialize=("pixels",))
def bn_backward_apply(
    dy_ptr,  # (pixels, C)
    x_ptr,  # (pixels, C), or None where neither ReLU nor statistics ask for it
    norm,
    mean_dz_ptr,  # (C,), or None where the statistics are fixed
    mean_dzx_ptr,  # (C,)
    dx_ptr,  # (pixels, C)
    pixels,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns BLOCK_PIXELS pixels times BLOCK_CHANNELS channels.
    _, channel, channel_ok, first = _slab(CHANNELS, BLOCK_PIXELS, BLOCK_CHANNELS)
    offset, ok = _rows(first, 0, pixels, channel, channel_ok, CHANNELS, BLOCK_PIXELS)
    dz = tl.load(dy_ptr + offset, mask=ok, other=0.0)
    x = dz
    if x_ptr is not None:
        x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        dz = behind_relu(dz, x, channel, channel_ok, norm, RELU)
    dx = input_gradient(dz, x, channel, channel_ok, norm, mean_dz_ptr, mean_dzx_ptr)
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _slab(CHANNELS: tl.constexpr, SLAB: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's slab, its channels, which of them exist, and its first pixel."""
    tiles: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0).to(tl.int64)
    channel = (program % tiles).to(tl.int32) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    slab = program // tiles
    return slab, channel, channel < CHANNELS, slab * SLAB


@triton.jit
def _rows(first, step, pixels, channel, channel_ok, CHANNELS: tl.constexpr, BLOCK_PIXELS: tl.constexpr):
    """Offsets of a block of pixels from `first` on, and which of them exist."""
    pixel = first + step * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    return pixel[:, None] * CHANNELS + channel[None, :], (pixel < pixels)[:, None] & channel_ok[None, :]


@triton.jit
def _partials(
    counts_ptr, first, partials, channel, channel_ok, CHANNELS: tl.constexpr, BLOCK_PARTIALS: tl.constexpr
):  # fmt: skip
    """Counts of a block of partials, offsets of their channels, and which of them exist."""
    row = first + tl.arange(0, BLOCK_PARTIALS)
    row_ok = row < partials
    count = tl.load(counts_ptr + row, mask=row_ok, other=0.0)
    at = row[:, None].to(tl.int64) * CHANNELS + channel[None, :]
    return count, at, (row_ok & (count > 0))[:, None] & channel_ok[None, :]


@triton.jit
def input_gradient(dz, x, channel, channel_ok, norm, mean_dz_ptr, mean_dzx_ptr):
    """weight * rstd * (dz - mean_dz - (x - mean) * rstd^2 * mean_dzx); without mean_dz_ptr, weight * rstd * dz."""
    _, mean_ptr, var_ptr, weight_ptr, _, eps = norm
    rstd = tl.rsqrt(tl.load(var_ptr + channel, mask=channel_ok, other=1.0).to(tl.float32) + eps)
    if mean_dz_ptr is not None:
        mean = tl.load(mean_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
        slope = rstd * rstd * tl.load(mean_dzx_ptr + channel, mask=channel_ok, other=0.0)
        dz -= tl.load(mean_dz_ptr + channel, mask=channel_ok, other=0.0)[None, :]
        dz -= (x - mean[None, :]) * slope[None, :]
    if weight_ptr is not None:
        rstd *= tl.load(weight_ptr + channel, mask=channel_ok, other=0.0).to(tl.float32)
    return dz * rstd[None, :]


@triton.jit
def behind_relu(dy, x, channel, channel_ok, norm, RELU: tl.constexpr):
    """dz: dy where the ReLU of norm(x) lets it pass, which is where norm(x) is not <= 0, so that NaN does."""
    dz = dy.to(tl.float32)
    if RELU:
        dz = tl.where(batch_norm(x, channel, channel_ok, norm, 1) <= 0.0, 0.0, dz)
    return dz
