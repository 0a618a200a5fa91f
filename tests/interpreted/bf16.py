"""Make Triton 3.6's interpreter right for bfloat16, which it keeps as uint16 bits. Tests only; kernels are untouched.

As it comes, tl.dot multiplies the bits as if they were numbers, arithmetic adds them, and float32 is truncated, not
rounded. Here dot, casts, binary and unary operations compute in float32 and round to nearest even; NaN stays NaN.
Reductions, clamp and constants of dtype bfloat16 are not covered: the kernels use none.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 `bits` (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bits (uint16) nearest to float32 `values`, ties to even; NaN becomes a quiet NaN of its sign."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    if getattr(InterpreterBuilder, "bf16_installed", False):
        return
    for name, wrapped in _WRAPPED.items():
        setattr(InterpreterBuilder, name, wrapped(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.bf16_installed = True


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def _float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if _is_bf16(handle.dtype) else handle


def _bfloat16(data: np.ndarray) -> TensorHandle:
    """Of what an operation gave: the truth values of a comparison stay what they are."""
    return TensorHandle(data if data.dtype == bool else narrow(data), tl.bfloat16)


def _dot(original):
    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        return original(self, _float32(a), _float32(b), acc, input_precision, max_num_imprecise_acc)

    return create_dot


def _cast(original):
    def cast_impl(self, value, dtype):
        if _is_bf16(value.dtype) and not _is_bf16(dtype):
            return TensorHandle(original(self, _float32(value), dtype).data, dtype.scalar)
        if _is_bf16(dtype) and not _is_bf16(value.dtype):
            return _bfloat16(value.data.astype(np.float32))
        return original(self, value, dtype)

    return cast_impl


def _float_to_float(original):
    def create_fp_to_fp(self, value, dtype, rounding_mode):
        if _is_bf16(value.dtype) or _is_bf16(dtype):
            return self.cast_impl(value, dtype)
        return original(self, value, dtype, rounding_mode)

    return create_fp_to_fp


def _binary(original):
    def binary_op(self, left, right, op):
        if _is_bf16(left.dtype):
            return _bfloat16(op(_float32(left).data, _float32(right).data))
        return original(self, left, right, op)

    return binary_op


def _unary(original):
    def unary_op(self, value, op):
        if _is_bf16(value.dtype):
            return _bfloat16(op(_float32(value).data))
        return original(self, value, op)

    return unary_op


_WRAPPED = {
    "create_dot": _dot,
    "cast_impl": _cast,
    "create_fp_to_fp": _float_to_float,
    "binary_op": _binary,
    "unary_op": _unary,
}
