"""A ResNet's stem, max_pool(relu(conv(x))), as three launches: this packing, `conv_tma`, `max_pool`.

The image is copied once into rows of pixels of CHANNELS channels with the convolution's zeros around them. Then what an
output pixel sees of a row is one run of WINDOW pixels, 32 numbers, that begins 2 pixels after its neighbour's: seen as
an image whose pixels are such runs, and overlap, the convolution has one column of taps, no padding, and 32 channels,
which is what descriptors and tensor cores are made for.

Weights are zero for the columns that a window has beyond the kernel's: a NaN or Inf in one of the WINDOW - S columns to
the right of an output's own reaches it too, because zero times NaN is NaN.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=(
        "image_stride", "channel_stride", "row_stride", "column_stride", "height", "width", "packed_height",
        "packed_width", "pad_height", "pad_width",
    )
)  # fmt: skip
def pack(
    x_ptr,  # (N, C, H, W) of any strides and float dtype
    packed_ptr,  # (N, packed height, packed width, 4)
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    height,
    width,
    packed_height,
    packed_width,
    pad_height,
    pad_width,
    CHANNELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
):
    # A program owns TILE_H x TILE_W packed pixels of one image.
    tiles_w = tl.cdiv(packed_width, TILE_W)
    tiles_h = tl.cdiv(packed_height, TILE_H)
    program = tl.program_id(0)
    first_column = program % tiles_w * TILE_W
    first_row = program // tiles_w % tiles_h * TILE_H
    image = (program // (tiles_w * tiles_h)).to(tl.int64)

    pixel = tl.arange(0, TILE_H * TILE_W)
    row = first_row + pixel // TILE_W - pad_height
    column = first_column + pixel % TILE_W - pad_width
    ok = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    at = x_ptr + image * image_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * column_stride
    # A thread has whole pixels, whose channels it stores together.
    first = _channel(at, ok, 0, channel_stride, CHANNELS, packed_ptr.dtype.element_ty)
    second = _channel(at, ok, 1, channel_stride, CHANNELS, packed_ptr.dtype.element_ty)
    third = _channel(at, ok, 2, channel_stride, CHANNELS, packed_ptr.dtype.element_ty)
    fourth = _channel(at, ok, 3, channel_stride, CHANNELS, packed_ptr.dtype.element_ty)
    values = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (TILE_H * TILE_W, 4))

    to_row = first_row + pixel // TILE_W
    to_column = first_column + pixel % TILE_W
    to_ok = (to_row < packed_height) & (to_column < packed_width)
    to = ((image * packed_height + to_row) * packed_width + to_column) * 4
    tl.store(packed_ptr + (to[:, None] + tl.arange(0, 4)[None, :]), values, mask=to_ok[:, None])


@triton.jit
def _channel(at, ok, CHANNEL: tl.constexpr, stride, CHANNELS: tl.constexpr, DTYPE: tl.constexpr):
    """One channel of the pixels, zero where there is none."""
    if CHANNEL < CHANNELS:
        return tl.load(at + stride * CHANNEL, mask=ok, other=0.0).to(DTYPE)
    else:
        return tl.zeros(at.shape, DTYPE)
