"""The Triton kernels, run on the CPU by Triton's interpreter: interpreted_triton.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")


def interpret(*arguments):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    checks = str(Path(__file__).with_name("interpreted_triton.py"))
    done = subprocess.run([*words, checks], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    print(done.stdout, done.stderr)
    assert done.returncode == 0


@pytest.mark.timeout(600)  # every operation of a kernel is Python here
def test_a_sample_under_the_interpreter():
    interpret()


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_all_under_the_interpreter():
    interpret("-m", "torture", "--timeout=3600")
