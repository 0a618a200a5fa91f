"""Tensors of more than 2**31 elements: pointer kernels index them with 64 bits. In a child, since a wrong one dies."""

import pytest
from cases import named
from interpreted import huge
from interpreted.forked import PASSED, outcome


@pytest.mark.parametrize("case", **named(huge.CONVS))
def test_conv_pointer(case):
    assert outcome(lambda: huge.check_conv(case)) == PASSED


def test_stem_pack():
    assert outcome(huge.check_pack) == PASSED


def test_max_pool():
    assert outcome(huge.check_max_pool) == PASSED


def test_bn_act():
    assert outcome(huge.check_bn_act) == PASSED
