"""A bottleneck's tail: 3x3 -> 1x1 + shortcut + ReLU, on to the next block's 1x1, in one kernel (inference, folded).

Everything behind the 3x3 is per pixel, so nothing is computed twice. Between the three convolutions the activations
stay in registers and shared memory; what is written is the block's output, which the next shortcut needs, and the next
block's first activation. Channel-major accumulators and x split by the stride, as in conv_tma.
"""

import triton
import triton.language as tl

from .conv_tma import load_tap
from .epilogue import relu


@triton.jit(do_not_specialize=("out_height", "out_width"))
def bottleneck_tail(
    x,  # descriptor (N, H / STRIDE, STRIDE, W / STRIDE, STRIDE * MID), box (BOX_N, BOX_H, 1, BOX_W, BLOCK_IN)
    conv2_weight,  # descriptor (MID, 9 * MID), box (MID, BLOCK_IN)
    conv2_bias_ptr,
    conv3_weight,  # descriptor (OUT, MID), box (BLOCK_OUT, MID)
    conv3_bias_ptr,
    residual,  # descriptor (N, P, Q, OUT), box (..., BLOCK_OUT), or None where there is a shortcut convolution
    shortcut,  # descriptor (N, P, Q, SHORTCUT_IN), box (..., SHORTCUT_IN), or None
    shortcut_weight,  # descriptor (OUT, SHORTCUT_IN), box (BLOCK_OUT, SHORTCUT_IN)
    shortcut_bias_ptr,
    y,  # descriptor (N, P, Q, OUT), box (..., BLOCK_OUT)
    next_weight,  # descriptor (NEXT, OUT), box (NEXT, BLOCK_OUT), or None
    next_bias_ptr,
    next_y,  # descriptor (N, P, Q, NEXT), box (..., NEXT)
    out_height,
    out_width,
    MID: tl.constexpr,
    OUT: tl.constexpr,
    NEXT: tl.constexpr,
    SHORTCUT_IN: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    # A program owns a box of pixels and all their channels.
    PIXELS: tl.constexpr = BOX_N * BOX_H * BOX_W
    boxes_w = tl.cdiv(out_width, BOX_W)
    boxes_h = tl.cdiv(out_height, BOX_H)
    program = tl.program_id(0)
    w = program % boxes_w * BOX_W
    h = program // boxes_w % boxes_h * BOX_H
    n = program // (boxes_w * boxes_h) * BOX_N

    blocks: tl.constexpr = MID // BLOCK_IN
    acc = tl.zeros((MID, PIXELS), tl.float32)
    for step in range(9 * blocks):
        tap = step // blocks
        pixels = load_tap(
            x, n, h, w, (tap // 3 - 1) * DILATION, (tap % 3 - 1) * DILATION, step % blocks * BLOCK_IN,
            STRIDE, MID, PIXELS, BLOCK_IN,
        )  # fmt: skip
        acc = tl.dot(conv2_weight.load([0, step * BLOCK_IN]), pixels.T, acc)
    mid = relu(acc + tl.load(conv2_bias_ptr + tl.arange(0, MID)).to(tl.float32)[:, None]).to(y.dtype)
    if shortcut is not None:
        block_in = shortcut.load([n, h, w, 0]).reshape(PIXELS, SHORTCUT_IN)

    if next_weight is not None:
        next_acc = tl.zeros((NEXT, PIXELS), tl.float32)
    # Not pipelined (one stage): what it would take in shared memory is worth more as a second program.
    for first in tl.range(0, OUT, BLOCK_OUT, num_stages=1):
        channel = first + tl.arange(0, BLOCK_OUT)
        out = tl.dot(conv3_weight.load([first, 0]), mid)
        out += tl.load(conv3_bias_ptr + channel).to(tl.float32)[:, None]
        if shortcut is not None:
            out = tl.dot(shortcut_weight.load([first, 0]), block_in.T, out)
            out += tl.load(shortcut_bias_ptr + channel).to(tl.float32)[:, None]
        else:
            out += residual.load([n, h, w, first]).reshape(PIXELS, BLOCK_OUT).T.to(tl.float32)
        out = relu(out).to(y.dtype).T
        y.store([n, h, w, first], out.reshape(BOX_N, BOX_H, BOX_W, BLOCK_OUT))
        if next_weight is not None:
            next_acc = tl.dot(next_weight.load([0, first]), out.T, next_acc)
    if next_weight is not None:
        next_acc = relu(next_acc + tl.load(next_bias_ptr + tl.arange(0, NEXT)).to(tl.float32)[:, None])
        next_y.store([n, h, w, 0], next_acc.to(y.dtype).T.reshape(BOX_N, BOX_H, BOX_W, NEXT))
