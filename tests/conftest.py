"""What several tests share: the command line in this process."""

import os
import sys
from collections import namedtuple

# One thread in each of pytest's workers and in what they start: two share two cores better than four do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from accelerate.state import AcceleratorState

from kd import cli

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
