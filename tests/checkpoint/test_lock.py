"""One process at a time in a run directory: who is late is told, or waits, and no dead process is in the way."""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from kd.errors import ConfigError
from kd.runtime.lock import locked
from tests.torture import forked

WORDS = ("recipe=smoke", "run=one", "output=runs", "control=false")
HOST = socket.gethostname()


def test_a_second_holder_is_told_of_the_first(tmp_path):
    run = tmp_path / "run"
    said = rf"run: process {os.getpid()} on {HOST} is at work on it; wait for it, or choose another run="
    with locked(run), pytest.raises(ConfigError, match=said), locked(run):
        pass
    with locked(run), locked(tmp_path / "other"):
        run.mkdir()
        run.rename(tmp_path / "aside")  # as resume=false does
        with pytest.raises(ConfigError), locked(run):
            pass


def test_what_is_done_is_read_without_a_lock(tmp_path):
    with locked(tmp_path / "run"), locked(tmp_path / "run", done=lambda: True) as is_done:
        assert is_done


HOLDER = """
import os, time
from pathlib import Path
from kd.runtime.lock import locked
with locked(Path("run")):
    child = os.fork()  # as data workers are
    print(os.getpid(), flush=True) if not child else None
    time.sleep(60)
"""


def test_neither_a_killed_process_nor_its_forked_data_workers_keep_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    with pytest.raises(ConfigError, match=f"process {holder.pid} on"), locked(tmp_path / "run"):
        pass
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # is still there
    with locked(tmp_path / "run"):
        pass
    os.kill(child, signal.SIGKILL)
    holder.stdout.close()


def test_a_file_system_without_locks_does_not_stop_a_run(tmp_path, monkeypatch, capsys):
    def failing(*arguments, **options):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("filelock.FileLock.acquire", failing)
    with locked(tmp_path / "run"):
        pass
    said = "No locks available; start no second process on this directory\n"
    assert capsys.readouterr().err == f"{tmp_path / '.run.lock'}: {said}"


def pause(stage: str) -> None:
    """Have an update of a stage wait until the file `go` is there."""
    from kd.training import loop

    def slow(self, batches):
        if self.stage.name == stage:
            Path("training").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return update(self, batches)

    update = loop.Trainer._update
    loop.Trainer._update = slow


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.torture)])
def test_a_second_process_on_a_run_is_refused(processes, tmp_path):
    first = forked.start(*WORDS, folder=tmp_path, hook=partial(pause, "student"))
    until((tmp_path / "training").exists, "the first run does not train")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    second = forked.start(*WORDS, folder=tmp_path, processes=processes, log="second.txt")
    assert forked.finish(second) == [2] * processes
    said = f"error: runs/smoke/one: process {first[0].pid} on {HOST} is at work on it; wait for it, or choose another"
    assert (tmp_path / "second.txt").read_text() == f"{said} run= or output=\n"
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
    forked.kill(first[0], signal.SIGKILL)
    assert forked.finish(first) == [-signal.SIGKILL]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.torture)])
def test_a_run_waits_for_the_teacher_that_another_trains(processes, tmp_path):
    """It is that of both, and would be trained again otherwise."""
    first = forked.start(*WORDS, folder=tmp_path, hook=partial(pause, "teacher"))
    until((tmp_path / "training").exists, "the first run does not train")
    other = ("recipe=smoke", "run=other", "output=runs", "control=false", "loss.temperature=2")
    second = forked.start(*other, folder=tmp_path, processes=processes, log="second.txt")
    said = f"teacher  waits for process {first[0].pid} on {HOST}, which trains it in runs/teachers/mlp_wide-"
    until(lambda: said in (tmp_path / "second.txt").read_text(), "the second run does not wait")
    (tmp_path / "go").touch()
    assert forked.finish([*first, *second]) == [0] * (1 + processes)
    log = (tmp_path / "second.txt").read_text()
    assert log.count("waits for") == log.count("teacher  found in") == 1
    assert "teacher  epoch" not in log


@pytest.mark.torture
def test_a_run_that_waits_can_be_stopped(tmp_path):
    first = forked.start(*WORDS, folder=tmp_path, hook=partial(pause, "teacher"))
    until((tmp_path / "training").exists, "the first run does not train")
    second = forked.start(*WORDS[:1], "run=other", *WORDS[2:], folder=tmp_path, processes=2, log="second.txt")
    until(lambda: "waits for" in (tmp_path / "second.txt").read_text(), "the second run does not wait")
    os.kill(second[1].pid, signal.SIGUSR1)
    assert forked.finish(second) == [0, 0]
    assert (tmp_path / "second.txt").read_text().endswith("\nstopped; run the same command to go on\n")
    forked.kill(first[0], signal.SIGKILL)
    forked.finish(first)
