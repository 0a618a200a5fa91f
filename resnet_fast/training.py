"""How far a layer of a residual block is fused in training: its stage.

    1  LIBRARY   the library's convolution; batch norm, ReLU and residual in fused passes
    2  EPILOGUE  the convolution's own kernel sums up its statistics; stride-1 gradients through the forward kernel
    3  PROLOGUE  a 1x1 convolution applies the batch norm and ReLU before it as it reads, so that they are never written
                 (on CPUs: every convolution on AMX tiles; without AMX a 3x3 by Winograd, and no 1x1)
    4  GRAM      an expanding 1x1 takes its statistics from its input's covariance; its raw output is never stored

A stage is the most that may be fused: a layer that a stage does not fit takes the highest below it that does. Which
kernels a layer takes within its stage is the backend's choice, by its tuned tables. Stage 4 is by request: it keeps
half the memory for the backward pass, and its sums of outer products take longer than what they save (on an H200).
"""

import os
from collections.abc import Sequence

import torch

from . import dispatch

LIBRARY, EPILOGUE, PROLOGUE, GRAM = 1, 2, 3, 4
STAGES = (LIBRARY, EPILOGUE, PROLOGUE, GRAM)

RECORD = ("conv_out", "mean", "var", "count", "input_mean", "input_cov", "index")
"""A layer's entries in the ops' `records`, in this order; an empty tensor where there is no such thing.

conv_out: raw output (N, K, P, Q). mean, var: what it is normalised with, (K,). count: how many values they are of,
0-dim, where other processes contributed. input_mean, input_cov: of stage 4, (C,) and (C, C). index: of a stem, where
its max-pool's maxima are, uint8 of the pooled shape.
"""


def requested(train_stage: int | str = "auto") -> int | None:
    """The stage asked for by the argument, else by RESNET_FAST_TRAIN; None where it is to be chosen.

    Raises:
        ValueError: neither "auto" nor a stage.
    """
    for name, value in (("train_stage", train_stage), ("RESNET_FAST_TRAIN", os.environ.get("RESNET_FAST_TRAIN", ""))):
        if value in ("auto", ""):
            continue
        if str(value) not in map(str, STAGES) or isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not a stage; it must be one of: auto, {', '.join(map(str, STAGES))}")
        return int(value)
    return None


def stages(
    stage: int | None, layers: Sequence, downsample: bool, device_type: str, dtype: torch.dtype, backend: str
) -> list[int]:
    """The stage of every layer of a block: `stage`, or for None the backend's choice, as far as it fits the layer.

    layers: `functional.ConvBn`s with pairs for geometry, the downsample's last. dtype: of the activations.
    """
    if stage is not None:
        limits = [stage] * len(layers)
    else:
        limits = [dispatch.train_stage(backend, device_type, dtype)] * len(layers)
    last = len(layers) - 1 - downsample  # what follows is joined, not normalised and passed on
    return [
        limit if limit < GRAM or (number >= last and fits_gram(layer)) else PROLOGUE
        for number, (limit, layer) in enumerate(zip(limits, layers, strict=True))
    ]


def fits_gram(layer) -> bool:
    """Whether a `functional.ConvBn` is an expanding, dense 1x1 with batch statistics: what stage 4 is for."""
    channels, out_channels = _channels(layer)
    pointwise = tuple(layer.conv_weight.shape[2:]) == (1, 1) and not any(layer.padding) and layer.groups == 1
    return layer.training and pointwise and channels < out_channels


def _channels(layer) -> tuple[int, int]:
    out_channels, channels = layer.conv_weight.shape[:2]
    return channels, out_channels
