"""Counted trials that can be stopped and go on: each is a function of the seed and its number."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Part:
    """One promise. `trial(i, rng, folder)` tries it once and returns what happened, counted; a broken promise is an
    AssertionError that says what was seen. `prepare(folder)` makes what all trials share and may be called again.
    """

    name: str
    promise: str
    trials: int  # in full
    small: int  # in the test suite
    trial: Callable[[int, random.Random, Path], dict[str, int]]
    prepare: Callable[[Path], None] = _nothing


@dataclass
class Outcome:
    """What the trials of a part came to."""

    counts: Counter[str]
    broken: dict[int, str]  # trial: what was seen


def run(part: Part, trials: int, seed: int, folder: Path, quiet: bool = True) -> Outcome:
    """Run the trials of a part that `folder` has no line of; returns all of them, those of earlier calls too."""
    folder = folder / part.name
    folder.mkdir(parents=True, exist_ok=True)
    journal = folder / "trials.jsonl"
    done = {entry["trial"]: entry for entry in _entries(journal)}
    left = [i for i in range(trials) if i not in done]
    if left:
        part.prepare(folder)
    for i in track(left, part.name, disable=quiet):
        try:
            entry = {"trial": i, "counts": part.trial(i, random.Random(f"{seed}/{part.name}/{i}"), folder)}
        except AssertionError as error:
            entry = {"trial": i, "counts": {}, "broken": str(error) or "an assertion without words"}
        done[i] = entry
        with journal.open("a") as file:
            file.write(json.dumps(entry) + "\n")
    outcome = Outcome(Counter(trials=0), {})
    for i in range(trials):
        outcome.counts.update({"trials": 1, **done[i]["counts"]})
        if "broken" in done[i]:
            outcome.broken[i] = done[i]["broken"]
    return outcome


def in_child(act: Callable[[], Any]) -> Any:
    """What `act` returns, plain values, in a forked process. AssertionError where it raises, or the process dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            answer = {"value": act()}
        except BaseException as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the process ended with {status}"
    answer = json.loads(text)
    assert "error" not in answer, answer["error"]
    return answer["value"]


def _entries(journal: Path) -> list[dict]:
    """Whole lines only: the last one may be torn by a kill."""
    lines = journal.read_text().splitlines(keepends=True) if journal.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) != len(lines):
        journal.write_text("".join(whole))
    return [json.loads(line) for line in whole]
