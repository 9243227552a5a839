"""Asked to stop: at a safe place in the loop, at once elsewhere, and on the second time everywhere."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.torture import forked, harness, kills, terms

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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    forked.whole(*WORDS, folder=folder)
    return folder / "runs"


def stopped(undisturbed, cut, *hook) -> tuple[list[int], str]:
    codes = forked.finish(forked.start(*WORDS, "train.save_every=0", folder=cut, hook=partial(hang, *hook)))
    said = (cut / "log.txt").read_text().splitlines()[-1]
    forked.whole(*WORDS, folder=cut, log="again.txt")
    assert forked.differences(undisturbed, cut / "runs") == []
    return codes, said


@pytest.mark.parametrize("signums", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGTERM)])
def test_two_signals_at_once_are_one_request(signums, undisturbed, tmp_path):
    """A cluster signals a launcher and its processes, and the launcher passes it on."""
    codes, said = stopped(undisturbed, tmp_path, signums, 0.0)
    assert (codes, said) == ([0], "student stopped after update 7 of 15; run the same command to go on")


def test_asked_again_a_run_that_hangs_ends_from_what_was_saved(undisturbed, tmp_path):
    codes, said = stopped(undisturbed, tmp_path, (signal.SIGTERM, signal.SIGUSR1), 1.2)
    assert (codes, said) == ([0], "stopped by SIGTERM; run the same command to go on")
    assert not (tmp_path / "went on").exists()


def test_ctrl_c_twice_ends_a_run_that_hangs(undisturbed, tmp_path):
    codes, said = stopped(undisturbed, tmp_path, (signal.SIGINT, signal.SIGINT), 1.2)
    assert (codes, said) == ([130], "error: stopped; run the same command to go on")


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
    assert (done.returncode, done.stderr) == (0, "stopped by SIGUSR1; run the same command to go on\n")


BLOCKED = """
import ctypes, sys, types
from contextlib import nullcontext
from kd.runtime import signals
signals.listen()
sys.modules["torch.distributed"] = types.SimpleNamespace(is_initialized=lambda: {met}, get_world_size=lambda: 2)
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with signals.held() if {held} else nullcontext():
    c.pthread_mutex_lock(mutex)
    print("now", flush=True)
    c.pthread_mutex_lock(mutex)  # for good, whatever signals come, and no Python code runs
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("met", "held", "asked"), [(False, False, 1), (True, False, 2), (False, True, 2)])
def test_what_gives_back_no_control_is_left_all_the_same(signum, met, held, asked):
    """Once where nothing is lost and nobody waits for this process, else when asked again."""
    command = [sys.executable, "-c", BLOCKED.format(met=met, held=held)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "now\n"
        for left in reversed(range(asked)):
            time.sleep(0.2)
            assert process.poll() is None
            process.send_signal(signum)
            time.sleep(1.2 if left else 0)
        try:
            said = process.communicate(timeout=10)[1]
        finally:
            process.kill()
    assert said == f"stopped by {signum.name}; run the same command to go on\n"
    assert process.returncode == (0 if signum == signal.SIGTERM else 130)


def test_one_signal_in_a_long_update_is_one_request():
    """Heard of by the thread at once and by the handler seconds later: that is not asked twice."""
    code = """
import ctypes, os, signal, threading, time
from kd.runtime import signals
signals.listen()
c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
until = (ctypes.c_long * 2)(int(time.time()) + 4, 0)
with signals.held():
    c.pthread_mutex_lock(mutex)
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    c.pthread_mutex_timedlock(mutex, until)  # an update of 3 s or more in which no Python code runs
    print("saves", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said = "stopped by SIGTERM; run the same command to go on\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, "saves\n", said)


def test_a_signal_to_a_data_worker_is_not_its_parents():
    code = """
import os, signal, time
from kd.runtime import signals
signals.listen()
child = os.fork()
if child == 0:
    os.kill(os.getpid(), signal.SIGTERM)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
time.sleep(3 * signals.GRACE)
print("goes on")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "goes on\n", "")


def test_waiting_for_the_other_processes_ends_when_asked(tmp_path):
    """Torch looks for them in C++."""
    (process,) = forked.start(*WORDS, folder=tmp_path, hook=alone_of_two)
    until = time.monotonic() + 60
    while not (tmp_path / "waits").exists() and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    assert process.exitcode is None
    forked.kill(process, signal.SIGTERM)
    assert forked.finish([process], 30) == [0]
    assert (tmp_path / "log.txt").read_text() == "stopped by SIGTERM; run the same command to go on\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "waits"]


def alone_of_two() -> None:
    """Be the first of two processes; the other never comes."""
    from torch.distributed import distributed_c10d

    def waits(*args, **kwargs):
        Path("waits").touch()
        return rendezvous(*args, **kwargs)

    port = str(forked._free_port())
    os.environ |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    rendezvous, distributed_c10d.rendezvous = distributed_c10d.rendezvous, waits


def test_the_handlers_are_there_before_the_heavy_imports():
    heavy = "{'torch', 'hydra', 'accelerate'}"
    code = f"import sys; import kd.runtime.signals, kd.cli.errors; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("part", [*kills.PARTS, *terms.PARTS], ids=lambda part: part.name)
def test_killed_and_stopped_at_random_moments(part, tmp_path):
    outcome = harness.run(part, part.small, seed=0, folder=tmp_path)
    assert not outcome.broken
    assert outcome.counts["trials"] == 1
    expected = {"kills": ("kills", kills.KILLS), "terms": ("signals", terms.SIGNALS)}
    what, count = expected[part.name]
    assert outcome.counts[what] == count
    if part.name == "kills":
        assert outcome.counts["in a save"] > 0
