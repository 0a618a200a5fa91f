"""max_pool(relu(bn(x)), 3, stride 2, padding 1) in training: forward, and the two passes of its gradient.

The forward keeps where each window's maximum is, in a byte. The gradient of a pixel is then gathered: from the windows
that it lies in, four at most, those whose maximum it is, added up in one order, without atomics, in float32. So the
activated image is stored nowhere, nor is its gradient.
"""

import triton
import triton.language as tl

from .batch_norm import behind_relu, input_gradient
from .epilogue import batch_norm, relu
from .max_pool import inside, offsets, pixels_of, tile_of

_SIZES = ("height", "width", "pool_height", "pool_width")


@triton.jit(do_not_specialize=_SIZES)
def pool(
    x_ptr,  # (N, H, W, C)
    norm,
    y_ptr,  # (N, pooled height, pooled width, C)
    index_ptr,  # as y, uint8: row times 3 plus column of the maximum in its window
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
    index = tl.zeros((TILE_H * TILE_W, BLOCK_CHANNELS), tl.int32)
    for tap in tl.static_range(9):
        ok = inside(row * 2 - 1 + tap // 3, column * 2 - 1 + tap % 3, height, width)[:, None] & channel_ok[None, :]
        jump = ((tap // 3) * width.to(tl.int64) + tap % 3) * CHANNELS
        value = tl.load(at + jump, mask=ok, other=0.0).to(tl.float32)
        # Rounded as it would be stored, or the first of equals were another one.
        value = relu(batch_norm(value, channel, channel_ok, norm, 1)).to(y_ptr.dtype.element_ty).to(tl.float32)
        better = ok & ((value > best) | (value != value))
        best = tl.where(better, value, best)
        index = tl.where(better, tap, index)
    ok = inside(row, column, pool_height, pool_width)[:, None] & channel_ok[None, :]
    to = offsets(image, row, column, channel, pool_height, pool_width, CHANNELS)
    tl.store(y_ptr + to, best.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(index_ptr + to, index.to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=(*_SIZES, "tiles", "steps"))
def pool_backward_reduce(
    dy_ptr,  # (N, pooled height, pooled width, C)
    index_ptr,  # as dy, uint8
    x_ptr,  # (N, H, W, C), what the norm was applied to
    norm,
    sums_ptr,  # (slabs, 2, C): sum(dz), sum(dz * (x - mean))
    height,
    width,
    pool_height,
    pool_width,
    tiles,
    steps,
    CHANNELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns a slab of `steps` tiles times BLOCK_CHANNELS channels; a tile is TILE_H x TILE_W cells of one
    # image, and a cell is 2 x 2 pixels, of which a window has its centre in the first.
    slab, channel, channel_ok = tile_of(CHANNELS, BLOCK_CHANNELS)
    mean = tl.load(norm[1] + channel, mask=channel_ok, other=0.0).to(tl.float32)[None, :]
    sum_dz = tl.zeros((TILE_H * TILE_W, BLOCK_CHANNELS), tl.float32)
    sum_dzx = tl.zeros((TILE_H * TILE_W, BLOCK_CHANNELS), tl.float32)
    for step in range(steps):
        tile = slab * steps + step
        image, row, column = pixels_of(tile, pool_height, pool_width, TILE_H, TILE_W)
        row = tl.where(tile < tiles, row, pool_height)  # past the last tile there is no cell
        windows = _windows(
            dy_ptr, index_ptr, image, row, column, channel, channel_ok, pool_height, pool_width, CHANNELS
        )
        for pixel in tl.static_range(4):
            down, right = row * 2 + pixel // 2, column * 2 + pixel % 2
            ok = inside(down, right, height, width)[:, None] & channel_ok[None, :]
            at = offsets(image, down, right, channel, height, width, CHANNELS)
            x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
            dz = behind_relu(_gathered(windows, pixel), x, channel, channel_ok, norm, True)
            sum_dz += dz
            sum_dzx += tl.where(ok, dz * (x - mean), 0.0)
    at = slab.to(tl.int64) * (2 * CHANNELS) + channel
    tl.store(sums_ptr + at, tl.sum(sum_dz, 0), mask=channel_ok)
    tl.store(sums_ptr + at + CHANNELS, tl.sum(sum_dzx, 0), mask=channel_ok)


@triton.jit(do_not_specialize=_SIZES)
def pool_backward_apply(
    dy_ptr,  # (N, pooled height, pooled width, C)
    index_ptr,  # as dy, uint8
    x_ptr,  # (N, H, W, C)
    norm,
    mean_dz_ptr,  # (C,), or None where the statistics are fixed
    mean_dzx_ptr,  # (C,)
    dx_ptr,  # (N, H, W, C)
    height,
    width,
    pool_height,
    pool_width,
    CHANNELS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    # A program owns a tile of cells, as above, times BLOCK_CHANNELS channels.
    tile, channel, channel_ok = tile_of(CHANNELS, BLOCK_CHANNELS)
    image, row, column = pixels_of(tile, pool_height, pool_width, TILE_H, TILE_W)
    windows = _windows(dy_ptr, index_ptr, image, row, column, channel, channel_ok, pool_height, pool_width, CHANNELS)
    for pixel in tl.static_range(4):
        down, right = row * 2 + pixel // 2, column * 2 + pixel % 2
        ok = inside(down, right, height, width)[:, None] & channel_ok[None, :]
        at = offsets(image, down, right, channel, height, width, CHANNELS)
        x = tl.load(x_ptr + at, mask=ok, other=0.0).to(tl.float32)
        dz = behind_relu(_gathered(windows, pixel), x, channel, channel_ok, norm, True)
        dx = input_gradient(dz, x, channel, channel_ok, norm, mean_dz_ptr, mean_dzx_ptr)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _windows(
    dy_ptr, index_ptr, image, row, column, channel, channel_ok, height, width, CHANNELS: tl.constexpr
):  # fmt: skip
    """dy and index of the four windows that a cell's pixels lie in: its own, to the right, below, across."""
    own = _window(dy_ptr, index_ptr, image, row, column, channel, channel_ok, height, width, CHANNELS)
    right = _window(dy_ptr, index_ptr, image, row, column + 1, channel, channel_ok, height, width, CHANNELS)
    below = _window(dy_ptr, index_ptr, image, row + 1, column, channel, channel_ok, height, width, CHANNELS)
    across = _window(dy_ptr, index_ptr, image, row + 1, column + 1, channel, channel_ok, height, width, CHANNELS)
    return own, right, below, across


@triton.jit
def _window(
    dy_ptr, index_ptr, image, row, column, channel, channel_ok, height, width, CHANNELS: tl.constexpr
):  # fmt: skip
    ok = inside(row, column, height, width)[:, None] & channel_ok[None, :]
    at = offsets(image, row, column, channel, height, width, CHANNELS)
    return tl.load(dy_ptr + at, mask=ok, other=0.0), tl.load(index_ptr + at, mask=ok, other=0)


@triton.jit
def _gathered(windows, PIXEL: tl.constexpr):
    """The gradient of a cell's pixel, numbered row by row: the sum of dy over the windows whose maximum it is."""
    DOWN: tl.constexpr = PIXEL // 2
    RIGHT: tl.constexpr = PIXEL % 2
    own, right, below, across = windows
    total = _routed(own, 4 + 3 * DOWN + RIGHT)
    if RIGHT == 1:
        total += _routed(right, 3 + 3 * DOWN)
    if DOWN == 1:
        total += _routed(below, 1 + RIGHT)
    if DOWN + RIGHT == 2:
        total += _routed(across, 0)
    return total


@triton.jit
def _routed(window, TAP: tl.constexpr):
    dy, index = window
    return tl.where(index == TAP, dy.to(tl.float32), 0.0)
