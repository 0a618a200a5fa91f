"""Getting a model ready: every kernel compiled and loaded, every plan made, before it counts."""

import torch
from torch import nn


def warmup(model: nn.Module, *inputs) -> nn.Module:
    """Run `model` on `inputs` without gradients, so that later calls of these shapes only launch.

    Triton compiles a kernel when it is first called, and a frozen model plans for an input shape when it first sees
    one. After this a call can be captured in a CUDA graph.

    Args:
        model: stock, optimized or frozen; left in its mode. In training mode its running statistics are updated.
        inputs: as `model` takes them.

    Returns:
        `model` itself.

    Raises:
        TypeError: there are no inputs. What `model` raises for these inputs.
    """
    if not inputs:
        raise TypeError("warmup needs inputs of the shapes to come, as model takes them: warmup(model, images)")
    with torch.no_grad():
        for _ in range(2):  # the second call is the first that finds everything set up, and captures its own graph
            model(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return model
