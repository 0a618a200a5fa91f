"""ResNets of torchvision and timm with batch-norm statistics that are nowhere trivial, for checks and timings."""

import copy
import difflib

import torch
from torch import Tensor, nn
from torchvision import models

from .. import freeze, libraries, numerics
from ..numerics import Comparison
from ..planned import PlannedNetwork
from ..planner import Section
from . import UserError
from .checks import randomise_batch_norm

FAMILIES = ("resnet", "resnext", "wide_resnet")
TIMM = "timm/"
"""Before the names of timm's networks."""


def names() -> list[str]:
    """The classification networks built of residual blocks, as torchvision names them."""
    return [name for name in models.list_models(models) if name.startswith(FAMILIES)]


def timm_names() -> list[str]:
    """timm's, as "timm/resnet50"; a UserError without timm."""
    try:
        import timm
    except ImportError:
        raise UserError("--model timm/...: timm is not installed: pip install timm") from None
    return [f"{TIMM}{name}" for name in timm.list_models(module="resnet")]


def check_name(name: str) -> str:
    """`name`, or a UserError that lists what is near it."""
    library, known = ("timm", timm_names()) if name.startswith(TIMM) else ("torchvision", names())
    if name in known:
        return name
    near = difflib.get_close_matches(name.lower(), known, n=4, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise UserError(f"--model {name} is not one of {library}'s ResNets; {hint}")


def build(name: str, images: Tensor, weights: str | None = None, seed: int = 0) -> nn.Module:
    """A network in eval mode, channels_last, float32, on the images' device.

    Without `weights` its parameters are random, and its running statistics are those of `images` (N, 3, H, W), so that
    its outputs depend on every statistic. With `weights`, a torchvision name, they are the trained ones.
    """
    device = images.device
    if weights is not None:
        chosen = find_weights(name, weights)
        try:
            model = models.get_model(name, weights=chosen)
        except OSError as error:  # urllib's and the disk's alike
            raise UserError(f"cannot download {chosen} from {chosen.url}: {error}; leave out --weights") from None
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = untrained(name)
            randomise_batch_norm(model, torch.default_generator)
    model = model.to(device, memory_format=torch.channels_last)
    if weights is None:
        calibrate(model, images)
    return model.eval()


def untrained(name: str) -> nn.Module:
    """The network as its library makes it, where `torch.device` says."""
    if not name.startswith(TIMM):
        return models.get_model(name, weights=None)
    import timm

    libraries.load()
    return timm.create_model(name.removeprefix(TIMM), pretrained=False)


def frozen_whole(name: str, stock: nn.Module, dtype: torch.dtype) -> PlannedNetwork:
    """`stock`, which is called `name`, frozen; a UserError that says why where not all of it is one plan."""
    try:
        frozen = freeze(stock, dtype=dtype)
        Section.of_resnet(frozen)
    except ValueError as error:
        raise UserError(f"--model {name} is not one plan when frozen ({error}); `bench` times any network") from None
    return frozen


def find_weights(name: str, weights: str):
    """torchvision's weights called `weights` for this network, or its default where only others have that name."""
    available = models.get_model_weights(name)
    if weights in available.__members__:
        return available[weights]
    if weights == "DEFAULT" or any(weights in models.get_model_weights(other).__members__ for other in names()):
        return available.DEFAULT
    raise UserError(f"--weights {weights} is not known; for {name} there are {', '.join(available.__members__)}")


@torch.no_grad()
def calibrate(model: nn.Module, images: Tensor) -> None:
    """Set the running statistics to the cumulative average over `images`, in place."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@torch.inference_mode()
def float64_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What `model` (stock) computes, in float64."""
    exact = copy.deepcopy(model).double()
    return torch.cat([exact(image[None].double()) for image in images])  # one by one: little memory at any batch size


@torch.inference_mode()
def compare_logits(actual: Tensor, stock: nn.Module, images: Tensor, dtype: torch.dtype) -> Comparison:
    """Judge `actual`, logits of float32 `images` computed in `dtype`, beside PyTorch's in the same dtype."""
    autocast = dtype in (torch.bfloat16, torch.float16)
    expected_model = stock if autocast else copy.deepcopy(stock).to(dtype)
    with torch.autocast(images.device.type, dtype, enabled=autocast):
        expected = expected_model(images if autocast else images.to(dtype))
    return numerics.compare("logits", actual, expected, float64_logits(stock, images))


def flops_per_image(model: nn.Module, size: int, train: bool) -> float:
    """Floating-point operations of one image's forward, and backward if `train`; a multiply-add counts two."""
    from torch.utils.flop_counter import FlopCounterMode

    meta = copy.deepcopy(model).to("meta").train(train)
    images = torch.empty(2, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        out = meta(images)
        if train:
            out.sum().backward()
    return counter.get_total_flops() / 2
