"""Sums of outer products over pixels, float32: a weight's gradient, and the covariance of activations.

    out[k, c] = sum_p a[p, k] * b[p, c],   b = act(x) - mean,   a = dz, or b itself

act(x) is x, or relu(norm(x)) as it would be stored. What is centred is rounded to the storage dtype for the products,
not for the sums of a. Pixels are split over programs; the splits are added up in a fixed order afterwards.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu


@triton.jit(do_not_specialize=("pixels", "width", "height", "x_width", "x_height"))
def outer(
    dz_ptr,  # (N, H, W, K), or None: the second operand is the first as well
    x_ptr,  # (N, x_height, x_width, C)
    x_norm,
    mean_ptr,  # (C,)
    out_ptr,  # (splits, K, C)
    sums_ptr,  # (splits, K): sum_p a[p, k]
    pixels,  # N * H * W
    height,
    width,
    x_height,
    x_width,
    ROWS: tl.constexpr,  # K
    CHANNELS: tl.constexpr,  # C
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns BLOCK_ROWS x BLOCK_CHANNELS of the result for STEPS * BLOCK_PIXELS pixels.
    tiles_rows: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    tiles_channels: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0)
    tile_row = program % tiles_rows
    tile_channel = program // tiles_rows % tiles_channels
    split = (program // (tiles_rows * tiles_channels)).to(tl.int64)
    row = tile_row * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_ok = row < ROWS
    channel = tile_channel * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    channel_ok = channel < CHANNELS
    first = split * (STEPS * BLOCK_PIXELS)

    acc = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), tl.float32)
    sums = tl.zeros((BLOCK_ROWS,), tl.float32)
    for step in range(STEPS):
        pixel = first + step * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
        ok = pixel < pixels
        at = pixel
        if STRIDE_H * STRIDE_W > 1:
            image = pixel // width // height
            at = (image * x_height + pixel // width % height * STRIDE_H) * x_width + pixel % width * STRIDE_W
        b = _centred(x_ptr, x_norm, mean_ptr, at, ok, channel, channel_ok, CHANNELS).to(x_ptr.dtype.element_ty)
        if dz_ptr is None:
            exact = _centred(x_ptr, x_norm, mean_ptr, at, ok, row, row_ok, CHANNELS)
            a = exact.to(x_ptr.dtype.element_ty)
        else:
            a = tl.load(dz_ptr + pixel[:, None] * ROWS + row[None, :], mask=ok[:, None] & row_ok[None, :], other=0.0)
            exact = a.to(tl.float32)
        acc = tl.dot(a.T, b, acc, input_precision="ieee")
        sums += tl.sum(exact, 0)
    out = out_ptr + (split * ROWS + row[:, None]) * CHANNELS + channel[None, :]
    tl.store(out, acc, mask=row_ok[:, None] & channel_ok[None, :])
    tl.store(sums_ptr + split * ROWS + row, sums, mask=row_ok & (tile_channel == 0))


@triton.jit
def _centred(x_ptr, norm, mean_ptr, at, ok, channel, channel_ok, CHANNELS: tl.constexpr):
    """act(x) - mean of these pixels and channels, in float32; zero outside."""
    inside = ok[:, None] & channel_ok[None, :]
    value = tl.load(x_ptr + at[:, None] * CHANNELS + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    if norm[1] is not None:
        value = relu(batch_norm(value, channel, channel_ok, norm, 1)).to(x_ptr.dtype.element_ty).to(tl.float32)
    value -= tl.load(mean_ptr + channel, mask=channel_ok, other=0.0)[None, :]
    return tl.where(inside, value, 0.0)
