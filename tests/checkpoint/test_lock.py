"""One process at a time on a folder: who is late is told, waits where that helps, and no dead process is in the way."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from kd.errors import CheckpointError
from kd.runtime.lock import alone, path_of
from tests.torture import forked

WORDS = ("recipe=smoke", "run=one", "output=runs", "control=false")
HOST = socket.gethostname()


class Busy(Exception):
    pass


def refuse(holder: str) -> None:
    raise Busy(holder)


def test_a_second_holder_is_told_of_the_first_and_nothing_is_left(tmp_path):
    folder = tmp_path / "run"
    with alone(folder, refuse), pytest.raises(Busy, match=f"process {os.getpid()} on {HOST}"), alone(folder, refuse):
        pass
    assert not list(tmp_path.iterdir())
    with alone(folder, refuse), alone(tmp_path / "other", refuse):
        folder.mkdir()
        folder.rename(tmp_path / "aside")  # resume=false does so
        with pytest.raises(Busy), alone(folder, refuse):
            pass


def test_who_waits_does_not_end_up_on_a_file_that_its_holder_removed(tmp_path, monkeypatch):
    """Between opening the file and locking it, the holder ends and a third process takes a new file of that name."""
    folder, flock = tmp_path / "run", fcntl.flock
    others = []

    def slow(file, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        path_of(folder).unlink()
        others.append(alone(folder, refuse))
        others[0].__enter__()
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with pytest.raises(Busy), alone(folder, refuse):
        pass
    others[0].__exit__(None, None, None)


HOLDER = """
import os, sys, time
from pathlib import Path
from kd.runtime.lock import alone
with alone(Path("run"), lambda holder: sys.exit(f"busy: {holder}")):
    child = os.fork()  # as data workers are
    print(os.getpid(), flush=True) if not child else None  # from where it has closed its copy
    time.sleep(60)
"""


def test_neither_a_killed_process_nor_its_forked_children_hold_it(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    with pytest.raises(Busy, match=f"process {holder.pid} on"), alone(tmp_path / "run", refuse):
        pass
    holder.kill()
    holder.wait()
    os.kill(child, 0)  # is still there
    assert path_of(tmp_path / "run").exists()
    with alone(tmp_path / "run", refuse):
        pass
    os.kill(child, signal.SIGKILL)
    holder.stdout.close()


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("make", "said"),
    [(os.mkfifo, "is a pipe"), (Path.mkdir, "is a folder"), (lambda p: p.symlink_to("x"), "is a link")],
)
def test_what_stands_in_the_place_of_a_lock_is_neither_followed_nor_waited_for(make, said, tmp_path):
    """The holder's name would be written into whatever a link points to."""
    (tmp_path / "x").write_text("of somebody else")
    make(path_of(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=rf"\.run\.lock: {said}, must be a file"), alone(tmp_path / "run", refuse):
        pass
    assert (tmp_path / "x").read_text() == "of somebody else"


def test_a_forked_child_that_leaves_the_block_does_not_take_the_lock_with_it(tmp_path):
    held = alone(tmp_path / "run", refuse)
    held.__enter__()
    if not (child := os.fork()):
        held.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(child, 0)
    assert path_of(tmp_path / "run").exists()
    held.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_told_and_no_obstacle(tmp_path, monkeypatch, capsys):
    def unknown(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unknown)
    with alone(tmp_path / "run", refuse):
        pass
    assert capsys.readouterr().err == f"{tmp_path}: no locks here (No locks available); start no second process on it\n"


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


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_process_on_a_run_is_refused_until_the_first_is_dead(processes, tmp_path):
    """The first is killed: its lock goes with it, and the second command then finishes the run."""
    first = forked.start(*WORDS, folder=tmp_path, hook=partial(pause, "student"))
    until((tmp_path / "training").exists, "the first run does not train")
    before = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    second = forked.start(*WORDS, folder=tmp_path, processes=processes, log="second.txt")
    assert forked.finish(second) == [2] * processes
    assert (tmp_path / "second.txt").read_text() == (
        f"error: run=one: process {first[0].pid} on {HOST} is at work on runs/smoke/one; wait for it, or choose "
        "another run=NAME\n"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before
    forked.kill(first[0], signal.SIGKILL)
    assert forked.finish(first) == [-signal.SIGKILL]
    forked.whole(*WORDS, folder=tmp_path, processes=processes, log="third.txt")
    assert not list((tmp_path / "runs").rglob("*.lock"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_waits_for_the_teacher_that_another_trains(processes, tmp_path):
    """It is that of both, and would be trained again otherwise."""
    first = forked.start(*WORDS, folder=tmp_path, hook=partial(pause, "teacher"))
    until((tmp_path / "training").exists, "the first run does not train")
    other = ("recipe=smoke", "run=other", "output=runs", "control=false", "loss.temperature=2")
    second = forked.start(*other, folder=tmp_path, processes=processes, log="second.txt")
    said = f"teacher  waits for process {first[0].pid} on {HOST}, which trains it in runs/teachers/mlp_wide-"
    until(lambda: said in (tmp_path / "second.txt").read_text(), "the second run does not wait")
    time.sleep(1)
    (tmp_path / "go").touch()
    assert forked.finish([*first, *second]) == [0] * (1 + processes)
    assert (tmp_path / "second.txt").read_text().count("waits for") == 1
    assert "teacher  found in" in (tmp_path / "second.txt").read_text()
    assert "teacher  epoch" not in (tmp_path / "second.txt").read_text()


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


def test_a_full_disk_is_no_reason_to_be_refused_a_lock(tmp_path, monkeypatch):
    """Its file says who holds it to those who wait, and no more: what must be written is told of by whoever writes."""

    def full(number, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    folder = tmp_path / "run"
    with alone(folder, refuse), pytest.raises(Busy, match="another process"), alone(folder, refuse):
        pass
    assert not list(tmp_path.iterdir())
