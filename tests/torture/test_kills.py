"""SIGKILL, SIGTERM and SIGUSR1 at random moments: the run that resumes ends as if it had been left alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.checkpoint.store import checkpoints_in
from tests.torture import forked

pytestmark = pytest.mark.torture
KILLS, SIGNALS = 8, 5  # of one run
# Augmentation, mixup, averaged weights, accumulation and a schedule; 10 updates an epoch.
WORDS = ("recipe=smoke", "run=one", "output=runs", "teacher.epochs=2", "student.epochs=3", "train.batch_size=128")
WORDS += ("data.shift=1", "data.mixup=0.2", "train.ema_decay=0.9", "train.accumulation=2", "scheduler.warmup_epochs=1")
COMPLAINT = re.compile(r"(?i)traceback|^error|corrupt|damaged|not a whole|f[ae]ll(s|ing)? back")
SAID = re.compile("run the same command to go on|what was saved is kept")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, float]:
    """The undisturbed run, and how many seconds it takes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    forked.whole("--cfg", "job", *WORDS, folder=folder)  # starts the process that the others are forked from
    started = time.monotonic()
    forked.whole(*WORDS, folder=folder)
    return folder, time.monotonic() - started


def newest(folder: Path) -> dict[str, int]:
    """The update of the newest checkpoint of each stage that is not finished."""
    stages = [path.parent for path in folder.rglob("checkpoints") if not (path.parent / "stage.json").exists()]
    saved = {str(stage.relative_to(folder)): checkpoints_in(stage) for stage in stages}
    return {stage: int(paths[0].name.split("-")[1]) for stage, paths in saved.items() if paths}


def updates(folder: Path) -> int:
    """How many lines the stages of a run have logged: one for an update, one for an epoch."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("runs/*/*/metrics.jsonl"))


def ends_as(undisturbed: Path, folder: Path) -> None:
    """All that the run leaves is that of the undisturbed one, and nothing it printed is a complaint."""
    assert forked.differences(undisturbed / "runs", folder / "runs") == []
    said = "".join(path.read_text() for path in folder.glob("*.txt"))
    assert [line for line in said.splitlines() if COMPLAINT.search(line)] == []


@pytest.mark.parametrize("save_every", [0, 0.05])  # after every update, and every few
@pytest.mark.parametrize("trial", range(4))
def test_killed_anywhere_a_run_ends_with_the_same_weights_losses_and_result(
    trial, save_every, rng, tmp_path, undisturbed
):
    words, resumed = (*WORDS, f"train.save_every={save_every}"), 0
    for kill in range(KILLS + 1):
        before, log = newest(tmp_path), f"log{kill}.txt"
        (process,) = forked.start(*words, folder=tmp_path, log=log)
        # The run's own updates tell when, not a clock, which says little of a run on a busy machine.
        last, until = updates(tmp_path) + rng.randint(0, 20), time.monotonic() + forked.LONGEST
        while process.is_alive() and time.monotonic() < until and (kill == KILLS or updates(tmp_path) < last):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))  # anywhere between two updates, or in a save
        forked.kill(process, signal.SIGKILL)
        (code,) = forked.finish([process])
        said = (tmp_path / log).read_text()
        # A run that started anew would come to the same end: it must say that it resumes from what was saved.
        if code == 0 or "goes on after update" in said:
            for stage, update in before.items():
                assert f"goes on after update {update} of" in said, f"{stage}: not after update {update}"
            resumed += len(before)
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        after = newest(tmp_path)
        for stage, update in before.items():
            finished = (tmp_path / stage / "stage.json").exists()
            assert finished or after.get(stage, -1) >= update, f"{stage} has lost update {update}"
    assert kill > 0
    assert resumed > 0
    ends_as(undisturbed[0], tmp_path)


def listens(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal, or is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1) or "State:\tZ" in status


@pytest.mark.parametrize("trial", range(4))
def test_asked_to_stop_at_any_moment_a_run_exits_with_0_and_resumes_to_the_same_end(trial, rng, tmp_path, undisturbed):
    """In a process that does its own imports, from the moment on when it listens."""
    for n in range(SIGNALS):
        log = tmp_path / f"log{n}.txt"
        with log.open("w") as file:
            command = [sys.executable, "-m", "kd.train", *WORDS]
            process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file)
        signum = rng.choice((signal.SIGTERM, signal.SIGUSR1))
        while not listens(process.pid, signum):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 6 + undisturbed[1] / 2))
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(process.pid, signum)
        assert process.wait(30) == 0, log.read_text()
        if (tmp_path / "runs/smoke/one/result.json").exists():
            break
        said = log.read_text()
        assert len(SAID.findall(said)) == 1, said
        if stopped := re.match(r"(\w+) stopped after update (\d+) of", said.splitlines()[-1]):
            on_disk = {Path(stage).name.partition("-")[0]: update for stage, update in newest(tmp_path).items()}
            stage = (
                stopped[1] if stopped[1] in on_disk else "mlp_wide"
            )  # the teacher's directory has its network's name
            assert on_disk[stage] == int(stopped[2]), said
    forked.whole(*WORDS, folder=tmp_path)
    ends_as(undisturbed[0], tmp_path)
