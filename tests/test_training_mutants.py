"""The tests of the training algorithm must bite: one plausible mistake in the text of `backends.residual_block` each.

Every mutant is a copy of that module with one place changed, and has to be noticed by a comparison that the unchanged
module passes. What only several processes can notice is the business of `test_distributed`.
"""

import inspect
import types
from dataclasses import dataclass

import pytest
import torch
from models import assert_trains_alike, lively, pair
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet, conv1x1

from resnet_fast.backends import residual_block, train_ops
from resnet_fast.training import EPILOGUE, GRAM, PROLOGUE


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new`, where it stands once; `stage` is what notices it."""

    old: str
    new: str
    stage: int


def shortcut(stride: int) -> nn.Sequential:
    return nn.Sequential(conv1x1(16, 32, stride), nn.BatchNorm2d(32))


def blocks() -> nn.Module:
    """Identity and downsample, and a block before each, so that the gradients of their inputs count too."""
    torch.manual_seed(1)
    first, second = Bottleneck(16, 4), Bottleneck(16, 8, 2, shortcut(2))
    return lively(nn.Sequential(first, second, Bottleneck(32, 8))).double().train()


def network() -> nn.Module:
    torch.manual_seed(1)
    return lively(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)).double().train()


def compare(stage: int, model: nn.Module) -> None:
    shape = (2, 3, 40, 40) if isinstance(model, ResNet) else (3, 16, 5, 5)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert_trains_alike(*pair(model, "reference", train_stage=stage), [x], steps=1)


def seed(patch, old: str, new: str) -> None:
    """Have every backend train by a copy of `backends.residual_block` with one place changed."""
    source = inspect.getsource(residual_block)
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in the module"
    module = types.ModuleType(residual_block.__name__)
    module.__package__ = residual_block.__package__
    exec(compile(source.replace(old, new), f"mutated {residual_block.__file__}", "exec"), module.__dict__)
    patch(train_ops, "residual_block", module)
    for name in ("Grads", "Layer", "Record", "Wants"):
        patch(train_ops, name, getattr(module, name))


MUTANTS = {
    "unmasked_gradient": Mutant("dz = primitives.mask(dy, y, x)", "dz = dy", PROLOGUE),
    "dropped_identity_gradient": Mutant(
        "elif identity:\n        dx = dz", "elif identity:\n        dx = None", PROLOGUE
    ),
    "dropped_downsample_gradient": Mutant(
        "dx if number == 0 and wants[0].input else None", "dx if number == 0 and identity else None", PROLOGUE
    ),
    "no_relu_between_layers": Mutant("number < len(main) - 1,", "False,", EPILOGUE),
    "no_norm_before_the_weights_gradient": Mutant(
        "value, norm = before.conv_out, main[number - 1].norm(before.mean, before.var)",
        "value = before.conv_out",
        PROLOGUE,
    ),
    "no_norm_of_the_downsample": Mutant(
        "y = primitives.apply(value, norm, added, added_norm)",
        "y = primitives.apply(value, norm, added, None)",
        PROLOGUE,
    ),
    "statistics_taken_for_constants": Mutant("if wants_conv and layer.batch_statistics:", "if False:", EPILOGUE),
    "dropped_mean_of_dz": Mutant("_foreach_div(_summed(sum_dz", "_foreach_div(_summed(0 * sum_dz", PROLOGUE),
    "weights_gradient_without_rstd": Mutant("torch._foreach_rsqrt(", "torch._foreach_sqrt(", PROLOGUE),
    "swapped_sums": Mutant("sum_dz, sum_dzx = primitives", "sum_dzx, sum_dz = primitives", PROLOGUE),
    "gram_unbiased_variance": Mutant(".clamp_(min=0)", ".clamp_(min=0).mul_(1.01)", GRAM),
    "gram_dropped_covariance": Mutant("(matrix @ input_cov) * matrix", "matrix * matrix", GRAM),
    "gram_counts_skipped_pixels": Mutant(
        "return batch * (-(-height // down)) * (-(-width // right))", "return batch * height * width", GRAM
    ),
    "gram_dropped_q": Mutant("q, k = scale * s_all / pixels", "q, k = 0 * s_all", GRAM),
    "gram_dropped_k": Mutant("scale * rstd * rstd * t_all / pixels", "0 * t_all", GRAM),
    "gram_k_without_rstd": Mutant("scale * rstd * rstd * t_all", "scale * rstd * t_all", GRAM),
    "gram_dweight_without_rstd": Mutant("weight=t * rstd if", "weight=t if", GRAM),
    "gram_uncentred_outer_product": Mutant("(outer + torch.outer(s, m))", "outer", GRAM),
    "gram_dropped_sum_of_the_input": Mutant("- torch.outer(q + k * d, here * m)", "", GRAM),
    "gram_dropped_covariance_gradient": Mutant("dmatrix -= k[:, None]", "dmatrix -= 0 * k[:, None]", GRAM),
    "gram_dropped_input_term": Mutant("x_matrix = -(matrix", "x_matrix = 0 * (matrix", GRAM),
    "gram_input_term_added": Mutant("x_matrix = -(matrix", "x_matrix = (matrix", GRAM),
    "gram_dropped_constant": Mutant("constant = -((q + k * d) @ matrix)", "constant = 0 * (q @ matrix)", GRAM),
    "gram_dropped_scale": Mutant("dz_matrix = matrix * scale[:, None]", "dz_matrix = matrix", GRAM),
    "gram_shortcut_in_the_wrong_norm": Mutant(
        "branch_norm = branch.norm(records[-1].mean, records[-1].var)",
        "branch_norm = branch.norm(own.mean, own.var)",
        GRAM,
    ),
    "stem_no_relu": Mutant("wants, x, None, True, None, group)", "wants, x, None, False, None, group)", EPILOGUE),
    "stem_pools_by_another_index": Mutant(
        "y, record.index = primitives.pool(conv_out, norm)",
        "y, record.index = primitives.pool(conv_out, norm); record.index = 4 + 0 * record.index",
        EPILOGUE,
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(name, monkeypatch):
    mutant = MUTANTS[name]
    seed(monkeypatch.setattr, mutant.old, mutant.new)
    with pytest.raises(AssertionError):
        compare(mutant.stage, network() if name.startswith("stem") else blocks())


@pytest.mark.parametrize("stage", [EPILOGUE, PROLOGUE, GRAM])
def test_an_unmutated_copy_passes(stage, monkeypatch):
    seed(monkeypatch.setattr, "def _summed(", "def _summed(")
    compare(stage, blocks())
    compare(stage, network())
