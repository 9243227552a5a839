"""The Triton kernels, run on the CPU by Triton's interpreter: interpreted_triton.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is published for Linux only")
HERE = Path(__file__).parent


def interpret(*arguments):
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*words, *arguments], cwd=HERE, capture_output=True, text=True, env=environment)
    print(done.stdout, done.stderr)
    assert done.returncode == 0


@pytest.mark.timeout(600)  # every operation of a kernel is Python here
def test_a_sample_under_the_interpreter():
    interpret("interpreted_triton.py")


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_all_under_the_interpreter():
    interpret("interpreted_triton.py", "-m", "torture", "--timeout=3600")


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_every_mode_of_pytorch_under_the_interpreter():
    interpret("test_torch_modes.py", "-k", "triton or masks")
