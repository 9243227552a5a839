"""The Triton kernels, run on the CPU by Triton's interpreter.

Whether Triton interprets is settled when it is imported, so the checks, tests/interpreted_triton.py, run in a process
of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")


@pytest.mark.timeout(1200)  # minutes on a slow core: every operation of a kernel is Python here
def test_the_kernels_under_the_interpreter():
    checks = Path(__file__).with_name("interpreted_triton.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(checks)],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
