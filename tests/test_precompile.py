"""benchmarks/precompile.py: binaries for a GPU that is not here, where Triton will look for them."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "precompile.py"


def test_binaries_of_the_best_configurations(tmp_path):
    what = ["--model", "resnet18", "--batch-size", "1", "--task", "infer", "--top", "1"]
    command = [sys.executable, str(SCRIPT), "--cache", str(tmp_path), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    compiled, failed = map(
        int, re.search(r"(\d+) kernels in .*?, (\d+) failed", " ".join(done.stdout.split())).groups()
    )
    assert compiled > 10
    assert failed == 0
    binaries = list(tmp_path.rglob("*.cubin"))
    assert 10 < len(binaries) <= compiled
    assert all(binary.read_bytes().startswith(b"\x7fELF") for binary in binaries)
