"""SIGKILL at random moments, also in the middle of a save: the run that goes on ends as if it had been left alone."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path

from tests.torture import forked
from tests.torture.harness import Part

KILLS = 8  # of a trial
# Augmentation, mixup, averaged weights, accumulation and a schedule; 10 updates an epoch.
WORDS = ("recipe=smoke", "run=one", "output=runs", "teacher.epochs=2", "student.epochs=3", "train.batch_size=128")
WORDS += ("data.shift=1", "data.mixup=0.2", "train.ema_decay=0.9", "train.accumulation=2", "scheduler.warmup_epochs=1")
COMPLAINT = re.compile(r"(?i)traceback|^error|corrupt|damaged|not a whole|f[ae]ll(s|ing)? back|before it is taken")


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
    counts = {"kills": 0, "in a write": 0, "runs": 0}
    while counts["kills"] < KILLS:
        place = folder / f"trial{i}"
        shutil.rmtree(place, ignore_errors=True)
        # 0: after every update, so that a kill often meets a save.
        words = (*WORDS, f"train.save_every={rng.choice((0, 0.05))}")
        while counts["kills"] < KILLS:
            started = time.time()
            if not killed(words, place, rng.uniform(0, longest)):
                break
            counts["kills"] += 1
            counts["in a write"] += any(path.stat().st_mtime >= started for path in place.rglob("*tmp*"))
        forked.whole(*words, folder=place)
        compare(folder / "undisturbed", place)
        counts["runs"] += 1
        shutil.rmtree(place)
    return counts


def killed(words: tuple[str, ...], place: Path, seconds: float) -> bool:
    """Start a run and kill it after so many seconds; False where it had finished by then."""
    (process,) = forked.start(*words, folder=place)
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
    complaints = [line for line in (place / "log.txt").read_text().splitlines() if COMPLAINT.search(line)]
    assert not complaints, f"{place.name}: {complaints[0]}"


PARTS = (
    Part(
        name="kills",
        promise="killed anywhere, a run ends with the same weights, losses and result",
        trials=25,
        small=1,
        trial=trial,
        prepare=prepare,
    ),
)
