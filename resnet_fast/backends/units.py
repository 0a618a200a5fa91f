"""What multiplies in the extension's own convolutions on this CPU: AMX's tiles, AVX-512's dot products, or vectors."""

import torch

from .. import extension, twin

TILE_DTYPES = (torch.float32, torch.bfloat16)
"""Of the convolutions that a CPU with AMX computes itself."""

_MOST_THREADS = 8  # of dot products: oneDNN is so near that what is not measured is left to it


def why_no_vectors() -> str | None:
    """Why the extension's float32 convolutions cannot run on this CPU; None where they can."""
    reason = extension.available()
    if reason is None and not extension.load().has_vectors():
        return "its convolutions in float32 need AVX2 or AVX-512, and PyTorch to use them (ATEN_CPU_CAPABILITY)"
    return reason


def unit(dtype: torch.dtype) -> str:
    """What multiplies in the extension's own convolutions of this dtype on this CPU, as its ops take it: "tiles", which
    are AMX's, "dots", which are AVX-512's products of bfloat16, or "" where oneDNN does."""
    return "" if why_no_unit(dtype) else "tiles" if has_tiles() else "dots"


def why_no_unit(dtype: torch.dtype) -> str | None:
    """Why there is no `unit`; None where there is."""
    if dtype not in TILE_DTYPES:
        return f"{dtype} is neither bfloat16 nor float32"
    reason = extension.available()
    if reason is not None or has_tiles():
        return reason
    reason = "this CPU, system or build has no AMX with bfloat16"
    if dtype != torch.bfloat16:
        return reason
    if not has_dots():
        return f"{reason}, nor its products in AVX-512"
    if torch.get_num_threads() > _MOST_THREADS:
        return f"of dot products with more than {_MOST_THREADS} threads nothing is measured"
    return "this CPU multiplies bfloat16 slower than float32" if twin.bfloat16_is_slow() else None


def unit_name() -> str:
    """The `unit`, where there is one, for reports: AMX, or what the tests have put in its place, or AVX-512."""
    if not has_tiles():
        return "AVX-512 bfloat16"
    return next(name for name in extension.build_info()["capabilities"] if "AMX" in name)


def has_tiles() -> bool:
    """Whether this CPU and system, and this build, have AMX's tiles of bfloat16."""
    return extension.load() is not None and extension.load().amx_usable()


def has_dots() -> bool:
    """Whether they have AVX-512's dot products of bfloat16."""
    return extension.load() is not None and extension.load().dots_usable()
