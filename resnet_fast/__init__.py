"""Fused residual blocks for PyTorch ResNets: `resnet_fast.optimize(model)`."""

from . import functional
from .blocks import FastBasicBlock, FastBottleneck, FusionError
from .dispatch import BackendUnavailable
from .freeze import freeze
from .layers import disabled
from .optimize import optimize, restore
from .report import BlockReport, Report
from .resnet import FastResNet
from .warm import warmup

__version__ = "0.1.0"
__all__ = [
    "BackendUnavailable",
    "BlockReport",
    "FastBasicBlock",
    "FastBottleneck",
    "FastResNet",
    "FusionError",
    "Report",
    "disabled",
    "freeze",
    "functional",
    "optimize",
    "restore",
    "warmup",
]
