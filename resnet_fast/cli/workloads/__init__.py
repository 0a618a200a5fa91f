"""One problem and every way to compute it: inputs, a float64 reference, PyTorch's ops, each candidate. For `tune`."""

from ...problems import Problem, is_training
from . import inference
from .workload import Workload


def of(problem: Problem, device: str) -> Workload:
    """The workload of `problem` as a GPU's plan or training step has it, on `device`, PyTorch's name of it.

    What a CPU chooses from is `cpu.of`.
    """
    if not is_training(problem):
        return inference.of(problem, device)
    from . import training  # which needs Triton

    return training.of(problem, device)
