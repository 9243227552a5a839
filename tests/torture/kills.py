"""SIGKILL at random moments, also in the middle of a save: the run that goes on ends as if it had been left alone."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from kd.checkpoint.store import checkpoints_in
from tests.torture import forked
from tests.torture.faults import watched
from tests.torture.harness import Part

KILLS = 8  # of a trial
CALLS = 300  # system calls, of some eight saves
# Augmentation, mixup, averaged weights, accumulation and a schedule; 10 updates an epoch.
WORDS = ("recipe=smoke", "run=one", "output=runs", "teacher.epochs=2", "student.epochs=3", "train.batch_size=128")
WORDS += ("data.shift=1", "data.mixup=0.2", "train.ema_decay=0.9", "train.accumulation=2", "scheduler.warmup_epochs=1")
COMPLAINT = re.compile(r"(?i)traceback|^error|corrupt|damaged|not a whole|f[ae]ll(s|ing)? back")


_watching = ExitStack()  # for as long as the process lives


def prepare(folder: Path) -> None:
    """The undisturbed run, and how long it takes."""
    place = folder / "undisturbed"
    if (folder / "seconds.json").exists():
        return
    shutil.rmtree(place, ignore_errors=True)
    forked.whole("--cfg", "job", *WORDS, folder=place)  # starts the process that the others are forked from
    started = time.monotonic()
    forked.whole(*WORDS, folder=place)
    (folder / "seconds.json").write_text(json.dumps(time.monotonic() - started))


def trial(i: int, rng: random.Random, folder: Path) -> dict[str, int]:
    """As many runs as it takes to kill them eight times in all."""
    longest = json.loads((folder / "seconds.json").read_text()) / 2
    counts = {"kills": 0, "in a save": 0, "gone on": 0, "runs": 0}
    while counts["kills"] < KILLS:
        place = folder / f"trial{i}"
        shutil.rmtree(place, ignore_errors=True)
        # 0: after every update, and half of the kills are at a system call of a save
        save_every = 0.05 * ((i + counts["runs"]) % 2)
        words = (*WORDS, f"train.save_every={save_every}")
        while counts["kills"] < KILLS:
            before, in_a_save = newest(place), save_every == 0 and counts["kills"] % 2 == 0
            hook = partial(die, rng.randint(1, CALLS)) if in_a_save else forked.nothing
            if not killed(words, place, forked.LONGEST if in_a_save else rng.uniform(0, longest), hook):
                break
            counts["kills"] += 1
            counts["in a save"] += in_a_save
            after = newest(place)
            for stage, update in before.items():
                finished = (place / stage / "stage.json").exists()
                assert finished or after.get(stage, -1) >= update, f"{place.name}: {stage} has lost update {update}"
        saved = newest(place)
        forked.whole(*words, folder=place, log="last.txt")
        counts["gone on"] += goes_on(saved, (place / "last.txt").read_text())
        compare(folder / "undisturbed", place)
        counts["runs"] += 1
        shutil.rmtree(place)
    return counts


def die(at: int) -> None:
    """Have the process kill itself at the at-th system call of its saves, before it or after, or in the middle."""
    left, saving = [at], []

    def hook(name, call, arguments):
        saving.extend([name] if name == "ftruncate" else [])  # of the first file of the first save
        left[0] -= bool(saving)
        if left[0]:
            return call()
        if name == "write":
            os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
        elif at % 2:
            call()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    _watching.enter_context(watched(hook))


def newest(place: Path) -> dict[str, int]:
    """The update of the newest checkpoint of each stage that is not finished."""
    stages = [path.parent for path in place.rglob("checkpoints") if not (path.parent / "stage.json").exists()]
    saved = {str(stage.relative_to(place)): checkpoints_in(stage) for stage in stages}
    return {stage: int(paths[0].name.split("-")[1]) for stage, paths in saved.items() if paths}


def goes_on(saved: dict[str, int], log: str) -> int:
    """How many stages went on from what was saved. One that started anew would come to the same end."""
    for stage, update in saved.items():
        assert f"goes on after update {update} of" in log, f"{stage}: not after update {update}: {log[-500:]}"
    return len(saved)


def killed(words: tuple[str, ...], place: Path, seconds: float, hook: Callable[[], None] = forked.nothing) -> bool:
    """Start a run and kill it after so many seconds, or let it do so; False where it had finished by then."""
    (process,) = forked.start(*words, folder=place, hook=hook)
    process.join(seconds)
    if process.exitcode is None:
        forked.kill(process, signal.SIGKILL)
    (code,) = forked.finish([process])
    assert code in (0, -signal.SIGKILL), f"exit code {code}: {(place / 'log.txt').read_text()[-500:]}"
    return code != 0


def compare(undisturbed: Path, place: Path) -> None:
    """Raise AssertionError where anything that the run leaves is not that of the undisturbed one."""
    differing = forked.differences(undisturbed / "runs", place / "runs")
    assert not differing, f"{place.name}: not as undisturbed: {', '.join(differing)}"
    said = "".join(path.read_text() for path in place.glob("*.txt"))
    complaints = [line for line in said.splitlines() if COMPLAINT.search(line)]
    assert not complaints, f"{place.name}: {complaints[0]}"


PROMISE = "killed anywhere, a run ends with the same weights, losses and result"
PARTS = (Part("kills", PROMISE, trials=25, small=1, trial=trial, prepare=prepare),)
