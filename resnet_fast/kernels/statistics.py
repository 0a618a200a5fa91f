"""The first stage of a convolution's batch statistics, in its epilogue: mean and M2 of each tile, one row a tile.

M2 is the sum of squared deviations from the tile's own mean, so that nothing cancels; rows are merged in a fixed order
by a second kernel, without atomics: the same bits every time.
"""

import triton
import triton.language as tl


@triton.jit
def store_statistics(
    value, pixel_ok, channel, channel_ok, statistics, row,
    CHANNELS: tl.constexpr, AXIS: tl.constexpr, EVEN: tl.constexpr = False,
):  # fmt: skip
    """Of the 2-D value, rounded as it is stored, channels along AXIS: what its pixels in range contribute.

    statistics: pointers to means (rows, CHANNELS), M2 (rows, CHANNELS) and counts of values (rows,), all float32.
    EVEN: all pixels are in range; telling would take longer than the sums.
    """
    mean_ptr, m2_ptr, count_ptr = statistics
    wide = value.to(tl.float32)
    if EVEN:
        count = value.shape[1 - AXIS]
        mean = tl.sum(wide, 1 - AXIS) / count
        deviation = wide - tl.expand_dims(mean, 1 - AXIS)
    else:
        ok = tl.expand_dims(pixel_ok, AXIS)
        count = tl.sum(pixel_ok.to(tl.float32), 0)
        mean = tl.sum(tl.where(ok, wide, 0.0), 1 - AXIS) / count
        deviation = tl.where(ok, wide - tl.expand_dims(mean, 1 - AXIS), 0.0)
    at = row.to(tl.int64) * CHANNELS + channel
    tl.store(mean_ptr + at, mean, mask=channel_ok)
    tl.store(m2_ptr + at, tl.sum(deviation * deviation, 1 - AXIS), mask=channel_ok)
    tl.store(count_ptr + row + 0 * channel, tl.where(channel == 0, count, 0.0), mask=channel == 0)
