"""Asked to stop: between two updates in the loop, at once elsewhere, and on the second time everywhere."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.torture import forked

WORDS = ("recipe=smoke", "run=one", "output=runs", "student.epochs=3", "control=false")


def hang(signums: tuple[int, ...], apart: float) -> None:
    """In the student's seventh update, send signals so many seconds apart, and hang for a while."""
    from kd.training import loop

    def slow(self, batches):
        if (self.stage.name, self.progress.update) == ("student", 6):
            for signum in signums:
                os.kill(os.getpid(), signum)
                time.sleep(apart)
            Path("went on").touch()
        return update(self, batches)

    update = loop.Trainer._update
    loop.Trainer._update = slow


@pytest.mark.parametrize(
    ("signums", "apart", "code", "said"),
    [  # a cluster signals a launcher and its processes, and the launcher passes it on: that is one request
        ((signal.SIGUSR1, signal.SIGTERM), 0.0, 0, "student stopped after update 7 of 15; run the same command to go"),
        ((signal.SIGTERM, signal.SIGUSR1), 1.2, 0, "stopped by SIGTERM; what was saved is kept"),
        ((signal.SIGINT, signal.SIGINT), 1.2, 130, "error: stopped; run the same command to go on"),
    ],
)
def test_a_second_signal_after_a_second_ends_a_run_that_hangs(signums, apart, code, said, tmp_path):
    words = (*WORDS, "train.save_every=0")
    codes = forked.finish(forked.start(*words, folder=tmp_path, hook=partial(hang, signums, apart)))
    assert codes == [code]
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith(said)
    assert (tmp_path / "went on").exists() == (not apart)
    assert list((tmp_path / "runs/smoke/one/student/checkpoints").iterdir())


def test_a_data_worker_leaves_its_end_to_its_parent():
    code = """
import os, signal
from kd.runtime import signals
signals.listen()
child = os.fork()
if child == 0:
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(os.getpid(), signum)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
os.kill(os.getpid(), signal.SIGUSR1)
raise SystemExit("still here")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "stopped by SIGUSR1; what was saved is kept\n")


def test_the_handlers_are_there_before_the_heavy_imports():
    heavy = "{'torch', 'hydra', 'accelerate'}"
    code = f"import sys; import kd.runtime.signals, kd.cli.errors; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="on_exit is of the C library of Linux")
@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_after_the_end_of_python_changes_no_exit_code(late):
    """Between Python's end and the process's, which torch makes long, the system would answer: death by signal."""
    code = (
        "import ctypes, sys; from kd.runtime import signals; signals.listen()\n"
        "libc = ctypes.CDLL(None); libc.on_exit(libc.sleep, None)  # sleeps for as many seconds as the exit code\n"
        "print('ready', flush=True); sys.exit(2)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(late)
        assert process.wait() == 2
