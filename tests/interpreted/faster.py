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
    replaced = set()  # in this launch
    interpreter._patch_lang = _patch_once(interpreter._patch_lang, replaced)
    interpreter.GridExecutor.__call__ = _launch(interpreter.GridExecutor.__call__, replaced)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = _assert_that_it_fits
    core._type_for_tuple_values = _of_constants(core._type_for_tuple_values)
    core.block_type.with_element_ty = _of_plain_types(core.block_type.with_element_ty)


def _patch_once(original, replaced: set):
    """What a launch puts back at its end, and not before, is replaced once in it: by which modules a function sees."""

    def _patch_lang(fn):
        seen = tuple(value in fn.__globals__.values() for value in (interpreter.tl, core))
        if seen in replaced:
            return interpreter._LangPatchScope()
        scope = original(fn)
        replaced.add(seen)
        return scope

    return _patch_lang


def _launch(original, replaced: set):
    def __call__(self, *args, **kwargs):
        replaced.clear()
        try:
            return original(self, *args, **kwargs)
        finally:
            replaced.clear()

    return __call__


def _assert_that_it_fits(self, lhs, rhs, binary_op):
    integer = lhs.type.scalar
    if integer.int_bitwidth >= 64:
        return
    values = _OPERATIONS[binary_op.__name__](lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    fits = integer.get_int_min_value() <= values.min() and values.max() <= integer.get_int_max_value()
    assert fits, f"int{integer.int_bitwidth} overflow detected for operation {binary_op.__name__}"


def _by_name(original):
    known = {}

    def _get_np_dtype(tt_dtype):
        if (found := known.get(tt_dtype.name)) is None:
            found = known[tt_dtype.name] = original(tt_dtype)
        return found

    return _get_np_dtype


def _of_constants(original):
    known = {}

    def _type_for_tuple_values(values, fields=None):
        if fields is not None or not all(type(value) is core.constexpr or type(value) is int for value in values):
            return original(values, fields)
        key = tuple((type(value), value if type(value) is int else value.value) for value in values)
        try:
            found = known.get(key)
        except TypeError:  # a constant that is a list, say
            return original(values, fields)
        if found is None:
            found = known[key] = original(values, fields)
        return found

    return _type_for_tuple_values


def _of_plain_types(original):
    known = {}

    def with_element_ty(self, scalar_ty):
        if type(scalar_ty) is not core.dtype:  # a pointer
            return original(self, scalar_ty)
        key = self.name, scalar_ty.name
        if (found := known.get(key)) is None:
            found = known[key] = original(self, scalar_ty)
        return found

    return with_element_ty
