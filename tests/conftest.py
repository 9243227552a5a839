"""What several tests share: the command line in this process."""

import os
import sys
from collections import namedtuple
from collections.abc import Callable
from functools import partial

# One thread in each of pytest's workers and in what they start: two share two cores better than four do.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from accelerate.state import AcceleratorState
from hypothesis import settings

from kd.cli.errors import one_line_errors

# Property tests draw the same 50 examples each time; `--hypothesis-profile=nightly`, or KD_NIGHTLY=1, draws 1,000 new
# ones.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("nightly" if os.environ.get("KD_NIGHTLY") == "1" else "ci")

Done = namedtuple("Done", "code out err")


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """The next test may want another precision, or other processes."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def called(monkeypatch, capsys):
    """Call a command's `main` as its command line does; returns exit code, stdout and stderr."""

    def call(program: str, main: Callable[[list[str]], int], *words: object) -> Done:
        typed = [str(word) for word in words]
        monkeypatch.setattr(sys, "argv", [program, *typed])
        capsys.readouterr()
        code = 0
        try:
            with one_line_errors(program):
                code = main(typed)
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        done = Done(code, *capsys.readouterr())
        print(done.out, done.err)  # shown when a test fails
        return done

    return call


@pytest.fixture
def kd_train(called, monkeypatch, tmp_path):
    """Call ``kd.train`` from an empty folder."""
    from kd import train

    monkeypatch.chdir(tmp_path)
    return partial(called, "kd.train", train.main)


TINY_STUDY = """# @package _global_
# claim:    A study small enough for a test.
name: tiny
data: {name: digits, family: digits, image_size: 8, shift: 1}
teacher: {model: mlp_tiny, epochs: 1}
student: {model: mlp_nano, epochs: 1}
loss: {temperature: 1.0, kd_weight: 1.0, ce_weight: 0.0}
optimizer: {lr: 0.01}
train: {batch_size: 200}
study:
  claim: A study small enough for a test.
  seeds: 2
  grid:
    teacher.label_smoothing: [0.0, 0.4]
    loss.temperature: [1.0, 4.0]
    loss.student_temperature: [null, 1.0]
  controls: [hard, smoothed]
  contrasts:
    - name: smoothing at T 4
      a: {teacher.label_smoothing: 0.4, loss.temperature: 4.0}
      b: {teacher.label_smoothing: 0.0, loss.temperature: 4.0}
      minus:
        a: {teacher.label_smoothing: 0.4}
        b: {teacher.label_smoothing: 0.0}
    - name: against the labels alone
      metric: val.nll
      a: {teacher.label_smoothing: 0.4}
      b: {control: hard}
"""


@pytest.fixture
def tiny_study(tmp_path):
    """A study recipe in an empty folder, which `python -m kd.study` finds when it is called there."""
    path = tmp_path / "recipes" / "studies" / "tiny.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(TINY_STUDY)
    return path


@pytest.fixture
def kd_study(called, monkeypatch, tmp_path, tiny_study):
    """Call ``kd.study`` from an empty folder, jobs one after another in this process unless told otherwise."""
    from kd.study import __main__ as command

    monkeypatch.chdir(tmp_path)

    def call(*words: str, recipe: str = "studies/tiny", launcher: str = "basic") -> Done:
        return called("kd.study", command.main, f"recipe={recipe}", f"hydra/launcher={launcher}", *words)

    return call


@pytest.fixture
def kd_report(called):
    """Call ``kd.report``."""
    from kd.report import __main__ as command

    return partial(called, "kd.report", command.main)
