"""The data gradient of a 1x1 convolution in the Gram form: dz @ dz_matrix + (act(x) - mean) @ x_matrix + constant.

Two runs of terms into one accumulator, acc[channel, pixel], whose second operand is the activations: of the second run
they are transformed as they are read. sm_80 and newer.
"""

import triton
import triton.language as tl

from .conv_prologue import load_activated, load_matrix


@triton.jit(do_not_specialize=("pixels",))
def gram_dgrad(
    dz_ptr,  # (pixels, K)
    x_ptr,  # (pixels, C)
    x_norm,  # nothing in it where x is the activation
    dz_matrix_ptr,  # (C, K)
    x_matrix_ptr,  # (C, C): rows are dx's channels
    mean_ptr,  # (C,)
    constant_ptr,  # (C,)
    add_ptr,  # (pixels, C) or None
    dx_ptr,  # (pixels, C)
    pixels,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    # A program owns BLOCK_PIXELS pixels times BLOCK_OUT channels of dx. Neighbouring programs share pixels.
    tiles_out: tl.constexpr = (CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    program = tl.program_id(0)
    pixel = (program // tiles_out).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    pixel_ok = pixel < pixels
    out = program % tiles_out * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    out_ok = out < CHANNELS

    acc = tl.zeros((BLOCK_OUT, BLOCK_PIXELS), tl.float32)
    for step in range((OUT_CHANNELS + BLOCK_IN - 1) // BLOCK_IN):
        channel = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        ok = pixel_ok[:, None]
        if OUT_CHANNELS % BLOCK_IN != 0:
            ok &= (channel < OUT_CHANNELS)[None, :]
        dz = tl.load(dz_ptr + pixel[:, None] * OUT_CHANNELS + channel[None, :], mask=ok, other=0.0)
        matrix = load_matrix(dz_matrix_ptr, out, out_ok, step * BLOCK_IN, OUT_CHANNELS, CHANNELS, BLOCK_OUT, BLOCK_IN)
        acc = tl.dot(matrix, dz.T, acc, input_precision="ieee")
    for step in range((CHANNELS + BLOCK_IN - 1) // BLOCK_IN):
        channel = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        activated = load_activated(x_ptr, x_norm, pixel, pixel_ok, channel, CHANNELS, CHANNELS % BLOCK_IN != 0)
        mean = tl.load(mean_ptr + channel, mask=channel < CHANNELS, other=0.0)
        centred = (activated - mean[None, :]).to(x_ptr.dtype.element_ty)
        matrix = load_matrix(x_matrix_ptr, out, out_ok, step * BLOCK_IN, CHANNELS, CHANNELS, BLOCK_OUT, BLOCK_IN)
        acc = tl.dot(matrix, centred.T, acc, input_precision="ieee")

    acc += tl.load(constant_ptr + out, mask=out_ok, other=0.0)[:, None]
    offset = pixel[None, :] * CHANNELS + out[:, None]
    ok = pixel_ok[None, :] & out_ok[:, None]
    if add_ptr is not None:
        acc += tl.load(add_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(dx_ptr + offset, acc.to(dx_ptr.dtype.element_ty), mask=ok)
