"""Jobs of a study: which points one process trains together."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from kd.checkpoint.files import read_json, write_json
from kd.config.compose import build
from kd.config.schema import content_hash
from kd.study.folder import Folder
from kd.study.grid import Plan, Point

PHASES = ("teachers", "students")  # students need the weights of the first phase
CHUNK = 40  # members trained at once: the stacked parameters of small networks then stay in a core's cache


@dataclass(frozen=True)
class Job:
    """Points that one process trains together."""

    name: str
    phase: str
    engine: str
    points: tuple[Point, ...]

    def write(self, folder: Folder) -> None:
        """Write the job to where the launched process reads it."""
        write_json(folder.job(self.name), asdict(self))

    @classmethod
    def read(cls, folder: Folder, name: str) -> Job:
        """The inverse of `write`."""
        values = read_json(folder.job(name))
        points = (Point(**{**point, "recipe": build(point["recipe"])}) for point in values.pop("points"))
        return cls(**values, points=tuple(points))


def jobs(plan: Plan, engines: Mapping[str, str]) -> list[Job]:
    """Every job of a study, those of the first phase first; `engines` by point.

    They follow from the plan alone and not from what is finished: a half-finished job is done again with the same
    members, because the rounding of a batched product can depend on their number.
    """
    cohorts: dict[tuple[str, str, str], list[Point]] = {}
    for point in plan.points.values():
        engine = engines[point.id]
        phase = PHASES[0] if point.role == "teacher" else PHASES[1]
        shared = point.id if engine == "runs" else _shared(point)
        cohorts.setdefault((phase, engine, shared), []).append(point)
    made = [_job(phase, engine, chunk) for (phase, engine, _), points in cohorts.items() for chunk in _chunks(points)]
    return sorted(made, key=lambda job: PHASES.index(job.phase))


def _job(phase: str, engine: str, points: list[Point]) -> Job:
    return Job(f"{phase}-{content_hash([point.id for point in points])}", phase, engine, tuple(points))


def _shared(point: Point) -> str:
    """What the members of a population have in common."""
    recipe = point.recipe
    network = {key: getattr(point.section, key) for key in ("model", "model_kwargs", "epochs")}
    # Students may have different teachers, but of one architecture: they run as a population too.
    taught = [recipe.teacher.model, recipe.teacher.model_kwargs]
    settings = [asdict(section) for section in (recipe.data, recipe.optimizer, recipe.scheduler, recipe.train)]
    return json.dumps([point.role == "teacher", recipe.seed, network, taught, settings], sort_keys=True)


def _chunks(points: list[Point]) -> Iterator[list[Point]]:
    """Parts of nearly equal size."""
    count = math.ceil(len(points) / CHUNK)
    for i in range(count):
        yield points[i * len(points) // count : (i + 1) * len(points) // count]
