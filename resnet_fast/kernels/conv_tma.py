"""act(bn(conv2d(x)) + residual), or + bn(conv1x1(shortcut)): implicit GEMM fed by the tensor memory accelerator.

For sm_90 and newer. The accumulator is channel-major, acc[channel, pixel] = weight @ x^T: a box of NHWC pixels then
goes from memory to wgmma's B operand untouched, and K R S C weights are its A operand as they lie. Coordinates outside
the image read as zero, which is the convolution's padding.

x is described with its rows and columns split by the stride, (N, H / STRIDE, STRIDE, W / STRIDE, STRIDE * C): every tap
of a strided convolution is then a dense box too. A strided 1x1 needs no split: its x is a strided view with STRIDE 1.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu
from .statistics import store_statistics


@triton.jit(do_not_specialize=("batch", "out_height", "out_width"))
def conv_bn_act_tma(
    x,  # descriptor as above, box (BOX_N, BOX_H, 1, BOX_W, BLOCK_IN)
    weight,  # descriptor (K, R * S * GROUP_IN), box (BLOCK_OUT, BLOCK_IN)
    y,  # descriptor (N, P, Q, K), box (BOX_N, BOX_H, BOX_W, BLOCK_OUT)
    residual,  # as y, or None
    residual_norm,  # nothing in it in inference
    norm,
    shortcut,  # descriptor (N, P, Q, SHORTCUT_IN) of the strided view, or None
    shortcut_weight,  # descriptor (K, SHORTCUT_IN)
    shortcut_norm,
    statistics,  # of y, a row per box: three pointers, or three None
    batch,
    out_height,
    out_width,
    OUT_CHANNELS: tl.constexpr,
    IN_CHANNELS: tl.constexpr,
    GROUP_IN: tl.constexpr,
    GROUP_OUT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SHORTCUT_IN: tl.constexpr,
    RELU: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,  # boxes cover the output and nothing else
):
    # A program owns a box of output pixels times BLOCK_OUT output channels. Neighbouring programs share the box.
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    tiles_out: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    boxes_w = tl.cdiv(out_width, BOX_W)
    boxes_h = tl.cdiv(out_height, BOX_H)
    program = tl.program_id(0)
    first_out = program % tiles_out * BLOCK_OUT
    box = program // tiles_out
    w = box % boxes_w * BOX_W
    h = box // boxes_w % boxes_h * BOX_H
    n = box // (boxes_w * boxes_h) * BOX_N
    first_in = first_out // GROUP_OUT * GROUP_IN

    blocks: tl.constexpr = (GROUP_IN + BLOCK_IN - 1) // BLOCK_IN
    acc = tl.zeros((BLOCK_OUT, PIXELS), tl.float32)
    for step in range(R * S * blocks):
        tap = step // blocks
        channel = step % blocks * BLOCK_IN
        pixels = load_tap(
            x, n, h, w, tap // S * DILATION_H - PAD_H, tap % S * DILATION_W - PAD_W, first_in + channel,
            STRIDE, IN_CHANNELS, PIXELS, BLOCK_IN,
        )  # fmt: skip
        acc = tl.dot(weight.load([first_out, step * BLOCK_IN]), pixels.T, acc, input_precision="ieee")

    out = first_out + tl.arange(0, BLOCK_OUT)
    out_ok = out < OUT_CHANNELS
    if shortcut is not None:
        if norm[1] is None:  # both folded: the shortcut is more terms of the same sum
            acc = _shortcut(acc, shortcut, shortcut_weight, n, h, w, first_out, SHORTCUT_IN, PIXELS, BLOCK_IN)
            acc = batch_norm(acc, out, out_ok, norm, 0)
            acc = batch_norm(acc, out, out_ok, shortcut_norm, 0)
        else:
            acc = batch_norm(acc, out, out_ok, norm, 0)
            other = tl.zeros((BLOCK_OUT, PIXELS), tl.float32)
            other = _shortcut(other, shortcut, shortcut_weight, n, h, w, first_out, SHORTCUT_IN, PIXELS, BLOCK_IN)
            acc += batch_norm(other, out, out_ok, shortcut_norm, 0)
    else:
        acc = batch_norm(acc, out, out_ok, norm, 0)
    if residual is not None:
        added = residual.load([n, h, w, first_out]).reshape(PIXELS, BLOCK_OUT).T.to(tl.float32)
        acc += batch_norm(added, out, out_ok, residual_norm, 0)
    if RELU:
        acc = relu(acc)
    value = acc.to(y.dtype)
    if statistics[0] is not None:
        pixel = tl.arange(0, PIXELS)
        rows_ok = (n + pixel // (BOX_H * BOX_W) < batch) & (h + pixel // BOX_W % BOX_H < out_height)
        pixel_ok = rows_ok & (w + pixel % BOX_W < out_width)
        store_statistics(value, pixel_ok, out, out_ok, statistics, box, OUT_CHANNELS, 0, EVEN)
    y.store([n, h, w, first_out], value.T.reshape(BOX_N, BOX_H, BOX_W, BLOCK_OUT))


@triton.jit
def load_tap(
    x, n, h, w, down, right, channel,
    STRIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """(PIXELS, BLOCK_IN): what the outputs of the box at (n, h, w) see at offset (down, right) from STRIDE * (h, w)."""
    HALVE: tl.constexpr = STRIDE - 1  # strides are 1 and 2; the shift rounds down, where // would round to zero
    return x.load(
        [n, h + (down >> HALVE), down & HALVE, w + (right >> HALVE), (right & HALVE) * CHANNELS + channel]
    ).reshape(PIXELS, BLOCK_IN)


@triton.jit
def _shortcut(
    acc, x, weight, n, h, w, first_out,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    for step in range((CHANNELS + BLOCK_IN - 1) // BLOCK_IN):
        pixels = x.load([n, h, w, step * BLOCK_IN]).reshape(PIXELS, BLOCK_IN)
        acc = tl.dot(weight.load([first_out, step * BLOCK_IN]), pixels.T, acc, input_precision="ieee")
    return acc
