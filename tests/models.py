"""Networks and blocks for the tests: small, with batch-norm statistics that are not trivial, trained side by side."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

import resnet_fast
from resnet_fast.amx.network import AmxNetwork
from resnet_fast.blocks import FAST
from resnet_fast.functional import ConvBn
from resnet_fast.planner import Section


def lively(model: nn.Module, seed: int = 5) -> nn.Module:
    """`model` with statistics, weights and biases drawn for every batch norm, so that a check of them bites."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            with torch.no_grad():
                if module.running_mean is not None:
                    module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.2)
                    module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
                if module.weight is not None:
                    module.weight.copy_(torch.rand(module.weight.shape, generator=generator) + 0.3)
                    module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
    return model


def network_of(frozen: nn.Module) -> AmxNetwork:
    """Of a frozen stage: by itself, so that nothing can silently go another way."""
    return AmxNetwork(Section(None, False, list(frozen.named_children())), head=False)


def pair(model: nn.Module, backend: str, **settings) -> tuple[nn.Module, nn.Module]:
    """`model` as it is, and an optimized copy in which every block is fused."""
    return model, resnet_fast.optimize(copy.deepcopy(model), backend=backend, strict=True, **settings)


def train(model: nn.Module, inputs: list[Tensor], steps: int = 3, lr: float = 1e-3) -> Iterator[tuple[str, Tensor]]:
    """SGD with momentum on a mean square; yields every output, gradient, parameter and buffer, by step and name."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        output = first_tensor(model(inputs[step % len(inputs)]))
        output.square().mean().backward()
        yield f"{step}.output", output.detach().clone()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                yield f"{step}.{name}.grad", parameter.grad.clone()
        optimizer.step()
        for name, tensor in model.state_dict().items():
            yield f"{step}.{name}", tensor.clone()


def assert_trains_alike(stock_model: nn.Module, fast_model: nn.Module, inputs: list[Tensor], steps: int = 3) -> None:
    """In float64 the two are the same computation in another order: each tensor within 1e-6 of its own norm.

    Rounding, 1e-16, grows up to 1e8-fold through 50 layers that are normalised over eight values a channel; what is
    wrong is larger: a dropped eps is 1e-5 of a variance near 1, a biased variance 1e-1, a lost gradient all of it.
    """
    pairs = zip(train(stock_model, inputs, steps), train(fast_model, inputs, steps), strict=True)
    for (stock_name, theirs), (fast_name, ours) in pairs:
        assert stock_name == fast_name
        assert (theirs.shape, theirs.dtype, theirs.stride()) == (ours.shape, ours.dtype, ours.stride()), stock_name
        difference, norm = (ours.double() - theirs.double()).norm().item(), theirs.double().norm().item()
        assert difference <= 1e-6 * norm + 1e-12, f"{stock_name}: differs by {difference:.3g}, its norm is {norm:.3g}"


def first_tensor(output) -> Tensor:
    """The logits of a classifier, or of a segmentation model's dictionary."""
    return output["out"] if isinstance(output, dict) else output


def fast_blocks(model: nn.Module) -> list[nn.Module]:
    """The fast blocks of `model`."""
    return [module for module in model.modules() if type(module) in FAST.values()]


class count_fused_calls:
    """Context manager that counts the convolutions that blocks compute fused: proof that a block really ran so."""

    def __enter__(self) -> Callable[[], int]:
        from resnet_fast import blocks

        self.calls, self.original = 0, blocks.residual_block
        blocks.residual_block = self._counting
        return lambda: self.calls

    def _counting(self, x, main, shortcut=None, **keywords):
        self.calls += len(main) + isinstance(shortcut, ConvBn)
        return self.original(x, main, shortcut, **keywords)

    def __exit__(self, *exc_info) -> None:
        from resnet_fast import blocks

        blocks.residual_block = self.original
