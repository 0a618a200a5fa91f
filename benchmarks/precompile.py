"""Compile for a GPU that is not here what `tune` and the tests marked gpu launch, into a cache of Triton's to carry.

    python3.12 benchmarks/precompile.py --cache /tmp/kernels [--tests] [--model NAME ...] [--batch-size N ...]
    tar -C /tmp -czf kernels.tgz kernels       # there: tar -C /tmp -xzf kernels.tgz; TRITON_CACHE_DIR=/tmp/kernels ...

A kernel takes a third of a second of one core, and minutes on a rented GPU are few. What is here is found there if
Python's minor version, Triton's wheel and the cache's path are the same, and no kernel's source has changed.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def main() -> int:
    """Compiles, and says how many kernels and how many of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--cache", required=True, metavar="DIR")
    flag("--gpu", default="h200", metavar="NAME")
    flag("--tests", action="store_true", help="the configurations that the tests marked gpu try")
    flag("--model", nargs="+", default=["resnet50"], metavar="NAME")
    flag("--batch-size", nargs="+", default=["256"], metavar="N")
    flag("--dtype", nargs="+", default=["bfloat16"], metavar="DTYPE")
    flag("--task", nargs="+", default=["infer", "train"], metavar="TASK", help="infer, train")
    flag("--top", type=int, default=12, metavar="N", help="configurations of each problem")
    args = parser.parse_args()
    os.environ |= {"TRITON_CACHE_DIR": args.cache, "TRITON_STORE_BINARY_ONLY": "1"}
    from resnet_fast import gpus
    from resnet_fast.cli import output, tune

    gpu = gpus.named(args.gpu)
    chosen = argparse.ArgumentParser()
    tune.add_arguments(chosen)
    names = ("model", "batch_size", "dtype", "task")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", *getattr(args, name))]
    todo = [(problem, args.top) for problem in tune.problems(chosen.parse_args(words), gpu)] + _tested(args.tests)
    counts = _pretend(gpu)
    with output.progress() as progress:
        line = progress.add_task("compiling", total=len(todo))
        for problem, top in todo:
            progress.update(line, description=problem.key)
            _compile(problem, top, gpu)
            progress.advance(line)
    output.console.print(f"{counts['compiled']} kernels in {args.cache}, {counts['failed']} failed")
    return 1 if counts["failed"] else 0


def _tested(wanted: bool) -> list[tuple]:
    """Problems of the GPU tests and how many configurations they try."""
    if not wanted:
        return []
    import test_gpu_training
    import test_gpu_triton

    modules = test_gpu_triton, test_gpu_training
    return [(problem, module.CONFIGURATIONS) for module in modules for problem in module.PROBLEMS.values()]


def _pretend(gpu) -> dict[str, int]:
    """Let Triton compile for `gpu`, and tensors have shapes only; returns where it is counted."""
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver

    from resnet_fast import gpus
    from resnet_fast.backends import triton_launch as launcher
    from resnet_fast.cli.workloads import inference, training, workload

    counts = {"compiled": 0, "failed": 0}
    major, minor = gpu.capability
    target = GPUTarget("cuda", 10 * major + minor, 32)

    class Driver:
        def get_current_target(self):
            return target

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    class Shapes(workload.Source):
        def __init__(self, problem, device: str) -> None:
            self.dtype, self.device = getattr(torch, problem.dtype), "meta"

        def image(self, shape):
            return self.empty(shape)

        def conv(self, conv, prefix=""):
            bias = torch.empty(conv.out_channels, dtype=self.dtype, device="meta")
            return {f"{prefix}weight": self.empty(conv.weight_shape), f"{prefix}bias": bias}

        def vectors(self, count, size):
            return torch.empty(count, size, device="meta")

    def compile_only(kernel, *rest) -> None:
        counts["compiled"] += 1
        try:
            launcher_compile(kernel, *rest)
        except Exception as error:
            counts["failed"] += 1
            print(f"{kernel.fn.__name__} {rest[-1]}: {type(error).__name__}: {error}", file=sys.stderr)

    launcher_compile, launcher.launch = launcher.compile_only, compile_only
    CompiledKernel._init_handles = lambda self: None  # nothing is loaded
    driver.set_active(Driver())
    inference.Source = training.Source = Shapes
    gpus.of_tensor = lambda x: gpu
    return counts


def _compile(problem, top: int, gpu) -> None:
    from resnet_fast.cli import workloads
    from resnet_fast.kernels import configs

    work = workloads.of(problem, "meta")
    for config in configs.candidates(problem, gpu)[:top]:
        work.kernel(config)()


if __name__ == "__main__":
    sys.exit(main())
