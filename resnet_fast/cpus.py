"""What is known of this CPU: its name, by which measurements are kept, and its cores."""

import functools
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from .gpus import Gpu, slug_of


@dataclass(frozen=True)
class Cpu:
    """model: the CPU's, as the system names it. cores: all of the machine's, whatever a process may use of them.
    isa: the vector instructions that PyTorch's kernels and ours use, as PyTorch names them.

    Which kernel is chosen depends on nothing else, so that a network's results do not depend on the threads in use.
    """

    kind: ClassVar[str] = "cpu"

    model: str
    cores: int
    isa: str

    @property
    def name(self) -> str:
        """Of tuned tables: "AMD EPYC, family 25 model 17, 2 cores"."""
        return f"{self.model}, {self.cores} core{'s' if self.cores > 1 else ''}"

    @property
    def slug(self) -> str:
        """The name as a file name."""
        return slug_of(self.name)


Device = Gpu | Cpu
"""What a problem is computed on, and a tuned table is of."""


@functools.cache
def here() -> Cpu:
    """This machine's. Clouds rename CPUs, so family and model numbers stand beside the name."""
    family = f", family {info('cpu family')} model {info('model')}" if info("cpu family") else ""
    return Cpu(f"{model_name()}{family}", os.cpu_count() or 1, torch.backends.cpu.get_cpu_capability())


def model_name() -> str:
    """The marketing name: "AMD EPYC 9554 64-Core Processor"; where the system has none, the architecture."""
    return re.sub(r"\s+", " ", info("model name")) or platform.processor() or platform.machine()


@functools.cache
def info(key: str) -> str:
    """The first value of `key` in /proc/cpuinfo; "" where there is none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.split(":")[0].strip() == key:
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""
