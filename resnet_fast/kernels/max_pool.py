"""max_pool(x, 3, stride 2, padding 1) of channels_last tensors: every number read from memory once, written once.

A window's maximum is NaN if anything in it is, as PyTorch's.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("height", "width", "pool_height", "pool_width"))
def max_pool(
    x_ptr,  # (N, H, W, C)
    y_ptr,  # (N, pooled height, pooled width, C)
    height,
    width,
    pool_height,
    pool_width,
    CHANNELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns TILE_H x TILE_W pooled pixels of one image times BLOCK_CHANNELS channels.
    tile, channel, channel_ok = tile_of(CHANNELS, BLOCK_CHANNELS)
    image, row, column = pixels_of(tile, pool_height, pool_width, TILE_H, TILE_W)
    at = x_ptr + offsets(image, row * 2 - 1, column * 2 - 1, channel, height, width, CHANNELS)
    best = tl.full((TILE_H * TILE_W, BLOCK_CHANNELS), float("-inf"), tl.float32)
    for tap in tl.static_range(9):
        ok = inside(row * 2 - 1 + tap // 3, column * 2 - 1 + tap % 3, height, width)
        jump = ((tap // 3) * width.to(tl.int64) + tap % 3) * CHANNELS
        value = tl.load(at + jump, mask=ok[:, None] & channel_ok[None, :], other=float("-inf")).to(tl.float32)
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
    ok = inside(row, column, pool_height, pool_width)
    to = y_ptr + offsets(image, row, column, channel, pool_height, pool_width, CHANNELS)
    tl.store(to, best.to(y_ptr.dtype.element_ty), mask=ok[:, None] & channel_ok[None, :])


@triton.jit
def tile_of(CHANNELS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's tile of pixels, its channels, and which of them exist."""
    tiles: tl.constexpr = (CHANNELS + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS
    program = tl.program_id(0)
    channel = program % tiles * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    return program // tiles, channel, channel < CHANNELS


@triton.jit
def pixels_of(tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The image, and the rows and columns, of a tile's pixels, of images of height x width."""
    tiles_w = tl.cdiv(width, TILE_W)
    tiles_h = tl.cdiv(height, TILE_H)
    pixel = tl.arange(0, TILE_H * TILE_W)
    column = tile % tiles_w * TILE_W + pixel % TILE_W
    row = tile // tiles_w % tiles_h * TILE_H + pixel // TILE_W
    return (tile // (tiles_w * tiles_h)).to(tl.int64), row, column


@triton.jit
def offsets(image, row, column, channel, height, width, CHANNELS: tl.constexpr):
    """Of pixels times channels in an (N, height, width, CHANNELS) tensor; pixels may lie outside."""
    pixel = (image * height + row) * width + column
    return pixel[:, None] * CHANNELS + channel[None, :]


@triton.jit
def inside(row, column, height, width):
    """Which pixels exist. Compared as unsigned numbers, the negative ones are too large as well."""
    row_ok = row.to(tl.uint32, bitcast=True) < height.to(tl.uint32, bitcast=True)
    return row_ok & (column.to(tl.uint32, bitcast=True) < width.to(tl.uint32, bitcast=True))
