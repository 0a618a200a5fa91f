"""Work that has memory of its own: who may use it when, and the same work as a CUDA graph."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor


class Turns:
    """Context manager around launches that share memory: threads take turns, and a stream waits for the one before.

    Inside a CUDA graph capture only threads do: what a captured graph shares memory with, its owner has to keep apart.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._last: torch.cuda.Event | None = None

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._device).wait_event(self._last)

    def __exit__(self, *exc_info) -> None:
        if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self._last = self._last or torch.cuda.Event()
            self._last.record(torch.cuda.current_stream(self._device))
        self._lock.release()


class CapturedStep:
    """A function without arguments as a CUDA graph. A call replays its kernels, on the tensors that it found in the
    capture, which this keeps alive, and returns what it returned then, with what is in it now.

    Raises:
        RuntimeError: the function does something that cannot be captured.
    """

    _WARMUPS = 3  # what libraries, optimizers and Triton set up on first use, they do before the capture

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self._WARMUPS):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._result = function()

    def __call__(self) -> object:
        self._graph.replay()
        return self._result


class CapturedCall:
    """A function of one CUDA tensor as a CUDA graph, for x's shape: copied in, replayed, copied out.

    Raises:
        RuntimeError: the function does something that cannot be captured.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self._turns = Turns(x.device)
        with torch.inference_mode(False):  # or a later call outside it could not write into _x
            self._x = x.clone()
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):  # whatever libraries set up on first use, they do before the capture
            function(self._x)
        torch.cuda.current_stream(x.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._y = function(self._x)

    def __call__(self, x: Tensor) -> Tensor:
        """The function's result in a tensor of its own."""
        with self._turns:
            self._x.copy_(x)
            self._graph.replay()
            return self._y.clone()
