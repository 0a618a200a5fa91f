"""Triton 3.6's interpreter in less than half the time, and with its check for integer overflows. Tests only.

As it comes, every call of one kernel function by another looks through all of triton.language for what it has to
replace; every value carries its shape as types of its own; operands of one shape are broadcast to it all the same; and
every sum, difference and product of integers is computed a second time, in 64 bits, and compared with what 32 can hold,
for an assertion that is off. Here what was worked out is remembered, and the overflow is asserted, in NumPy.
"""

import functools
import math

import numpy as np
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def install() -> None:
    """Patch the interpreter of this process; a second call changes nothing."""
    if hasattr(interpreter, "faster_installed"):
        return
    interpreter.faster_installed = True
    modules = set()  # whose functions' view of triton.language is replaced, in this launch
    interpreter._patch_lang = _once_a_launch(interpreter._patch_lang, modules)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__, modules)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = _assert_that_it_fits
    core.block_type.__init__ = _block_init
    core.tensor.__init__ = _tensor_init
    core.block_type.__eq__ = _are_alike
    TritonSemantic.broadcast_impl_value = _where_shapes_differ(TritonSemantic.broadcast_impl_value)


def _once_a_launch(original, modules: set):
    """What a launch replaces it puts back at its end, and not before."""

    def _patch_lang(fn):
        if id(fn.__globals__) in modules:
            return interpreter._LangPatchScope()
        modules.add(id(fn.__globals__))
        return original(fn)

    return _patch_lang


def _launch(original, modules: set):
    def __call__(self, *args, **kwargs):
        modules.clear()
        return original(self, *args, **kwargs)

    return __call__


def _assert_that_it_fits(self, lhs, rhs, binary_op):
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    values = _OPERATIONS[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    fits = integer.get_int_min_value() <= values.min() and values.max() <= integer.get_int_max_value()
    assert fits, f"int{integer.int_bitwidth} overflow detected for operation {binary_op.__name__}"


def _block_init(self, element_ty, shape):
    self.shape, self.numel, text = _block_of(tuple(getattr(size, "value", size) for size in shape))
    self.element_ty, self.name = element_ty, f"<{text}, {element_ty}>"


@functools.cache
def _block_of(shape: tuple[int, ...]):
    if not shape:
        raise TypeError("0d block_type is forbidden")
    sizes = core.tuple(list(shape))
    return sizes, core.validate_block_shape(sizes), str(sizes)


def _tensor_init(self, handle, type):
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _constants_of(tuple(type.shape.values) if type.is_block() else ())


@functools.cache
def _constants_of(shape: tuple[int, ...]):
    return core.constexpr(math.prod(shape)), core.tuple(list(map(core.constexpr, shape)))


def _are_alike(self, other):
    return isinstance(other, core.block_type) and (
        self.element_ty == other.element_ty and self.shape.values == other.shape.values
    )


def _where_shapes_differ(original):
    def broadcast_impl_value(self, lhs, rhs):
        blocks = lhs.type.is_block() and rhs.type.is_block()
        return (lhs, rhs) if blocks and lhs.type.shape.values == rhs.type.shape.values else original(self, lhs, rhs)

    return broadcast_impl_value


def _by_name(original):
    """`original`, called once for every type."""
    known = {}

    def call(tt_dtype):
        if tt_dtype.name not in known:
            known[tt_dtype.name] = original(tt_dtype)
        return known[tt_dtype.name]

    return call
