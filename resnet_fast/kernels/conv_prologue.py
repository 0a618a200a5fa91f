"""conv1x1(relu(norm(x))), the norm and ReLU applied as x is read: the activations are never written.

x is a convolution's raw output. A program transforms its pixels once and keeps them, as the second operand of every
product, in shared memory, while it goes through the output channels: acc[channel, pixel] = weight @ activations^T.
Two epilogues: the raw output with its statistics, or relu(norm(.) + residual) and nothing raw. sm_80 and newer.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu
from .statistics import store_statistics


@triton.jit(do_not_specialize=("pixels",))
def conv_prologue(
    x_ptr,  # (pixels, C)
    x_norm,
    weight_ptr,  # (K, C)
    y_ptr,  # (pixels, K)
    norm,  # nothing in it where y is the raw output
    residual_ptr,  # (pixels, K) or None
    residual_norm,
    statistics,  # three pointers, or three None
    pixels,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SPLITS: tl.constexpr,
    EVEN: tl.constexpr,  # BLOCK_PIXELS divides pixels
):
    # A program owns BLOCK_PIXELS pixels times a SPLITS-th of the output channels. Trip counts are constants, or ptxas
    # serialises wgmma.
    blocks: tl.constexpr = (CHANNELS + BLOCK_IN - 1) // BLOCK_IN
    tiles_out: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT // SPLITS
    program = tl.program_id(0)
    first_tile = program % SPLITS * tiles_out
    row = program // SPLITS
    pixel = row.to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_ok = pixel < pixels

    activations = ()
    for block in tl.static_range(blocks):
        channel = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
        activations += (
            load_activated(x_ptr, x_norm, pixel, pixel_ok, channel, CHANNELS, CHANNELS % BLOCK_IN != 0).to(
                x_ptr.dtype.element_ty
            ),
        )

    for step in range(tiles_out):
        out = (first_tile + step) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        out_ok = out < OUT_CHANNELS
        acc = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32)
        for block in tl.static_range(blocks):
            weight = load_matrix(weight_ptr, out, out_ok, block * BLOCK_IN, CHANNELS, OUT_CHANNELS, BLOCK_OUT, BLOCK_IN)
            acc = tl.dot(weight, activations[block].T, acc, input_precision="ieee")
        acc = batch_norm(acc, out, out_ok, norm, 0)
        offset = pixel[None, :] * OUT_CHANNELS + out[:, None]
        ok = pixel_ok[None, :] & out_ok[:, None]
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offset, mask=ok, other=0.0).to(tl.float32)
            acc += batch_norm(residual, out, out_ok, residual_norm, 0)
        if RELU:
            acc = relu(acc)
        value = acc.to(y_ptr.dtype.element_ty)
        if statistics[0] is not None:
            store_statistics(value, pixel_ok, out, out_ok, statistics, row, OUT_CHANNELS, 0, EVEN)
        tl.store(y_ptr + offset, value, mask=ok)


@triton.jit
def load_activated(x_ptr, norm, pixel, pixel_ok, channel, CHANNELS: tl.constexpr, MASK: tl.constexpr):
    """(pixels, channels) of act(x) as it would be stored, in float32; zero where there is no such channel."""
    ok, channel_ok = pixel_ok[:, None], channel < CHANNELS
    if MASK:
        ok &= channel_ok[None, :]
    x = tl.load(x_ptr + pixel[:, None] * CHANNELS + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    if norm[1] is not None:
        x = relu(batch_norm(x, channel, channel_ok, norm, 1)).to(x_ptr.dtype.element_ty).to(tl.float32)
        if MASK:
            x = tl.where(ok, x, 0.0)
    return x


@triton.jit
def load_matrix(
    ptr, out, out_ok, first, CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """Rows `out` of a matrix (OUT_CHANNELS, CHANNELS), BLOCK_IN columns from `first`; zero outside."""
    channel = first + tl.arange(0, BLOCK_IN)
    at = ptr + out[:, None] * CHANNELS + channel[None, :]
    if CHANNELS % BLOCK_IN != 0 and OUT_CHANNELS % BLOCK_OUT != 0:
        return tl.load(at, mask=out_ok[:, None] & (channel < CHANNELS)[None, :], other=0.0)
    elif CHANNELS % BLOCK_IN != 0:
        return tl.load(at, mask=(channel < CHANNELS)[None, :], other=0.0)
    elif OUT_CHANNELS % BLOCK_OUT != 0:
        return tl.load(at, mask=out_ok[:, None], other=0.0)
    else:
        return tl.load(at)
