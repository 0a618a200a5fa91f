"""The one comparison: what "the same numbers as PyTorch" means. All tolerances live here.

Something is right when both hold, against a float64 reference of the same arithmetic on the same inputs:
1. its error is that of PyTorch in the same dtype: rmse(ours) <= K * rmse(PyTorch) + floor;
2. no single element is far off: |ours - reference| <= atol + rtol * |reference| + K * max |PyTorch - reference|, with
   `torch.testing.assert_close`'s tolerances. A wrong element among millions escapes the first test, not this one.
NaN and Inf stand exactly where PyTorch or the reference has them. Shape, dtype and memory format are PyTorch's.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

K = {torch.float64: 2.0, torch.float32: 2.0, torch.bfloat16: 3.0, torch.float16: 3.0}
"""How many times PyTorch's own error is allowed, by the dtype of the arithmetic."""

K_WHOLE_GRADIENT = 4.0
"""The same for the whole gradient of a network: a few ReLUs that rounding flips set its error, ours and PyTorch's."""

FLOOR = {torch.float64: 512.0, torch.float32: 0.25, torch.bfloat16: 0.25, torch.float16: 0.25}
"""The error always allowed, in units of eps * scale: that of rounding an exact result once. In float64 the reference is
no better than what it judges, so there it covers another order of summation (190 measured, at mean / std = 100)."""

ELEMENT = {  # rtol, atol
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
}
"""torch.testing.assert_close's defaults."""


@dataclass(frozen=True)
class Comparison:
    """One tensor judged. `ratio` is rmse(ours) / (K * rmse(PyTorch) + floor), so above 1 is a mismatch."""

    name: str
    match: bool
    ratio: float
    error: float
    stock_error: float
    reason: str = ""

    def __str__(self) -> str:
        verdict = "matches" if self.match else f"MISMATCH ({self.reason})"
        return f"{self.name}: {verdict}, rmse {self.error:.3g} beside PyTorch's {self.stock_error:.3g}"


def rmse(actual: Tensor, reference: Tensor) -> float:
    """Root of the mean squared difference, computed in float64; 0 for empty tensors."""
    difference = actual.double() - reference.double()
    return difference.square().mean().sqrt().item() if difference.numel() else 0.0


def compare(
    name: str,
    actual: Tensor,
    stock: Tensor,
    reference: Tensor,
    *,
    compute_dtype: torch.dtype | None = None,
    terms: float | None = None,
    k: float | None = None,
) -> Comparison:
    """Judge `actual` by the two layers above.

    Args:
        actual, stock: ours and PyTorch's result, computed in the same dtype. reference: the float64 result.
        compute_dtype: the dtype of the arithmetic where the tensor's own is wider, as parameter gradients and running
            statistics under autocast; it sets K and the element tolerances. The floor is the tensor's own rounding.
        terms: for a tensor of sums that may cancel (gradients of weight and bias), the root of the sum of the squared
            terms. Each partial sum of that size is rounded, so it, not what is left in the end, sets the floor.
        k: K_WHOLE_GRADIENT, or None for K.
    """
    reason = _why_not_alike(actual, stock)
    if reason is not None:
        return Comparison(name, False, math.inf, math.inf, math.nan, reason)
    compute_dtype = compute_dtype or actual.dtype
    actual, stock, floor_dtype = actual.detach().double(), stock.detach().double(), actual.dtype
    reference = reference.detach().double()
    reason = _why_not_finite_alike(actual, stock, reference)
    if reason is not None:
        return Comparison(name, False, math.inf, math.inf, math.nan, reason)
    finite = actual.isfinite() & stock.isfinite() & reference.isfinite()
    if not finite.all():
        actual, stock, reference = actual[finite], stock[finite], reference[finite]
    if actual.numel() == 0:
        return Comparison(name, True, 0.0, 0.0, 0.0)

    k, (rtol, atol) = k or K[compute_dtype], ELEMENT[compute_dtype]
    error, stock_error = rmse(actual, reference), rmse(stock, reference)
    size = reference.square().mean().sqrt().item()
    floor = FLOOR[floor_dtype] * torch.finfo(floor_dtype).eps * size
    if terms is not None:
        floor = max(1.0, FLOOR[floor_dtype]) * torch.finfo(floor_dtype).eps * max(size, terms)
    allowed = k * stock_error + floor
    ratio = error / allowed if allowed > 0 else (0.0 if error == 0 else math.inf)
    if ratio > 1:
        reason = f"rmse {error:.3g}, allowed {allowed:.3g} = {k:g} * PyTorch's {stock_error:.3g} + floor {floor:.3g}"
        return Comparison(name, False, ratio, error, stock_error, reason)

    difference = (actual - reference).abs()
    excess = difference - (atol + rtol * reference.abs() + k * (stock - reference).abs().max())
    worst = int(excess.argmax())
    if excess.flatten()[worst] > 0:
        reason = (
            f"{int((excess > 0).sum())} of {excess.numel()} elements far off, the worst {actual.flatten()[worst]:.6g} "
            f"where the reference is {reference.flatten()[worst]:.6g}"
        )
        return Comparison(name, False, ratio, error, stock_error, reason)
    return Comparison(name, True, ratio, error, stock_error)


def compare_all(
    actual: Mapping[str, Tensor],
    stock: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    *,
    compute_dtype: torch.dtype | None = None,
    terms: Mapping[str, float] | None = None,
) -> list[Comparison]:
    """`compare` by name. A name that one side lacks is a mismatch."""
    results = []
    for name in dict.fromkeys([*stock, *actual]):
        if name in actual and name in stock:
            summed = None if terms is None else terms.get(name)
            results.append(
                compare(name, actual[name], stock[name], reference[name], compute_dtype=compute_dtype, terms=summed)
            )
        else:
            reason = "PyTorch has it, ours is missing" if name in stock else "ours has it, PyTorch does not"
            results.append(Comparison(name, False, math.inf, math.inf, math.nan, reason))
    return results


def worst(comparisons: Iterable[Comparison]) -> Comparison:
    """The comparison to report for a group: a mismatch before a match, then the highest ratio.

    Raises:
        ValueError: nothing was compared.
    """
    return max(comparisons, key=lambda comparison: (not comparison.match, comparison.ratio))


def assert_match(comparisons: Comparison | Iterable[Comparison]) -> None:
    """Raise AssertionError, naming every mismatch. Nothing compared is an error too."""
    comparisons = [comparisons] if isinstance(comparisons, Comparison) else list(comparisons)
    if not comparisons:
        raise AssertionError("nothing was compared")
    wrong = [str(comparison) for comparison in comparisons if not comparison.match]
    if wrong:
        raise AssertionError("\n".join(wrong))


def _why_not_alike(actual: Tensor, stock: Tensor) -> str | None:
    if actual.shape != stock.shape:
        return f"shape {tuple(actual.shape)}, PyTorch's is {tuple(stock.shape)}"
    if actual.dtype != stock.dtype:
        return f"dtype {actual.dtype}, PyTorch's is {stock.dtype}"
    if actual.dim() == 4:
        ours, theirs = (torch._prims_common.suggest_memory_format(tensor) for tensor in (actual, stock))
        if ours != theirs and not actual.is_contiguous(memory_format=theirs):
            return f"memory format {ours}, PyTorch's is {theirs}"
    return None


def _why_not_finite_alike(actual: Tensor, stock: Tensor, reference: Tensor) -> str | None:
    """Non-finite values pass only where PyTorch has them; where the reference has them they must be there."""
    for word, test in (("NaN", torch.isnan), ("Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        ours = test(actual)
        extra = ours & ~test(stock) & ~test(reference)
        missing = test(reference) & test(stock) & ~ours
        if extra.any():
            return f"{int(extra.sum())} {word} where PyTorch has none"
        if missing.any():
            return f"{int(missing.sum())} {word} of PyTorch's missing"
    return None
