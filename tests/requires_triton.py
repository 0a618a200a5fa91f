"""Import this before Triton: where Triton is not installed, the importing test module is skipped with that reason."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
