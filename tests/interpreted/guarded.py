"""Tensors that end, or begin, at an unreadable page: a kernel that reads or writes past one dies of a signal.

Triton's interpreter reads and writes wherever a pointer points and says nothing; only the operating system notices.
"""

import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

SIDES = ("end", "start")
"""At which side of every tensor the page is."""

_NAN_BYTE = 0xFF  # float16, bfloat16 and float32 made of it are NaN
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Fence:
    """Where the tensors of one launch lie. What surrounds them on their own pages is NaN, and `check` looks at it."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._around: list[Tensor] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []

    def put(self, values: Tensor | None) -> Tensor | None:
        """A copy of dense `values`, with their strides; None stays None."""
        if values is None:
            return None
        copy = self._empty(values.numel(), values.dtype).as_strided(values.shape, values.stride()).copy_(values)
        self._inputs.append((copy, copy.clone()))
        return copy

    def blank(self, shape: tuple[int, ...], dtype: torch.dtype, memory_format=torch.channels_last) -> Tensor:
        """An output, (N, C, H, W), all NaN."""
        strides = torch.empty(shape, device="meta").contiguous(memory_format=memory_format).stride()
        return self._empty(math.prod(shape), dtype).as_strided(shape, strides)

    def check(self) -> None:
        """Raise AssertionError where something was written beside an output, or over an input."""
        for around in self._around:
            assert bool((around == _NAN_BYTE).all()), "something was written beside a tensor"
        for tensor, before in self._inputs:
            assert torch.equal(tensor.view(_bits(tensor)), before.view(_bits(tensor))), "an input was written"

    def _empty(self, elements: int, dtype: torch.dtype) -> Tensor:
        size = elements * dtype.itemsize
        pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        memory = _reserve(pages + 2 * mmap.PAGESIZE, mmap.PAGESIZE, pages)
        everything = torch.frombuffer(memory, dtype=torch.uint8, offset=mmap.PAGESIZE, count=pages).fill_(_NAN_BYTE)
        before = pages - size if self.side == "end" else 0
        self._around += [everything[:before], everything[before + size :]]
        return torch.frombuffer(memory, dtype=dtype, offset=mmap.PAGESIZE + before, count=elements)


def reserve(shape: tuple[int, int, int, int], dtype: torch.dtype, images: int) -> Tensor:
    """A channels_last tensor of any size, of which the last `images` are there, zeros; the rest is unreadable."""
    size = math.prod(shape) * dtype.itemsize
    end = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    first = (size - images * size // shape[0]) // mmap.PAGESIZE * mmap.PAGESIZE
    memory = _reserve(end + mmap.PAGESIZE, first, end - first)
    batch, channels, height, width = shape
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape)).as_strided((batch, *shape[1:]), strides)


def _reserve(size: int, start: int, length: int) -> ctypes.Array:
    """`size` bytes of address space of which `length`, from `start`, are memory; given back with the last tensor."""
    address = _LIBC.mmap(None, size, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(f"mmap of {size} bytes: errno {ctypes.get_errno()}")
    if _LIBC.mprotect(address + start, length, mmap.PROT_READ | mmap.PROT_WRITE):
        raise MemoryError(f"mprotect of {length} bytes: errno {ctypes.get_errno()}")
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, _LIBC.munmap, address, size)
    return memory


def _bits(tensor: Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize]
