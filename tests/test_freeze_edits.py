"""Models that somebody edited before or after `freeze`, and who looks on while a frozen one runs: what stock gives."""

import copy
import io
import os

import fresh
import pytest
import torch
from cases import draw
from models import lively
from numerics import assert_all_match
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import jvp, vmap
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, ResNet, resnet18

from resnet_fast import freeze


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def network(seed: int = 0) -> ResNet:
    torch.manual_seed(seed)
    return lively(resnet18(num_classes=7)).eval()


def images(batch: int = 2, size: int = 40) -> torch.Tensor:
    return draw((batch, 3, size, size), torch.float32)


def assert_alike(ours: torch.Tensor, model: nn.Module, x: torch.Tensor) -> None:
    """Stock runs in `freeze`'s layout: in the other, PyTorch convolves so few values without oneDNN, in other sums."""
    exact = copy.deepcopy(model).double()(x.double())
    stock = copy.deepcopy(model).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert_all_match({"y": ours}, {"y": stock}, {"y": exact})


class Sequences(nn.Module):
    """Modules that stand in a Sequential twice, where the first is not the only neighbour."""

    def __init__(self) -> None:
        super().__init__()
        relu, sigmoid = nn.ReLU(), nn.Sigmoid()
        self.norm_behind_relu = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), relu, nn.Conv2d(8, 8, 3), relu, nn.BatchNorm2d(8)
        )
        self.relu_behind_sigmoid = nn.Sequential(
            sigmoid, nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), sigmoid, nn.ReLU(), nn.Conv2d(8, 8, 1)
        )

    def forward(self, x):
        return self.relu_behind_sigmoid(self.norm_behind_relu(x)).contiguous()


def test_what_stands_twice_in_a_sequential():
    torch.manual_seed(0)
    model, x = lively(Sequences()).eval(), images()
    assert_alike(freeze(model)(x), model, x)


def train_the_shortcuts_norm(model: ResNet) -> None:
    model.layer2[0].downsample[1].train()


def keep_no_statistics_of_the_shortcut(model: ResNet) -> None:
    model.layer2[0].downsample[1] = nn.BatchNorm2d(128, track_running_stats=False).eval()


def shift_before_the_stems_relu(model: ResNet) -> None:
    model.relu.register_forward_pre_hook(lambda module, args: (args[0] - 0.5,))


def gelu_for_the_stems_relu(model: ResNet) -> None:
    model.relu.forward = F.gelu


def skip_a_block(model: ResNet) -> None:
    model.layer1[0].forward = lambda x: x


def double_the_networks_forward(model: ResNet) -> None:
    model._forward_impl = lambda x: 2 * ResNet._forward_impl(model, x)


EDITS = [train_the_shortcuts_norm, keep_no_statistics_of_the_shortcut, shift_before_the_stems_relu]
EDITS += [gelu_for_the_stems_relu, skip_a_block]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_a_model_edited_before(edit):
    model, x = network(), images()
    edit(model)
    assert_alike(freeze(model)(x), model, x)


def test_a_network_with_a_forward_of_its_own():
    model, x = network(), images()
    expected = 2 * model(x)
    double_the_networks_forward(model)
    torch.testing.assert_close(freeze(model)(x), expected)


def test_weights_loaded_into_a_part():
    model, other, x = network(0), network(1), images()
    frozen = freeze(model)
    frozen(x)
    frozen.layer4.load_state_dict(freeze(other).layer4.state_dict())
    model.layer4 = other.layer4
    assert_alike(frozen(x), model, x)


def test_what_is_removed_afterwards():
    model, x = network(), images()
    frozen = freeze(model)
    frozen(x)
    frozen.fc = model.fc = nn.Identity()
    del frozen.layer4[1], model.layer4[1]
    assert_alike(frozen(x), model, x)


def test_traced_it_is_plain_pytorch():
    """Which follows other sizes, and leaves the model as it was."""
    model, x = network(), images()
    frozen = freeze(model)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(frozen, x, check_trace=False), buffer)
    buffer.seek(0)
    traced = torch.jit.load(buffer)
    for like in (x, images(5, 33)):
        assert_alike(traced(like), model, like)
    assert_alike(torch.export.export(frozen, (x,)).module()(x), model, x)


def test_transforms_and_fake_tensors():
    model, x = network(), images()
    frozen = freeze(model)
    assert_alike(vmap(frozen)(x[:, None])[:, 0], model, x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert frozen(mode.from_tensor(x)).shape == (2, 7)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_forward_mode_raises_as_backward_does(backend):
    frozen, x = freeze(network(), backend=backend), images()
    with pytest.raises(RuntimeError, match="computes no gradients"):
        jvp(frozen, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="computes no gradients"):
        frozen(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("shape", [(2, 4, 40, 40), (3, 40, 40)], ids=str)
def test_a_wrong_input_is_told(shape):
    for model in (network(), nn.Sequential(nn.Sequential(BasicBlock(3, 3))).eval()):
        with pytest.raises((RuntimeError, ValueError), match=r"\(N, 3, H, W\)|takes 3 channels"):
            freeze(model)(torch.randn(shape))


@pytest.mark.parametrize(
    "x", [None, [1.0], torch.zeros(1, 3, 40, 40, dtype=torch.uint8)], ids=["None", "list", "uint8"]
)
def test_what_is_no_tensor_of_floats(x):
    with pytest.raises(TypeError, match="input"):
        freeze(network())(x)


@pytest.mark.parametrize(("level", "told"), [("", False), ("info", False), ("loud", True)])
def test_a_log_level_that_there_is_not(level, told):
    done = fresh.python("import resnet_fast", environment=os.environ | {"RESNET_FAST_LOG": level})
    assert done.returncode == 0, done.stderr
    assert ("RESNET_FAST_LOG='LOUD' is unknown" in done.stderr) == told
