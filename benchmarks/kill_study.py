"""A study killed at random twenty times, SIGKILL to its whole process group, and resumed: is the table the same?

    python -m benchmarks.kill_study [kills=20] [recipe=studies/digits_reversal] [key=value ...]

Runs the study undisturbed in one folder and, in another, kills it after a random part of that time, again and again,
until it has been killed so often; then lets it finish. Prints whether the two tables are equal to the byte, whether a
finished point was ever lost or written again, and how far each attempt came. Exit code 1 if anything differs.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GRID = ["set=digits", "study.seeds=4", "teacher.epochs=30", "student.epochs=30"]


def points(study: Path) -> dict[str, int]:
    """When each point was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (study / "points").glob("*.json")}


def main(arguments: list[str]) -> int:
    """Kill, resume, compare."""
    given = dict(word.split("=", 1) for word in arguments)
    kills, recipe = int(given.pop("kills", "20")), given.pop("recipe", "studies/digits_reversal")
    grid = [f"{key}={value}" for key, value in given.items()] or GRID
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "kd.study", f"recipe={recipe}", *grid]
        name = recipe.partition("/")[2]
        calm, wild = (Path(folder) / kind / "studies" / name for kind in ("calm", "wild"))
        started = time.perf_counter()
        subprocess.run([*command, f"output={calm.parents[1]}"], check=True, stdout=subprocess.DEVNULL)
        whole = time.perf_counter() - started
        print(f"undisturbed: {len(points(calm))} points in {whole:.0f} s")
        wrong = 0
        for i in range(kills):
            before = points(wild)
            # Imports come first: half of the kills fall while points are being made, some before and after.
            pause = random.uniform(0.1, 1.0) * whole / 2
            process = subprocess.Popen(
                [*command, f"output={wild.parents[1]}"], start_new_session=True, stdout=subprocess.DEVNULL
            )
            try:
                process.wait(pause)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            after = points(wild)
            harmed = [point for point, written in before.items() if after.get(point) != written]
            wrong += len(harmed)
            state = "killed" if process.returncode == -signal.SIGKILL else f"ended with {process.returncode}"
            print(f"{i + 1:3}: {state} after {pause:5.1f} s, {len(after)} points, {len(harmed)} lost or written again")
        subprocess.run([*command, f"output={wild.parents[1]}"], check=True, stdout=subprocess.DEVNULL)
        equal = (calm / "table.csv").read_bytes() == (wild / "table.csv").read_bytes()
    print(f"tables equal to the byte: {equal}; points lost or written again: {wrong}")
    return int(not equal or wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
