"""What several tests share: the command line in this process."""

import os
import sys
from collections import namedtuple

# One thread in each of pytest's workers and in what they start: two share two cores better than four do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from accelerate.state import AcceleratorState
from hypothesis import settings

from kd import cli

# Property tests draw the same 50 examples each time; `--hypothesis-profile=nightly`, or KD_NIGHTLY=1, draws 1,000 new
# ones. KD_NIGHTLY=1 also runs the whole matrix on the interpreted kernels.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("nightly" if os.environ.get("KD_NIGHTLY") == "1" else "ci")

Done = namedtuple("Done", "code out err")


@pytest.fixture
def kd_train(monkeypatch, capsys, tmp_path):
    """Call ``kd.train`` as the command line does, from an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Done:
        from kd import train

        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["kd.train", *arguments])
        code = 0
        try:
            cli.command("kd.train", train.run)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        done = Done(code, *capsys.readouterr())
        print(done.out, done.err)  # shown when a test fails
        return done

    return call
