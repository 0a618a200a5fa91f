"""Triton 3.6's interpreter in less than half the time, and with its check for integer overflows. Tests only.

As it comes, every call of one kernel function by another looks through all of triton.language for what it has to
replace; every value carries its shape as types of its own; and every sum, difference and product of integers is
computed a second time, in 64 bits, and compared with what 32 can hold, for an assertion that is off. Here what was
worked out is remembered, and the overflow is asserted, in NumPy.
"""

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
    interpreter._get_np_dtype = _remembered(interpreter._get_np_dtype, lambda tt_dtype: tt_dtype.name)
    TritonSemantic.binary_op_sanitize_overflow_impl = _assert_that_it_fits
    core._type_for_tuple_values = _remembered(core._type_for_tuple_values, _constants)
    core.block_type.with_element_ty = _remembered(core.block_type.with_element_ty, _plain_types)


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


def _remembered(original, key_of):
    """`original`, called once for every key, and always where that is None."""
    known = {}

    def call(*arguments):
        if (key := key_of(*arguments)) is None:
            return original(*arguments)
        if key not in known:
            known[key] = original(*arguments)
        return known[key]

    return call


def _constants(values, fields=None):
    if fields is not None:
        return None
    key = tuple((type(value), getattr(value, "value", value)) for value in values)
    return key if all(kind in (int, core.constexpr) and type(value) is int for kind, value in key) else None


def _plain_types(block, scalar):
    return (block.name, scalar.name) if type(scalar) is core.dtype else None  # else it is a pointer
