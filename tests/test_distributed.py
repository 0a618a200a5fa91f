"""SyncBatchNorm and DistributedDataParallel: two processes on this machine, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from distributed_worker import CHECKS, SHARES

HERE = Path(__file__).parent


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes(backend, tmp_path):
    """All checks of the worker one after the other, for starting two processes takes longest."""
    world = len(SHARES)
    command = [sys.executable, str(HERE / "distributed_worker.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world), str(tmp_path / "store"), backend],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n\n".join(said)
    assert all(check.__name__ in words for check in CHECKS for words in said)
