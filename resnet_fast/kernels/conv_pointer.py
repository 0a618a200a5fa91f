"""act(bn(conv2d(x)) + residual), or + bn(conv1x1(shortcut)): implicit GEMM that gathers its operand through pointers.

In training the output may be raw, with its statistics, and the residual a raw one with a norm of its own.

The portable form: sm_80 and newer, any stride, padding, dilation, groups, channel count and alignment. Activations are
NHWC, weights K R S C with the channels of one group last. Offsets are 64-bit.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu
from .statistics import store_statistics

_SIZES = ("batch", "height", "width", "out_height", "out_width", "shortcut_height", "shortcut_width")


@triton.jit(do_not_specialize=_SIZES)
def conv_bn_act_pointer(
    x_ptr,  # (N, H, W, C)
    weight_ptr,  # (K, R, S, GROUP_IN)
    y_ptr,  # (N, P, Q, K)
    residual_ptr,  # (N, P, Q, K) or None
    residual_norm,  # nothing in it in inference
    norm,
    shortcut_ptr,  # (N, shortcut_height, shortcut_width, SHORTCUT_IN) or None
    shortcut_weight_ptr,  # (K, SHORTCUT_IN)
    shortcut_norm,
    statistics,  # of y, a row per BLOCK_PIXELS pixels: three pointers, or three None
    batch,
    height,
    width,
    out_height,
    out_width,
    shortcut_height,
    shortcut_width,
    GROUPS: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SHORTCUT_IN: tl.constexpr,
    SHORTCUT_STRIDE_H: tl.constexpr,
    SHORTCUT_STRIDE_W: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr,  # from a pixel of x to its neighbour: GROUPS * GROUP_IN, or less where pixels overlap
):
    # A program owns BLOCK_PIXELS output pixels times BLOCK_OUT output channels of one group. Neighbouring programs
    # share pixels, so that x is read from memory once and found in L2 after that.
    OUT_CHANNELS: tl.constexpr = GROUPS * GROUP_OUT
    tiles_out: tl.constexpr = (GROUP_OUT + BLOCK_OUT - 1) // BLOCK_OUT
    program = tl.program_id(0)
    tile_out = program % tiles_out
    group = program // tiles_out % GROUPS
    tile = program // (tiles_out * GROUPS)
    pixel = tile.to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_ok = pixel < batch.to(tl.int64) * out_height * out_width
    column = (pixel % out_width).to(tl.int32)
    row = (pixel // out_width % out_height).to(tl.int32)
    image = pixel // out_width // out_height
    out_local = tile_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_ok = out_local < GROUP_OUT
    out = group * GROUP_OUT + out_local

    acc = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32)
    acc = _accumulate(
        acc, x_ptr + group * GROUP_IN, weight_ptr, image, row * STRIDE_H - PAD_H, column * STRIDE_W - PAD_W, pixel_ok,
        out, out_ok, height, width, PIXEL_STRIDE, GROUP_IN, GROUP_OUT % BLOCK_OUT != 0,
        R, S, DILATION_H, DILATION_W, PAD_H + PAD_W != 0, BLOCK_IN,
    )  # fmt: skip
    if shortcut_ptr is not None:
        if norm[1] is None:  # both folded: the shortcut is more terms of the same sum
            acc = _shortcut(
                acc, shortcut_ptr, shortcut_weight_ptr, image, row, column, pixel_ok, out, out_ok, shortcut_height,
                shortcut_width, SHORTCUT_IN, GROUP_OUT % BLOCK_OUT != 0, SHORTCUT_STRIDE_H, SHORTCUT_STRIDE_W,
                BLOCK_IN,
            )  # fmt: skip
            acc = batch_norm(acc, out, out_ok, norm, 1)
            acc = batch_norm(acc, out, out_ok, shortcut_norm, 1)
        else:
            acc = batch_norm(acc, out, out_ok, norm, 1)
            other = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), tl.float32)
            other = _shortcut(
                other, shortcut_ptr, shortcut_weight_ptr, image, row, column, pixel_ok, out, out_ok, shortcut_height,
                shortcut_width, SHORTCUT_IN, GROUP_OUT % BLOCK_OUT != 0, SHORTCUT_STRIDE_H, SHORTCUT_STRIDE_W,
                BLOCK_IN,
            )  # fmt: skip
            acc += batch_norm(other, out, out_ok, shortcut_norm, 1)
    else:
        acc = batch_norm(acc, out, out_ok, norm, 1)
    offset = pixel[:, None] * OUT_CHANNELS + out[None, :]
    ok = pixel_ok[:, None] & out_ok[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        acc += batch_norm(residual, out, out_ok, residual_norm, 1)
    if RELU:
        acc = relu(acc)
    value = acc.to(y_ptr.dtype.element_ty)
    if statistics[0] is not None:
        store_statistics(value, pixel_ok, out, out_ok, statistics, tile, OUT_CHANNELS, 1)
    tl.store(y_ptr + offset, value, mask=ok)


@triton.jit
def _shortcut(
    acc, x_ptr, weight_ptr, image, row, column, pixel_ok, out, out_ok, height, width,
    CHANNELS: tl.constexpr, MASK_OUT: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    return _accumulate(
        acc, x_ptr, weight_ptr, image, row * STRIDE_H, column * STRIDE_W, pixel_ok, out, out_ok, height, width,
        CHANNELS, CHANNELS, MASK_OUT, 1, 1, 1, 1, False, BLOCK_IN,
    )  # fmt: skip


@triton.jit
def _accumulate(
    acc, x_ptr, weight_ptr, image, top, left, pixel_ok, out, out_ok, height, width,
    PIXEL_STRIDE: tl.constexpr, CHANNELS: tl.constexpr, MASK_OUT: tl.constexpr, R: tl.constexpr, S: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):  # fmt: skip
    # One flat loop over taps and channel blocks: a nested one stops prefetching at the end of each tap. Its trip count
    # is a constant, or ptxas serialises wgmma.
    blocks: tl.constexpr = (CHANNELS + BLOCK_IN - 1) // BLOCK_IN
    MASK_IN: tl.constexpr = CHANNELS % BLOCK_IN != 0
    origin = x_ptr + ((image * height + top) * width + left) * PIXEL_STRIDE
    weight_row = weight_ptr + out.to(tl.int64) * (R * S * CHANNELS)
    for step in range(R * S * blocks):
        tap = step // blocks
        channel = step % blocks * BLOCK_IN + tl.arange(0, BLOCK_IN)
        down = tap // S * DILATION_H
        right = tap % S * DILATION_W
        x_ok = pixel_ok
        if PADDED:
            x_ok &= (top + down >= 0) & (top + down < height) & (left + right >= 0) & (left + right < width)
        x_mask = x_ok[:, None]
        if MASK_IN:
            x_mask &= (channel < CHANNELS)[None, :]
        jump = (down * width + right).to(tl.int64) * PIXEL_STRIDE
        a = tl.load(origin[:, None] + jump + channel[None, :], mask=x_mask, other=0.0)
        weight_at = weight_row[None, :] + tap * CHANNELS + channel[:, None]
        if MASK_IN and MASK_OUT:
            b = tl.load(weight_at, mask=(channel < CHANNELS)[:, None] & out_ok[None, :], other=0.0)
        elif MASK_IN:
            b = tl.load(weight_at, mask=(channel < CHANNELS)[:, None], other=0.0)
        elif MASK_OUT:
            b = tl.load(weight_at, mask=out_ok[None, :], other=0.0)
        else:
            b = tl.load(weight_at)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
