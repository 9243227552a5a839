"""Which points are trained together, and the process that trains them."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kd.checkpoint import read_json, write_json
from kd.config.schema import content_hash
from kd.runtime import signals
from kd.study.folder import Folder, packed, unpacked
from kd.study.grid import Plan, Point

PHASES = ("teachers", "students")  # the second needs what the first wrote
CHUNK = 40  # members trained at once: the stacked parameters of small networks then stay in a core's cache


@dataclass(frozen=True)
class Job:
    """Points that one process trains together."""

    name: str
    phase: str
    engine: str
    points: tuple[Point, ...]

    def write(self, folder: Folder) -> None:
        """Leave what there is to do where the launched process finds it."""
        values = {"phase": self.phase, "engine": self.engine, "points": [packed(point) for point in self.points]}
        write_json(folder.job(self.name), values)

    @classmethod
    def read(cls, folder: Folder, name: str) -> Job:
        """The inverse of `write`."""
        values = read_json(folder.job(name))
        return cls(name, values["phase"], values["engine"], tuple(unpacked(p) for p in values["points"]))


def jobs(plan: Plan, engine_of: Callable[[Point], str]) -> list[Job]:
    """Every job of a study, those of the first phase first.

    They follow from the plan alone and not from what is finished: a job that was killed half done is done again with
    the same members, because the rounding of a batched product can depend on how many there are.
    """
    cohorts: dict[tuple[str, str, str], list[Point]] = {}
    for point in plan.points.values():
        engine = engine_of(point)
        phase = PHASES[0] if point.role == "teacher" else PHASES[1]
        key = point.id if engine == "runs" else _shared(point)
        cohorts.setdefault((phase, engine, key), []).append(point)
    made = [_job(phase, engine, chunk) for (phase, engine, _), points in cohorts.items() for chunk in _chunks(points)]
    return sorted(made, key=lambda job: PHASES.index(job.phase))


def _job(phase: str, engine: str, points: list[Point]) -> Job:
    return Job(f"{phase}-{content_hash([point.id for point in points])}", phase, engine, tuple(points))


def _shared(point: Point) -> str:
    """What the members of a cohort have in common."""
    recipe = point.recipe
    own = asdict(recipe.teacher if point.role == "teacher" else recipe.student)
    network = {key: own[key] for key in ("model", "model_kwargs", "epochs")}
    # Students of one cohort may have different teachers, but of one architecture: they are run as a population too.
    taught = [recipe.teacher.model, recipe.teacher.model_kwargs]
    settings = [asdict(section) for section in (recipe.data, recipe.optimizer, recipe.scheduler, recipe.train)]
    return json.dumps([point.role == "teacher", recipe.seed, network, taught, settings], sort_keys=True)


def _chunks(points: list[Point]) -> Iterator[list[Point]]:
    """Parts of nearly equal size."""
    count = math.ceil(len(points) / CHUNK)
    for i in range(count):
        yield points[i * len(points) // count : (i + 1) * len(points) // count]


# ---- in the launched process


def work(config: Any) -> None:
    """What Hydra's launchers call, in whatever process: do the job that the config names."""
    folder = Folder(Path(config.study))
    name = str(config.job)
    _end_with_command()
    try:
        with signals.listening(), folder.lock(name, wait=True):  # an orphan of a killed command may still be at it
            job = Job.read(folder, name)
            if not all(folder.is_finished(point) for point in job.points):
                _do(folder, job)
    except signals.Interrupted:  # its state is saved
        if _is_of_joblib():  # who would keep it idle, while the command waits for its end
            os._exit(0)
        raise


def _is_of_joblib() -> bool:
    return multiprocessing.current_process().name.startswith("Loky")  # others are their launcher's affair


@cache
def _end_with_command() -> None:
    """Have a worker of joblib's stop, as by SIGTERM, once the command that started it is no more, however it ended.

    One that never had a job ends after joblib's own 300 s.
    """
    command = os.getppid()

    def watch() -> None:
        while os.getppid() == command:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    if _is_of_joblib():
        threading.Thread(target=watch, daemon=True).start()


def _do(folder: Folder, job: Job) -> None:
    """Train the points; whatever goes wrong is written down for each, and nothing else stops."""
    from kd.runtime.provenance import provenance

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    seen = provenance(1) | {"engine": job.engine, "job": job.name}
    try:
        if job.engine == "population":
            from kd.study.cohorts import train
        else:
            from kd.study.runs import train
        for point, outcome in train(folder, job):
            folder.write_point(point, {**outcome, "provenance": seen | {"seconds": outcome.pop("seconds", None)}})
    except Exception as error:  # of user code, of a full disk, of us: the study goes on without these points
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        for point in job.points:
            folder.write_point(point, {"error": text, "provenance": seen | {"seconds": None}})
