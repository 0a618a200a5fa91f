"""What one comparison is, and its contenders: resnet_fast's own, those of `resnet-fast bench`, and `others`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from resnet_fast.cli import contenders, harness, networks
from resnet_fast.cli.contenders import Setting
from resnet_fast.cli.harness import Contender, Row

from . import others

INFERENCE = (
    "eager_nchw",
    "eager_channels_last",
    "folded",
    "compile_default",
    "compile_freezing",
    "onednn_graph",
    "openvino_latency",
    "openvino_throughput",
    "onnxruntime",
    "fast",
    "frozen",
)
TRAINING = ("eager_channels_last", "eager_fused_sgd", "compile_default", "fast", "fast_fused_sgd")
"""Names of contenders, in the order they are shown."""

OURS = {"fast": "ours, optimize()", "frozen": "ours, freeze()"}
"""How bench's `fast` and `frozen` are shown beside others'."""


@dataclass(frozen=True)
class Case:
    """One comparison; plain data, for another process to run."""

    model: str
    train: bool
    dtype: str
    batch_size: int
    img_size: int
    chosen: tuple[str, ...]

    @property
    def title(self) -> str:
        """ "resnet50 float32 batch 16"."""
        dtype = f"{self.dtype} autocast" if self.train and self.dtype != "float32" else self.dtype
        return f"{self.model}, {dtype}, batch {self.batch_size}{', training step' if self.train else ''}"

    def setting(self) -> Setting:
        """The network and the images."""
        generator = torch.Generator().manual_seed(0)
        images, calibration = (
            torch.randn(count, 3, self.img_size, self.img_size, generator=generator) for count in (self.batch_size, 4)
        )
        stock = networks.build(self.model, calibration)
        modes = tuple(name.removeprefix("compile_") for name in self.chosen if name.startswith("compile_"))
        amp_dtype = None if self.dtype == "float32" else getattr(torch, self.dtype)
        return Setting(stock, images.to(memory_format=torch.channels_last), amp_dtype, modes)

    def contenders(self) -> tuple[list[Contender], list[Row]]:
        """Those that can run here, and the rows of those that cannot."""
        setting = self.setting()
        usual = [name for name in harness.CONTENDERS if name in self.chosen]
        if setting.compile_modes:
            usual.append("compile")
        if self.train:
            extra = [variant for variant in others.training(setting) if variant.name in self.chosen]
            found, absent = contenders.training(setting, usual, extra), []
        else:
            reasons = {name: other.reason(setting) for name, other in others.INFERENCE.items() if name in self.chosen}
            extra = [others.INFERENCE[name].variant(name, setting) for name, reason in reasons.items() if not reason]
            found = contenders.inference(setting, usual, extra)
            labels = {name: others.INFERENCE[name].label for name in reasons}
            absent = [harness.not_run(name, labels[name], reason) for name, reason in reasons.items() if reason]
        for contender in found:
            contender.label = OURS.get(contender.name, contender.label)
        return found, absent


def in_order(rows: Sequence[Row], chosen: Sequence[str]) -> list[Row]:
    """Rows as their contenders stand in `chosen`."""
    return sorted(rows, key=lambda row: chosen.index(row.contender))
