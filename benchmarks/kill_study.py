"""Kill a study at random twenty times (SIGKILL to its process group), resume it, and compare its table.

    python -m benchmarks.kill_study [kills=20] [recipe=studies/digits_reversal] [key=value ...]

Runs the study undisturbed in one directory. In another it repeatedly starts the study and kills it after a random part
of that time. Whenever the study finishes, its table is compared with the undisturbed one and the next starts from
nothing, until the number of kills is reached; the last one runs to its end. Prints how far each attempt came, whether
all tables are equal to the byte, and whether a finished point was lost or written again. Exit code 1 if a table differs
or a point was lost or written again.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.study import pairs

GRID = ["set=digits", "study.seeds=4", "teacher.epochs=30", "student.epochs=30"]


def points(study: Path) -> dict[str, int]:
    """When each point was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in (study / "points").glob("*.json")}


def main(arguments: list[str]) -> int:
    """Kill, resume, compare."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    given = pairs(arguments)
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
        print(f"undisturbed: {len(points(calm))} points in {whole:.0f} s", flush=True)
        wanted, wrong, killed = (calm / "table.csv").read_bytes(), 0, 0
        while True:
            before = points(wild)
            limit = random.uniform(0.05, 1.0) * whole if killed < kills else None
            process = subprocess.Popen(
                [*command, f"output={wild.parents[1]}"], start_new_session=True, stdout=subprocess.DEVNULL
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                killed += 1
            after = points(wild)
            wrong += sum(after.get(point) != written for point, written in before.items())
            if process.returncode < 0:
                print(f"kill {killed:2} after {limit:5.1f} s: {len(before)} points, then {len(after)}", flush=True)
                continue
            equal = process.returncode == 0 and (wild / "table.csv").read_bytes() == wanted
            wrong += not equal
            print(f"came to its end after {killed} kills, table equal to the byte: {equal}", flush=True)
            if killed == kills:
                break
            shutil.rmtree(wild)
    print(f"{killed} kills; tables that differ and points lost or written again: {wrong}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
