"""How much a forward pass keeps for its backward pass: the activations that training's memory is mostly made of."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves while `forward()` runs, every piece of memory counted once.

    Args:
        forward: what is measured; its result is only kept while this function runs.
        parameters: the model's. Saved tensors of their shapes, transposed or cast, are weights and not counted: they
            do not grow with the batch.

    Returns:
        Bytes of the largest saved view of each storage, as counted by torch.autograd.graph.saved_tensors_hooks.
    """
    weights = {tuple(sorted(parameter.shape)) for parameter in parameters}
    largest: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) not in weights:
            storage = tensor.untyped_storage().data_ptr()
            largest[storage] = max(largest.get(storage, 0), tensor.numel() * tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = forward()
    del kept
    return sum(largest.values())
