"""SIGTERM and SIGUSR1 at random moments, imports included: exit code 0 in time, and the run goes on to the same end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.torture import forked
from tests.torture.harness import Part
from tests.torture.kills import WORDS, compare, newest, prepare

SIGNALS = 5  # of a trial
PROMISED = 30.0  # seconds
SAID = re.compile("run the same command to go on|what was saved is kept")


def trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """As many runs as it takes to stop them five times in all; the first process does its own imports."""
    longest = json.loads((folder / "seconds.json").read_text()) / 2
    counts = {"signals": 0, "in imports": 0, "saved": 0, "runs": 0}
    while counts["signals"] < SIGNALS:
        place = folder / f"trial{i}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        if not counts["runs"] and stopped(rng, _own_process(place), place, 4.0):
            counts["signals"] += 1
            counts["in imports"] += not (place / "runs").exists()
        while counts["signals"] < SIGNALS and stopped(rng, _forked(place), place, longest):
            counts["signals"] += 1
            counts["saved"] += saved(place)
        forked.whole(*WORDS, folder=place)
        compare(folder / "undisturbed", place)
        counts["runs"] += 1
        shutil.rmtree(place)
    return counts


def _forked(place: Path) -> tuple[int, Callable[[float], int]]:
    """A run's process and how to wait for its exit code; this one is forked with all imports done."""
    (process,) = forked.start(*WORDS, folder=place)
    assert process.pid is not None
    return process.pid, lambda seconds: forked.finish([process], seconds)[0]


def _own_process(place: Path) -> tuple[int, Callable[[float], int]]:
    with (place / "log.txt").open("a") as log:
        process = subprocess.Popen([sys.executable, "-m", "kd.train", *WORDS], cwd=place, stdout=log, stderr=log)
    return process.pid, process.wait


def stopped(rng: random.Random, process: tuple[int, Callable[[float], int]], place: Path, longest: float) -> bool:
    """Send a signal at some moment from when the process listens on; False where it had finished by then."""
    pid, wait = process
    log = place / "log.txt"
    signum = rng.choice((signal.SIGTERM, signal.SIGUSR1))
    while not _listens(pid, signum):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, longest))
    said = len(SAID.findall(log.read_text()))
    asked = time.monotonic()
    try:
        with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
            os.kill(pid, signum)
        code = wait(PROMISED)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        raise AssertionError(f"{signum.name}: still there after {PROMISED:.0f} s: {log.read_text()[-300:]}") from error
    took = time.monotonic() - asked
    assert code == 0, f"{signum.name}: exit code {code} after {took:.1f} s: {log.read_text()[-300:]}"
    if (place / "runs/smoke/one/result.json").exists():
        return False
    assert len(SAID.findall(log.read_text())) == said + 1, f"{signum.name}: does not say that the same command goes on"
    return True


def saved(place: Path) -> int:
    """Whether it says after which update it stopped; that is then the one it goes on from. No other save was made."""
    said = (place / "log.txt").read_text().splitlines()[-1]
    if not (found := re.match(r"(\w+) stopped after update (\d+) of", said)):
        return 0
    on_disk = {Path(stage).name.partition("-")[0]: update for stage, update in newest(place).items()}
    stage = found[1] if found[1] in on_disk else "mlp_wide"
    assert on_disk[stage] == int(found[2]), f"{said}, but update {on_disk[stage]} is on the disk"
    return 1


def _listens(pid: int, signum: int) -> bool:
    """Whether a process has a handler of its own for a signal, or is no more."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signum - 1) & 1) or "State:\tZ" in status


PROMISE = "asked to stop at any moment, it exits with 0 within 30 s and goes on to the same end"
PARTS = (Part("terms", PROMISE, trials=10, small=1, trial=trial, prepare=prepare),)
