"""What every convolution kernel does with its float32 accumulator before the one store: bias, batch norm, ReLU."""

import triton
import triton.language as tl


@triton.jit
def batch_norm(acc, channel, in_range, norm, AXIS: tl.constexpr):
    """(acc + conv_bias - mean) * rsqrt(var + eps) * weight + bias, per channel along AXIS of the 2-D acc.

    norm: (conv_bias, mean, var, weight, bias, eps); a pointer that is None is left out, and without mean there is no
    normalisation (a folded convolution has conv_bias alone). Vectors may be of any float dtype.
    """
    conv_bias_ptr, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps = norm
    if conv_bias_ptr is not None:
        acc += _vector(conv_bias_ptr, channel, in_range, AXIS)
    if mean_ptr is not None:
        scale = tl.rsqrt(_vector(var_ptr, channel, in_range, AXIS) + eps)
        if weight_ptr is not None:
            scale *= _vector(weight_ptr, channel, in_range, AXIS)
        acc = (acc - _vector(mean_ptr, channel, in_range, AXIS)) * scale
        if bias_ptr is not None:
            acc += _vector(bias_ptr, channel, in_range, AXIS)
    return acc


@triton.jit
def relu(value):
    """max(value, 0) that keeps NaN, as torch.relu does; tl.maximum alone lowers to max.f32, which drops it."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _vector(pointer, channel, in_range, AXIS: tl.constexpr):
    values = tl.load(pointer + channel, mask=in_range, other=0.0).to(tl.float32)
    return tl.expand_dims(values, 1 - AXIS)
