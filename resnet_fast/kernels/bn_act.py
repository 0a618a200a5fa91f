"""act(bn(x) + residual) in one pass: the pointwise kernel behind a convolution that cuDNN computes."""

import triton
import triton.language as tl

from .epilogue import batch_norm, relu


@triton.jit
def bn_act(
    x_ptr,
    y_ptr,
    residual_ptr,  # or None
    norm,
    elements,
    CHANNELS: tl.constexpr,
    PLANE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program owns BLOCK consecutive elements, whose channel is index // PLANE % CHANNELS: PLANE is 1 for channels
    # last and H * W for contiguous tensors.
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = index < elements
    channel = (index // PLANE % CHANNELS).to(tl.int32)
    value = tl.load(x_ptr + index, mask=ok, other=0.0).to(tl.float32)[:, None]
    value = batch_norm(value, channel, ok, norm, 0)
    if residual_ptr is not None:
        value += tl.load(residual_ptr + index, mask=ok, other=0.0).to(tl.float32)[:, None]
    if RELU:
        value = relu(value)
    tl.store(y_ptr + index, tl.reshape(value, (BLOCK,)).to(y_ptr.dtype.element_ty), mask=ok)
