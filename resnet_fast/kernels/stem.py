"""max_pool(relu(bn(conv2d(x)))): a ResNet's stem, 7x7 stride 2 and pooling 3x3 stride 2, in one kernel.

The convolution's output, 1.6 MB an image written and read again, never reaches memory: a program computes the tile of
it that its pooled pixels need, borders included, and takes the shifted maxima through shared memory (tl.gather).

With stride 2 and an even width the window of every output starts at an even column, once one column of zero weights is
put before it. So columns are taken two at a time: loads are 4 bytes wide and one bounds check serves two pixels. A NaN
or Inf in that column, one to the left of the window, reaches the output: zero times NaN is NaN.
"""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu


@triton.jit(do_not_specialize=("height", "width", "conv_height", "conv_width", "pool_height", "pool_width"))
def stem(
    x_ptr,  # (N, H, W, C), W even
    weight_ptr,  # (K, TERMS_PADDED): (R, PAIRS, 2 * C) flattened, zeros before and behind: backends.triton.pack_stem
    y_ptr,  # (N, pooled height, pooled width, K)
    norm,
    height,
    width,
    conv_height,
    conv_width,
    pool_height,
    pool_width,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    PAD: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    # A program owns the (TILE_H // 2 - 1) x (TILE_W // 2 - 1) pooled pixels whose 3x3 windows lie in TILE_H x TILE_W
    # convolution outputs, times BLOCK_OUT channels.
    POOL_H: tl.constexpr = TILE_H // 2
    POOL_W: tl.constexpr = TILE_W // 2
    TILE: tl.constexpr = TILE_H * TILE_W
    TERMS: tl.constexpr = R * PAIRS * 2 * CHANNELS
    TERMS_PADDED: tl.constexpr = (TERMS + BLOCK_IN - 1) // BLOCK_IN * BLOCK_IN
    tiles_out: tl.constexpr = (OUT_CHANNELS + BLOCK_OUT - 1) // BLOCK_OUT
    tiles_w = tl.cdiv(pool_width, POOL_W - 1)
    tiles_h = tl.cdiv(pool_height, POOL_H - 1)
    program = tl.program_id(0)
    first_out = program % tiles_out * BLOCK_OUT
    tile = program // tiles_out
    pool_w = tile % tiles_w * (POOL_W - 1)
    pool_h = tile // tiles_w % tiles_h * (POOL_H - 1)
    image = (tile // (tiles_w * tiles_h)).to(tl.int64)

    pixel = tl.arange(0, TILE)
    row = pool_h * 2 - 1 + pixel // TILE_W
    column = pool_w * 2 - 1 + pixel % TILE_W
    out = first_out + tl.arange(0, BLOCK_OUT)
    out_ok = out < OUT_CHANNELS
    top = row * 2 - PAD
    pair = column - (PAD + 1) // 2
    pairs_width = width // 2
    origin = tl.multiple_of((top * pairs_width + pair) * (2 * CHANNELS), 2)
    image_ptr = x_ptr + image * height * width * CHANNELS

    # (row, pair of columns, channel) flattened is the sum's index: a block of channels per tap would be mostly padding.
    acc = tl.zeros((TILE, BLOCK_OUT), tl.float32)
    for step in range(TERMS_PADDED // BLOCK_IN):
        term = step * BLOCK_IN + tl.arange(0, BLOCK_IN)
        tap = term // (2 * CHANNELS)
        down = tap // PAIRS
        right = tap % PAIRS
        jump = (down * pairs_width + right) * (2 * CHANNELS) + term % (2 * CHANNELS)
        # Compared as unsigned numbers, the negative ones are too large as well. Terms past the end meet zero weights,
        # but what lies there may be NaN.
        row_ok = (top[:, None] + down[None, :]).to(tl.uint32, bitcast=True) < height.to(tl.uint32, bitcast=True)
        pair_ok = (pair[:, None] + right[None, :]).to(tl.uint32, bitcast=True) < pairs_width.to(tl.uint32, bitcast=True)
        a = tl.load(
            image_ptr + (origin[:, None] + jump[None, :]), mask=row_ok & pair_ok & (term < TERMS)[None, :], other=0.0
        )
        b = tl.load(weight_ptr + out[None, :] * TERMS_PADDED + term[:, None], mask=out_ok[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    conv = relu(batch_norm(acc, out, out_ok, norm, 1))
    # Pooling pads with -inf; after ReLU zero does as well, because every window holds at least one real output.
    conv_ok = (row >= 0) & (row < conv_height) & (column >= 0) & (column < conv_width)
    conv = tl.where(conv_ok[:, None], conv, 0.0).to(y_ptr.dtype.element_ty)

    # Columns, then rows: out of each tile row POOL_W windows, then POOL_H rows of those. The last window of either kind
    # reaches past the tile: its index only has to stay inside, and it is not stored.
    narrow = tl.arange(0, TILE_H * POOL_W)
    best = _shifted_max(conv, narrow // POOL_W * TILE_W + narrow % POOL_W * 2, 1, TILE, TILE_H * POOL_W, BLOCK_OUT)
    pooled = tl.arange(0, POOL_H * POOL_W)
    local_h = pooled // POOL_W
    local_w = pooled % POOL_W
    best = _shifted_max(best, local_h * 2 * POOL_W + local_w, POOL_W, TILE_H * POOL_W, POOL_H * POOL_W, BLOCK_OUT)
    ok = (local_h < POOL_H - 1) & (local_w < POOL_W - 1)
    ok &= (pool_h + local_h < pool_height) & (pool_w + local_w < pool_width)
    at_pixel = (image * pool_height + pool_h + local_h) * pool_width + pool_w + local_w
    tl.store(y_ptr + at_pixel[:, None] * OUT_CHANNELS + out[None, :], best, mask=ok[:, None] & out_ok[None, :])


@triton.jit
def _shifted_max(
    values, first, STEP: tl.constexpr, SIZE: tl.constexpr, WINDOWS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """For each window the maximum of values[first], values[first + STEP], values[first + 2 * STEP]; NaN wins."""
    best = tl.gather(values, tl.broadcast_to(first[:, None], (WINDOWS, CHANNELS)), 0)
    for shift in tl.static_range(1, 3):
        at = tl.minimum(first + shift * STEP, SIZE - 1)
        other = tl.gather(values, tl.broadcast_to(at[:, None], (WINDOWS, CHANNELS)), 0)
        best = tl.maximum(best, other, propagate_nan=tl.PropagateNan.ALL)
    return best
