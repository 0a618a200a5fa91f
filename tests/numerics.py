"""The one comparison. It lives in the package, because `resnet-fast verify` needs it too."""

from collections.abc import Mapping

import torch
from torch import Tensor

from resnet_fast.numerics import Comparison, assert_match, compare, compare_all

__all__ = ["Comparison", "assert_all_match", "assert_match", "assert_matches", "compare", "compare_all"]


def assert_matches(name: str, ours: Tensor, stock: Tensor, exact: Tensor) -> None:
    """Judge one tensor: `stock` is PyTorch's in the same dtype, `exact` PyTorch's in float64."""
    assert_match(compare(name, ours, stock, exact))


def assert_all_match(
    ours: Mapping[str, Tensor],
    stock: Mapping[str, Tensor],
    exact: Mapping[str, Tensor],
    compute_dtype: torch.dtype | None = None,
    terms: Mapping[str, float] | None = None,
) -> None:
    """Judge every tensor by name, as `resnet_fast.numerics.compare`.

    `compute_dtype` is that of the arithmetic, where results are wider.
    """
    assert ours.keys() == stock.keys() == exact.keys(), f"{sorted(ours)}, PyTorch's {sorted(stock)}, {sorted(exact)}"
    assert_match(compare_all(ours, stock, exact, compute_dtype=compute_dtype, terms=terms))
