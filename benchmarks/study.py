"""What a study costs against the same points one by one through kd.train: a sample of them, and arithmetic.

    python -m benchmarks.study [recipe=studies/mnist1d_grid] [sample=3] [output=FOLDER]

Runs the study from nothing in a fresh folder, on this machine's cores, then calls ``python -m kd.train`` once for each
of `sample` students of one teacher, in an empty folder, as one does by hand. A call trains its teacher where no earlier
call has, so the teacher's share is taken out of the first and counted once for each teacher. Both sides in seconds of
CPU time, all processes together, which a busy machine changes little, and the study in wall-clock time too.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def pairs(arguments: list[str]) -> dict[str, str]:
    """The words of a command line that are all key=value."""
    if wrong := [word for word in arguments if "=" not in word]:
        raise SystemExit(f"{wrong[0]}: type key=value, or --help")
    return dict(word.split("=", 1) for word in arguments)


def spent(command: list[str], folder: str) -> tuple[float, float]:
    """CPU and wall-clock seconds of a command and all it starts."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def overrides(point: dict) -> list[str]:
    """The command line of kd.train that trains a student of the study with its teacher: every setting, none left."""
    plain = {key: value for key, value in point["settings"].items() if not isinstance(value, list | dict)}
    texts = {key: "null" if value is None else f"'{value}'" if isinstance(value, str) else str(value).lower()
             for key, value in plain.items()}  # fmt: skip
    return ["recipe=smoke", *(f"{key}={text}" for key, text in texts.items()), "train.log_every=10", "control=false"]


def main(arguments: list[str]) -> None:
    """Measure and print."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    given = {"recipe": "studies/mnist1d_grid", "sample": "3"} | pairs(arguments)
    if wrong := given.keys() - {"recipe", "sample", "output"}:
        raise SystemExit(f"{', '.join(wrong)}: type recipe=, sample= or output=")
    sample, python = int(given["sample"]), [sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(given.get("output", folder)).resolve())
        study, wall = spent([*python, "kd.study", f"recipe={given['recipe']}", f"output={output}"], folder)
        found = Path(output) / "studies" / given["recipe"].partition("/")[2]
        points = [json.loads(path.read_text()) for path in sorted((found / "points").glob("*.json"))]
        students = [point for point in points if point["role"] == "student"]
        teachers = sum(point["role"] == "teacher" for point in points)
        others = len(points) - teachers
        taught = students[0]["teacher"]
        chosen = [point for point in students if point["teacher"] == taught][: sample + 1]
        calls = [
            spent([*python, "kd.train", *overrides(point), f"output={folder}/one", "name=one"], folder)
            for point in chosen
        ]
    each = sum(cpu for cpu, _ in calls[1:]) / len(calls[1:])
    teacher = calls[0][0] - each
    alone = teachers * teacher + others * each
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}")
    print(f"study of {len(points)} points            {study:8.0f} s of CPU, {wall / 60:.1f} min wall-clock")
    print(f"kd.train, one student            {each:8.1f} s of CPU (mean of {len(calls) - 1} calls)")
    print(f"kd.train, one teacher            {teacher:8.1f} s of CPU")
    print(f"{teachers} teachers and {others} students  {alone:8.0f} s of CPU, extrapolated")
    print(f"point by point costs {alone / study:.1f} times the study")


if __name__ == "__main__":
    main(sys.argv[1:])
