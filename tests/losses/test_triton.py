"""The Triton kernels, run on the CPU by Triton's interpreter.

Whether Triton interprets is settled when it is imported, so the checks, tests/losses/interpreted_*.py, run in a process
of their own. Rows meet every combination of settings on both kernels; KD_NIGHTLY=1 takes all of them through
DistillLoss with its reductions too, which takes an hour or so.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")


# Minutes on a slow core: every operation of a kernel is Python here.
@pytest.mark.timeout(4 * 3600 if os.environ.get("KD_NIGHTLY") == "1" else 1200)
def test_the_kernels_under_the_interpreter():
    checks = [str(Path(__file__).with_name(name)) for name in ("interpreted_triton.py", "interpreted_loss.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *checks],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
