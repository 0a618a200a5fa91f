"""SyncBatchNorm and DistributedDataParallel: two processes on this machine, over gloo."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import pytest
import torch.distributed as dist
from distributed_worker import CHECKS, SHARES

HERE = Path(__file__).parent


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(backend, tmp_path):
    """All checks of the worker one after the other, for starting two processes takes longest."""
    world = len(SHARES)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(rank: int) -> subprocess.CompletedProcess:
        arguments = (str(rank), str(world), str(tmp_path / "store"), backend)
        return fresh.script(HERE / "distributed_worker.py", *arguments, environment=environment, timeout=240)

    with ThreadPoolExecutor(world) as pool:
        done = list(pool.map(run, range(world)))
    said = [process.stdout + process.stderr for process in done]
    assert [process.returncode for process in done] == [0] * world, "\n\n".join(said)
    assert all(check.__name__ in words for check in CHECKS for words in said)
